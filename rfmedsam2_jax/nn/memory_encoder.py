"""Memory encoder: a slice's features and the mask found on it become a memory map.

In: image embedding (before memory) and the mask, scaled to +-10, at image resolution. Out: a map
that nn.memory_attention reads. Follows sam2.modeling.memory_encoder (sam2 1.1.0).
"""

import flax.linen as nn
import jax.numpy as jnp

from rfmedsam2_jax.nn.convolutions import DepthwiseConv2D
from rfmedsam2_jax.nn.layers import Array, DType, conv2d, gelu, layer_norm
from rfmedsam2_jax.nn.remat import Remat, rematerialised


class MemoryEncoder(nn.Module):
  """Mask on its way down, added to projected features, fused by ConvNeXt blocks.

  Args:
    width: channels C of the features.
    out: channels of the memory; other than `width`.
    mask_channels: of the mask after each of its four halvings.
    fuser_layers: ConvNeXt blocks.
    remat: what the backward pass keeps of the mask's way down and of a block, see nn.remat.
  """

  width: int
  out: int = 64
  mask_channels: tuple[int, ...] = (4, 16, 64, 256)
  fuser_layers: int = 2
  dtype: DType = jnp.float32
  remat: Remat = "none"

  @nn.compact
  def __call__(self, embedding_NGGC: Array, mask_NSS1: Array) -> Array:
    """Memories [N, G, G, out]."""
    down = rematerialised(MaskDownSampler, self.remat)(
      self.width, self.mask_channels, dtype=self.dtype, name="mask_downsampler"
    )
    x = conv2d(self.width, 1, dtype=self.dtype, name="pix_feat_proj")(embedding_NGGC)
    fuser = Fuser(self.fuser_layers, dtype=self.dtype, remat=self.remat, name="fuser")
    x = fuser(x + down(mask_NSS1))
    return conv2d(self.out, 1, dtype=self.dtype, name="out_proj")(x)


class MaskDownSampler(nn.Module):
  """3x3 convolutions at stride 2 with norms, then a projection to the features' width."""

  features: int
  channels: tuple[int, ...]
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x_NSS1: Array) -> Array:
    x = x_NSS1
    # Upstream's Sequential counts convolution, norm and activation.
    for i, channels in enumerate(self.channels):
      x = conv2d(channels, 3, 2, 1, dtype=self.dtype, name=f"encoder_{3 * i}")(x)
      x = gelu(layer_norm(1e-6, dtype=self.dtype, name=f"encoder_{3 * i + 1}")(x))
    last = 3 * len(self.channels)
    return conv2d(self.features, 1, dtype=self.dtype, name=f"encoder_{last}")(x)


class Fuser(nn.Module):
  """ConvNeXt blocks."""

  layers: int
  dtype: DType = jnp.float32
  remat: Remat = "none"

  @nn.compact
  def __call__(self, x_NGGC: Array) -> Array:
    block_of = rematerialised(CXBlock, self.remat)
    for i in range(self.layers):
      x_NGGC = block_of(dtype=self.dtype, name=f"layers_{i}")(x_NGGC)
    return x_NGGC


class CXBlock(nn.Module):
  """ConvNeXt block: 7x7 depth-wise, norm, two dense layers, layer scale, residual."""

  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x_NGGC: Array) -> Array:
    width = x_NGGC.shape[-1]
    y = DepthwiseConv2D(width, (7, 7), dtype=self.dtype, name="dwconv")(x_NGGC)
    y = layer_norm(1e-6, dtype=self.dtype, name="norm")(y)
    y = gelu(nn.Dense(4 * width, dtype=self.dtype, name="pwconv1")(y))
    y = nn.Dense(width, dtype=self.dtype, name="pwconv2")(y)
    gamma = self.param("gamma", nn.initializers.constant(1e-6), (width,))
    return x_NGGC + gamma.astype(y.dtype) * y
