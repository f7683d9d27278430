"""The trainable parts that RFMedSAM 2 puts into a frozen SAM 2: DWConvAdapter and CNN-Adapter.

Both map an image-shaped tensor to its own shape and are the identity when fresh: the last layer
starts at zero, so that a converted network with new adapters is SAM 2 itself. Their submodules are
named `adapter` wherever they are placed, which is how the training config selects them.

An adapter of one's own is a Linen module with the fields of these two, put in their place:

    class MyAdapters(AdapterConfig):
      after_attention = MyAdapter

    config = dataclasses.replace(PRESETS["nano"], adapters=MyAdapters(cnn=False))
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from rfmedsam2_jax.nn.convolutions import depthwise_conv
from rfmedsam2_jax.nn.layers import Array, DType, gelu, layer_norm


class DWConvAdapter(nn.Module):
  """Depth-wise convolutional adapter of RFMedSAM 2, placed after an attention on image tokens.

  The order of its layers is the paper's; the bottleneck is ours, since adapters as wide as their
  blocks could not stay under 1 % of the parameters.

  Args:
    width: channels of the bottleneck.
  """

  width: int = 16
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x_BHWC: Array) -> Array:
    y = layer_norm(dtype=self.dtype, name="norm_in")(x_BHWC)
    y = nn.Dense(self.width, dtype=self.dtype, name="down")(y)
    y = nn.Dense(self.width, dtype=self.dtype, name="point")(y)
    y = gelu(depthwise_conv(self.width, dtype=self.dtype, name="depth")(y))
    y = layer_norm(dtype=self.dtype, name="norm_out")(y)
    # Zero, so that a network with fresh adapters is SAM 2 itself.
    y = _zero_dense(x_BHWC.shape[-1], self.dtype, "up")(y)
    return x_BHWC + y


class CNNAdapter(nn.Module):
  """Convolutional adapter of RFMedSAM 2, placed after a convolution of the FPN neck.

  The place is the paper's, the layers are ours: point-wise down, depth-wise 3x3, GELU, point-wise
  up, added to the convolution's output. There is no norm, because the neck's features are used by
  their magnitude.

  Args:
    width: channels of the bottleneck.
  """

  width: int = 16
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x_BHWC: Array) -> Array:
    y = nn.Dense(self.width, dtype=self.dtype, name="down")(x_BHWC)
    y = gelu(depthwise_conv(self.width, dtype=self.dtype, name="depth")(y))
    return x_BHWC + _zero_dense(x_BHWC.shape[-1], self.dtype, "up")(y)


def _zero_dense(features: int, dtype: DType, name: str) -> nn.Dense:
  return nn.Dense(features, kernel_init=nn.initializers.zeros, dtype=dtype, name=name)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """Which adapters exist, and their size.

  Subclasses put other modules into the same places: `after_attention` and `after_convolution` are
  called as `(width, dtype=..., name="adapter")` and map [B, H, W, C] to itself. Such a config works
  with everything that takes a `SAM2Config`, but no file can describe it.
  """

  dwconv: bool = True  # DWConvAdapters in Hiera, memory attention and mask decoder
  cnn: bool = True     # CNN-Adapters after the convolutions of the FPN neck
  width: int = 16      # channels inside an adapter; above 24 they exceed 1 % of SAM 2.1 base+

  after_attention: ClassVar[Any] = DWConvAdapter
  after_convolution: ClassVar[Any] = CNNAdapter

  @property
  def own(self) -> bool:
    """Whether the modules are not this program's."""
    return type(self) is not AdapterConfig
