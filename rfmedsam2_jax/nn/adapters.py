"""The trainable parts of RFMedSAM 2 in a frozen SAM 2: the paper's DWConvAdapter and CNN-Adapter,
and our MaskAdapter. All change nothing when fresh, as their last layer starts at zero: a converted
network with new adapters is SAM 2 itself. Their submodules are named `adapter` wherever they are
placed, which is how the training config selects them.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from rfmedsam2_jax.base.ranges import STRICT, Count, fixed
from rfmedsam2_jax.nn.convolutions import Conv2D, DepthwiseConv2D
from rfmedsam2_jax.nn.layers import Array, DType, gelu, layer_norm, upsample2
from rfmedsam2_jax.nn.platform import Platform, default_platform

MASK_LIMIT = 8.0  # mask logits beyond +-this say nothing more


class DWConvAdapter(nn.Module):
  """Depth-wise convolutional adapter of RFMedSAM 2, placed after an attention on image tokens.

  The order of its layers is the paper's; the bottleneck of `width` channels is ours, since adapters
  as wide as their blocks could not stay under 1 % of the parameters.
  """

  width: int = 16
  dtype: DType = jnp.float32
  platform: Platform = dataclasses.field(default_factory=default_platform)

  @nn.compact
  def __call__(self, x_BHWC: Array) -> Array:
    y = layer_norm(dtype=self.dtype, name="norm_in")(x_BHWC)
    y = nn.Dense(self.width, dtype=self.dtype, name="down")(y)
    y = nn.Dense(self.width, dtype=self.dtype, name="point")(y)
    y = gelu(_depthwise(self)(y))
    y = layer_norm(dtype=self.dtype, name="norm_out")(y)
    return x_BHWC + _zero_dense(x_BHWC.shape[-1], self.dtype)(y)


class CNNAdapter(nn.Module):
  """Convolutional adapter of RFMedSAM 2, placed after a convolution of the FPN neck.

  The place is the paper's, the layers are ours: point-wise down to `width` channels, depth-wise
  3x3, GELU, point-wise up, added to the convolution's output. There is no norm, because the neck's
  features are used by their magnitude.
  """

  width: int = 16
  dtype: DType = jnp.float32
  platform: Platform = dataclasses.field(default_factory=default_platform)

  @nn.compact
  def __call__(self, x_BHWC: Array) -> Array:
    y = nn.Dense(self.width, dtype=self.dtype, name="down")(x_BHWC)
    y = gelu(_depthwise(self)(y))
    return x_BHWC + _zero_dense(x_BHWC.shape[-1], self.dtype)(y)


class MaskAdapter(nn.Module):
  """A correction of mask logits by convolutions on the mask grid; an adapter of our own.

  What SAM 2's decoder says of a mask prompt has passed a grid of stride 16. This small U-Net of two
  levels (`width` channels at full resolution, twice as many at half) sees the slice and the mask of
  the stage before as it is, on the slices around too. It is for stages whose masks are nearly right
  and can be trained without the rest of SAM 2, four times as fast (`RefinerConfig.mask_adapter`).
  """

  width: int = 32
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, pixels_NHWC: Array, nearby_NRHW: Array) -> Array:
    """What is added to the mask logits, float32 [N, H, W].

    Args:
      pixels_NHWC: the slice, see ImageFeatures.
      nearby_NRHW: mask logits within +-8 of the slices around, the cell's own in the middle; 0
        where unknown (refinement.prompts.nearby_logits).
    """
    nearby = jnp.moveaxis(nearby_NRHW / MASK_LIMIT, 1, -1).astype(pixels_NHWC.dtype)
    x = jnp.concatenate([pixels_NHWC, nearby], axis=-1)
    fine = gelu(Conv2D(self.width, 3, padding=1, dtype=self.dtype, name="fine_0")(x))
    coarse = Conv2D(2 * self.width, 3, 2, padding=1, dtype=self.dtype, name="coarse_0")(fine)
    coarse = Conv2D(2 * self.width, 3, padding=1, dtype=self.dtype, name="coarse_1")(gelu(coarse))
    coarse = nn.Dense(self.width, dtype=self.dtype, name="back")(gelu(coarse))
    fine = fine + upsample2(coarse)
    fine = gelu(Conv2D(self.width, 3, padding=1, dtype=self.dtype, name="fine_1")(fine))
    return _zero_dense(1, self.dtype)(fine)[..., 0].astype(jnp.float32)


def _depthwise(adapter: DWConvAdapter | CNNAdapter) -> DepthwiseConv2D:
  sizes: dict[str, Any] = {"dtype": adapter.dtype, "platform": adapter.platform}
  return DepthwiseConv2D(adapter.width, **sizes, name="depth")


def _zero_dense(features: int, dtype: DType) -> nn.Dense:
  return nn.Dense(features, kernel_init=nn.initializers.zeros, dtype=dtype, name="up")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """Which adapters exist, and their size.

  Subclasses put other modules into the same places (`after_attention = MyAdapter`):
  `after_attention` and `after_convolution` are called as `(width, dtype=..., name="adapter")`, with
  a `platform` too if they have such a field, and map [B, H, W, C] to itself; `on_masks` as
  `(mask_width, dtype=...)`, see MaskAdapter. Such a config works with everything that takes a
  `SAM2Config`, but no file can describe it.
  """

  __pydantic_config__ = STRICT

  dwconv: bool = True  # DWConvAdapters in Hiera, memory attention and mask decoder
  cnn: bool = True     # CNN-Adapters after the convolutions of the FPN neck
  width: Count = 16    # channels inside an adapter; above 24 they exceed 1 % of SAM 2.1 base+
  mask: bool = False   # MaskAdapter on the masks of every stage of refinement
  mask_width: Count = 32  # its channels
  mask_reach: ClassVar[int] = 2  # slices on either side whose masks of the stage before it sees
  _read = fixed("mask_reach")

  after_attention: ClassVar[Any] = DWConvAdapter
  after_convolution: ClassVar[Any] = CNNAdapter
  on_masks: ClassVar[Any] = MaskAdapter

  def adapted(self, x_BHWC: Array, dtype: DType, platform: Platform) -> Array:
    """What attention gave, adapted if there are DWConvAdapters; to be called within a module."""
    return self._through(self.after_attention, x_BHWC, dtype, platform) if self.dwconv else x_BHWC

  def convolved(self, x_BHWC: Array, dtype: DType, platform: Platform) -> Array:
    """What a convolution of the neck gave, adapted if there are CNN-Adapters."""
    return self._through(self.after_convolution, x_BHWC, dtype, platform) if self.cnn else x_BHWC

  def _through(self, kind: Any, x_BHWC: Array, dtype: DType, platform: Platform) -> Array:
    asks = "platform" in getattr(kind, "__dataclass_fields__", {})
    told: dict[str, Any] = {"platform": platform} if asks else {}
    return kind(self.width, dtype=dtype, **told, name="adapter")(x_BHWC)

  @property
  def own(self) -> bool:
    """Whether the modules are not this program's."""
    return type(self) is not AdapterConfig
