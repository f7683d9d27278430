"""Hiera: the hierarchical vision transformer that is the trunk of SAM 2's image encoder; nn.fpn
brings the feature maps of its stages to a common width. Follows
sam2/modeling/backbones/hieradet.py of sam2 1.1.0, with the same submodule names.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from rfmedsam2_jax.nn.adapters import AdapterConfig
from rfmedsam2_jax.nn.attention import dot_product_attention
from rfmedsam2_jax.nn.convolutions import Conv2D
from rfmedsam2_jax.nn.layers import MLP, Array, DType, gelu, layer_norm, settled
from rfmedsam2_jax.nn.platform import Platform, default_platform
from rfmedsam2_jax.nn.positions import hiera_positions
from rfmedsam2_jax.nn.remat import Remat, rematerialised
from rfmedsam2_jax.nn.row_bands import map_bands

_POSITIONS = settled(nn.initializers.normal(0.02))


class Hiera(nn.Module):
  """The trunk; images [B, H, W, 3] to features of strides 4, 8, 16, 32.

  The fields are those of the official configurations and of SAM2Config, under the same names.
  """

  embed_dim: int
  num_heads: int
  stages: tuple[int, ...]
  global_att_blocks: tuple[int, ...]  # counted over all stages
  window_spec: tuple[int, ...] = (8, 4, 14, 7)
  window_pos_embed_bkg_spatial_size: tuple[int, int] = (14, 14)
  q_pool: int = 3  # stage transitions, from the first, that halve the resolution
  adapters: AdapterConfig = AdapterConfig(dwconv=False, cnn=False)
  dtype: DType = jnp.float32
  remat: Remat = "none"  # of a block
  platform: Platform = dataclasses.field(default_factory=default_platform)

  @nn.compact
  def __call__(self, images_BHW3: Array) -> tuple[Array, ...]:
    """Features of every stage, fine to coarse: [B, H/4, W/4, C], [B, H/8, W/8, 2C], ...; ValueError
    where the sides of the images are not divisible by 4 x the first window (32 officially)."""
    x = PatchEmbed(self.embed_dim, self.dtype, name="patch_embed")(images_BHW3)
    side, grid = self.window_spec[0], self.window_pos_embed_bkg_spatial_size
    background = self.param("pos_embed", _POSITIONS, (1, *grid, self.embed_dim))
    tile = self.param("pos_embed_window", _POSITIONS, (1, side, side, self.embed_dim))
    x = x + hiera_positions(background, tile, *x.shape[1:3]).astype(x.dtype)
    features, block = [], 0
    block_of = rematerialised(Block, self.remat)
    for stage, blocks in enumerate(self.stages):
      for i in range(blocks):
        opens_stage = stage > 0 and i == 0
        # The block that opens a stage still has the window of the stage before.
        window = 0 if block in self.global_att_blocks else self.window_spec[stage - opens_stage]
        pool = opens_stage and stage <= self.q_pool
        sizes = self.embed_dim * 2**stage, self.num_heads * 2**stage, window, pool
        layer = block_of(*sizes, self.adapters, self.dtype, self.platform, name=f"blocks_{block}")
        x = layer(x)
        block += 1
      features.append(x)
    return tuple(features)


class PatchEmbed(nn.Module):
  """Overlapping 7x7 patches at stride 4: [B, H, W, 3] -> [B, H/4, W/4, features]."""

  features: int
  dtype: DType

  @nn.compact
  def __call__(self, images_BHW3: Array) -> Array:
    return Conv2D(self.features, 7, stride=4, padding=3, dtype=self.dtype, name="proj")(images_BHW3)


class Block(nn.Module):
  """One transformer block; with `pool`, it halves the resolution on the way."""

  features: int  # channels of the result; where the input has others, the shortcut is projected
  num_heads: int
  window: int  # side of the attention windows in tokens of the input, 0 for the whole image
  pool: bool  # queries and shortcut are max-pooled 2x2, so that the result has half the sides
  adapters: AdapterConfig
  dtype: DType
  platform: Platform

  @nn.compact
  def __call__(self, x_BHWC: Array) -> Array:
    height, width = x_BHWC.shape[1:3]
    # Windows know nothing of each other, so a row of them can go for itself; where they do not
    # tile the image, or there are none, only whole images can.
    rows = self.window if self.window and height % self.window == 0 else height
    widest, platform = rows * width * 3 * self.features, self.platform
    x = map_bands(Block._attend, self, x_BHWC, rows, widest, platform)
    x = self.adapters.adapted(x, self.dtype, platform)
    return map_bands(Block._transform, self, x, 1, x.shape[2] * 4 * self.features, platform)

  def _attend(self, x_BHWC: Array) -> Array:
    """Attention with its shortcut."""
    shortcut, x = x_BHWC, layer_norm(1e-6, dtype=self.dtype, name="norm1")(x_BHWC)
    if x.shape[-1] != self.features:
      # Unlike in most transformers, this shortcut takes the normed input.
      shortcut = nn.Dense(self.features, dtype=self.dtype, name="proj")(x)
      if self.pool:
        shortcut = max_pool2(shortcut)
    sizes = self.features, self.num_heads, self.window, self.pool
    return shortcut + MultiScaleAttention(*sizes, self.dtype, self.platform, name="attn")(x)

  def _transform(self, x_BHWC: Array) -> Array:
    """The MLP with its shortcut."""
    y = layer_norm(1e-6, dtype=self.dtype, name="norm2")(x_BHWC)
    mlp = MLP(4 * self.features, self.features, 2, activation=gelu, dtype=self.dtype, name="mlp")
    return x_BHWC + mlp(y)


class MultiScaleAttention(nn.Module):
  """Self-attention within windows (or over the image), optionally with pooled queries."""

  features: int
  num_heads: int
  window: int
  pool: bool
  dtype: DType
  platform: Platform

  @nn.compact
  def __call__(self, x_BHWC: Array) -> Array:
    height, width = x_BHWC.shape[1:3]
    side = self.window
    padding = (-height % side, -width % side) if side else (0, 0)
    qkv = PaddedDense(3 * self.features, self.dtype, name="qkv")(x_BHWC, padding)
    q, k, v = jnp.split(split_windows(qkv, side) if side else qkv, 3, axis=-1)
    if self.pool:
      q = max_pool2(q)
    shape, heads = q.shape, (self.num_heads, self.features // self.num_heads)
    q, k, v = (x.reshape(len(x), -1, *heads) for x in (q, k, v))
    out = dot_product_attention(q, k, v, platform=self.platform).reshape(shape)
    if side:
      scale = 2 if self.pool else 1
      padded = ((height + padding[0]) // scale, (width + padding[1]) // scale)
      out = join_windows(out, *padded)[:, : height // scale, : width // scale]
    return nn.Dense(self.features, dtype=self.dtype, name="proj")(out)


class PaddedDense(nn.Module):
  """A dense layer of an image that is zero-padded at its lower right before the projection.

  Padding after the product and before the bias saves the products of zeros (8 % of SAM 2.1 tiny's
  operations at 512). The padding is not masked: SAM 2 attends to it.
  """

  features: int
  dtype: DType

  @nn.compact
  def __call__(self, x_BHWC: Array, padding: tuple[int, int]) -> Array:
    init = nn.initializers.lecun_normal()
    kernel = self.param("kernel", init, (x_BHWC.shape[-1], self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x, kernel, bias = nn.dtypes.promote_dtype(x_BHWC, kernel, bias, dtype=self.dtype)
    y = jnp.dot(x, kernel)
    if any(padding):
      y = jnp.pad(y, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)))
    return y + bias


def split_windows(x_BHWC: Array, side: int) -> Array:
  """[B, H, W, C] -> [B * H/side * W/side, side, side, C]; `side` divides H and W."""
  batch, height, width, channels = x_BHWC.shape
  x = x_BHWC.reshape(batch, height // side, side, width // side, side, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, channels)


def join_windows(x_WssC: Array, height: int, width: int) -> Array:
  """The inverse of `split_windows` for a grid of height x width."""
  _, side, _, channels = x_WssC.shape
  x = x_WssC.reshape(-1, height // side, width // side, side, side, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def max_pool2(x_BHWC: Array) -> Array:
  """2x2 max pooling at stride 2; even sides."""
  batch, height, width, channels = x_BHWC.shape
  return x_BHWC.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
