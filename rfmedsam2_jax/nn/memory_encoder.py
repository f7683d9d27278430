"""Memory encoder: a slice's embedding (before memory) and the mask found on it, scaled to +-10 at
image resolution, become a map that nn.memory_attention reads. Follows
sam2.modeling.memory_encoder (sam2 1.1.0).
"""

import flax.linen as nn

from rfmedsam2_jax.nn.convolutions import Conv2D, DepthwiseConv2D
from rfmedsam2_jax.nn.layers import Array, DType, gelu, layer_norm
from rfmedsam2_jax.nn.platform import Platform
from rfmedsam2_jax.nn.remat import Remat, rematerialised


class MemoryEncoder(nn.Module):
  """Mask on its way down, added to projected features, fused by ConvNeXt blocks."""

  width: int  # channels C of the features
  out: int  # channels of the memory
  mask_channels: tuple[int, ...]  # after each of the mask's four halvings
  fuser_layers: int  # ConvNeXt blocks
  dtype: DType
  remat: Remat  # of the mask's way down and of a block
  platform: Platform

  @nn.compact
  def __call__(self, embedding_NGGC: Array, mask_NSS1: Array) -> Array:
    """Memories [N, G, G, out]."""
    down_of = rematerialised(MaskDownSampler, self.remat)
    down = down_of(
      self.width, self.mask_channels, self.dtype, self.platform, name="mask_downsampler")
    x = Conv2D(self.width, 1, dtype=self.dtype, name="pix_feat_proj")(embedding_NGGC)
    fuser = Fuser(self.fuser_layers, self.dtype, self.remat, self.platform, name="fuser")
    x = fuser(x + down(mask_NSS1))
    return Conv2D(self.out, 1, dtype=self.dtype, name="out_proj")(x)


class MaskDownSampler(nn.Module):
  """3x3 convolutions at stride 2 with norms, then a projection to the features' width."""

  features: int
  channels: tuple[int, ...]
  dtype: DType
  platform: Platform

  @nn.compact
  def __call__(self, x: Array) -> Array:
    # Upstream's Sequential counts convolution, norm and activation.
    for i, channels in enumerate(self.channels):
      x = Conv2D(channels, 3, 2, 1, self.dtype, self.platform, name=f"encoder_{3 * i}")(x)
      x = gelu(layer_norm(1e-6, dtype=self.dtype, name=f"encoder_{3 * i + 1}")(x))
    name = f"encoder_{3 * len(self.channels)}"
    return Conv2D(self.features, 1, dtype=self.dtype, name=name)(x)


class Fuser(nn.Module):
  layers: int
  dtype: DType
  remat: Remat
  platform: Platform

  @nn.compact
  def __call__(self, x_NGGC: Array) -> Array:
    block_of = rematerialised(CXBlock, self.remat)
    for i in range(self.layers):
      x_NGGC = block_of(self.dtype, self.platform, name=f"layers_{i}")(x_NGGC)
    return x_NGGC


class CXBlock(nn.Module):
  """ConvNeXt block: 7x7 depth-wise, norm, two dense layers, layer scale, residual."""

  dtype: DType
  platform: Platform

  @nn.compact
  def __call__(self, x_NGGC: Array) -> Array:
    width = x_NGGC.shape[-1]
    y = DepthwiseConv2D(width, (7, 7), self.dtype, self.platform, name="dwconv")(x_NGGC)
    y = layer_norm(1e-6, dtype=self.dtype, name="norm")(y)
    y = gelu(nn.Dense(4 * width, dtype=self.dtype, name="pwconv1")(y))
    y = nn.Dense(width, dtype=self.dtype, name="pwconv2")(y)
    gamma = self.param("gamma", nn.initializers.constant(1e-6), (width,))
    return x_NGGC + gamma.astype(y.dtype) * y
