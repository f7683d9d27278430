"""The prompt generator: a 3D U-Net in nnU-Net's form (PlainConvUNet, or ResidualEncoderUNet with
its blocks of ResNet-D), normalised patches to logits per class. Submodules are named as in nnU-Net
(`encoder/stages_0/convs_0`, `encoder/stages_0/blocks_0/conv1`, `decoder/transpconvs_0`,
`decoder/seg_layers_0`).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from rfmedsam2_jax.nn.convolutions import HE_NORMAL, Conv3D, Triple
from rfmedsam2_jax.nn.layers import Array, settled
from rfmedsam2_jax.nn.platform import Platform, default_platform
from rfmedsam2_jax.nn.remat import CONVOLUTION, Remat, rematerialised


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """Sizes of the U-Net; one entry per stage, full resolution first."""

  features: tuple[int, ...] = (32, 64, 128, 256)  # cost grows with the square of the first
  strides: tuple[Triple, ...] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))  # on entering a stage
  kernels: tuple[Triple, ...] = ((3, 3, 3),) * 4  # (1, 3, 3) where slices are far apart
  convs_per_stage: int = 2  # in the encoder, and in the decoder unless that has its own number
  dtype: str = "float32"  # of the arithmetic; bfloat16 halves memory on GPU and TPU
  remat: Remat = "none"  # what training keeps of a convolution's block for the backward pass
  decoder_convs: int | None = None  # per stage of the decoder; None: as in a plain encoder, else 1
  mirrored: tuple[int, ...] = ()  # axes (0 D, 1 H, 2 W) along which it sees its input mirrored
  blocks: tuple[int, ...] | None = None  # residual ones of each encoder stage; None: plain encoder
  members: int = 1  # networks side by side, whose logits are averaged

  def __post_init__(self):
    f, s, k = len(self.features), len(self.strides), len(self.kernels)
    if not f == s == k:
      raise ValueError("features, strides and kernels need one entry per stage, got "
                       f"{f}, {s} and {k}")
    if len(self.features) < 2:
      raise ValueError("a U-Net needs at least two stages")
    if self.blocks is not None and len(self.blocks) != f:
      raise ValueError(f"blocks need one entry per stage, got {len(self.blocks)} for {f}")

  @property
  def convs_up(self) -> int:
    """Convolutions per stage of the decoder."""
    return self.decoder_convs or (self.convs_per_stage if self.blocks is None else 1)

  @property
  def divisor(self) -> Triple:
    """What the patch size must be divisible by, along D, H, W."""
    d, h, w = (math.prod(strides) for strides in zip(*self.strides, strict=True))
    return d, h, w


class InstanceNorm(nn.Module):
  """Instance norm over D, H, W with scale and bias, as torch.nn.InstanceNorm3d(affine=True), with
  float32 statistics in two passes: a fast variance loses digits where the mean is far from zero."""

  silent: bool = False  # starts at zero

  @nn.compact
  def __call__(self, x_BDHWC: Array) -> Array:
    channels = x_BDHWC.shape[-1]
    start = nn.initializers.zeros if self.silent else nn.initializers.ones
    scale = self.param("scale", start, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    x = x_BDHWC.astype(jnp.float32)
    mean = x.mean((1, 2, 3), keepdims=True)
    variance = jnp.square(x - mean).mean((1, 2, 3), keepdims=True)
    factor = jax.lax.rsqrt(variance + 1e-5) * scale
    return ((x - mean) * factor + bias).astype(x_BDHWC.dtype)


_HE_NORMAL_TRANSPOSED = settled(nn.initializers.variance_scaling(
  2.0, "fan_in", "normal", in_axis=0, out_axis=-1, batch_axis=(1, 2, 3)))


class TransposedConv3D(nn.Module):
  """torch.nn.ConvTranspose3d with kernel = stride: a dense layer and a depth-to-space; parameters:
  kernel [Cin, sd, sh, sw, features], bias [features]."""

  features: int
  stride: Triple
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BDHWC: Array) -> Array:
    b, d, h, w, channels = x_BDHWC.shape
    sd, sh, sw = self.stride
    shape = (channels, sd, sh, sw, self.features)
    kernel = self.param("kernel", _HE_NORMAL_TRANSPOSED, shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    y = x_BDHWC.astype(self.dtype) @ kernel.astype(self.dtype).reshape(channels, -1)
    y = y.reshape(b, d, h, w, sd, sh, sw, self.features).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return y.reshape(b, d * sd, h * sh, w * sw, self.features) + bias.astype(self.dtype)


class ConvBlock(nn.Module):
  """Convolution, instance norm, leaky ReLU (0.01)."""

  features: int
  kernel: Triple
  stride: Triple
  dtype: jnp.dtype
  platform: Platform
  closing: bool = False  # the end of a residual block: starts at zero, has no activation of its own

  @nn.compact
  def __call__(self, x_BDHWC: Array) -> Array:
    sizes = self.features, self.kernel, self.stride
    conv = Conv3D(*sizes, self.dtype, self.platform, name="conv")
    y = checkpoint_name(conv(x_BDHWC), CONVOLUTION)
    y = InstanceNorm(self.closing, name="norm")(y)
    return y if self.closing else nn.leaky_relu(y, 0.01)


class Projection(nn.Module):
  """A dense layer without bias, and an instance norm."""

  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BDHWC: Array) -> Array:
    dense = nn.Dense(
      self.features, use_bias=False, dtype=self.dtype, kernel_init=HE_NORMAL, name="conv")
    return InstanceNorm(name="norm")(dense(x_BDHWC))


class ResidualBlock(nn.Module):
  """BasicBlockD of dynamic-network-architectures (ResNet-D, arXiv:1812.01187): two convolutions
  beside a skip, which is averaged where they stride and projected where they change the width. A
  fresh block is its skip."""

  features: int
  kernel: Triple
  stride: Triple
  dtype: jnp.dtype
  platform: Platform

  @nn.compact
  def __call__(self, x_BDHWC: Array) -> Array:
    f, kernel, of_all = self.features, self.kernel, (self.dtype, self.platform)
    y = ConvBlock(f, kernel, self.stride, *of_all, name="conv1")(x_BDHWC)
    y = ConvBlock(f, kernel, (1, 1, 1), *of_all, closing=True, name="conv2")(y)
    skip, strided = x_BDHWC.astype(y.dtype), max(self.stride) > 1
    if strided:
      skip = averaged(skip, self.stride)
    if x_BDHWC.shape[-1] != f:
      # Named by its place in nnU-Net's sequence, where the pooling comes first.
      skip = Projection(f, self.dtype, name=f"skip_{int(strided)}")(skip)
    return nn.leaky_relu(y + skip, 0.01)


def averaged(x_BDHWC: Array, stride: Triple) -> Array:
  """Means over windows of the size of the stride, which divides D, H and W."""
  b, d, h, w, channels = x_BDHWC.shape
  sd, sh, sw = stride
  windows = x_BDHWC.reshape(b, d // sd, sd, h // sh, sh, w // sw, sw, channels)
  return windows.mean((2, 4, 6))


class Stage(nn.Module):
  """Stacked blocks; the first one carries the stride."""

  features: int
  kernel: Triple
  stride: Triple
  count: int
  dtype: jnp.dtype
  remat: Remat
  platform: Platform
  residual: bool = False

  @nn.compact
  def __call__(self, x_BDHWC: Array) -> Array:
    kind, name = (ResidualBlock, "blocks") if self.residual else (ConvBlock, "convs")
    block_of = rematerialised(kind, self.remat)
    for i in range(self.count):
      sizes = self.features, self.kernel, (1, 1, 1) if i else self.stride
      x_BDHWC = block_of(*sizes, self.dtype, self.platform, name=f"{name}_{i}")(x_BDHWC)
    return x_BDHWC


class Encoder(nn.Module):
  config: UNetConfig
  platform: Platform

  @nn.compact
  def __call__(self, x_BDHWC: Array) -> list[Array]:
    """Features of every stage, full resolution first."""
    c, x, skips = self.config, x_BDHWC, []
    of_all, residual = (jnp.dtype(c.dtype), c.remat, self.platform), c.blocks is not None
    if residual:
      x = Stage(c.features[0], c.kernels[0], (1, 1, 1), 1, *of_all, name="stem")(x)
    counts = c.blocks or (c.convs_per_stage,) * len(c.features)
    for i, sizes in enumerate(zip(c.features, c.kernels, c.strides, counts, strict=True)):
      x = Stage(*sizes, *of_all, residual, name=f"stages_{i}")(x)
      skips.append(x)
    return skips


class Decoder(nn.Module):
  """From the lowest resolution up; stage i of the decoder ends where encoder stage n-2-i does."""

  config: UNetConfig
  num_outputs: int
  platform: Platform

  @nn.compact
  def __call__(self, skips: list[Array], deep_supervision: bool) -> tuple[Array, ...]:
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    x, outputs = skips[-1], []
    for i, level in enumerate(reversed(range(len(skips) - 1))):
      up = TransposedConv3D(c.features[level], c.strides[level + 1], dtype, name=f"transpconvs_{i}")
      x = jnp.concatenate([up(x), skips[level]], axis=-1)
      sizes = c.features[level], c.kernels[level], (1, 1, 1), c.convs_up
      x = Stage(*sizes, dtype, c.remat, self.platform, name=f"stages_{i}")(x)
      # All heads are made at initialisation, so that the tree does not depend on the call.
      if deep_supervision or level == 0 or self.is_initializing():
        head = nn.Dense(self.num_outputs, dtype=jnp.float32, name=f"seg_layers_{i}")
        outputs.append(head(x.astype(jnp.float32)))
    return tuple(reversed(outputs))


class UNet(nn.Module):
  """nnU-Net's PlainConvUNet or ResidualEncoderUNet, channels last, or several, as it averages its
  folds."""

  config: UNetConfig
  num_outputs: int  # logits per voxel: background and atoms, or one per region
  platform: Platform | None = None  # what it is traced for; None: the default backend

  @nn.compact
  def __call__(self, x_BDHWC: Array, deep_supervision: bool = False) -> Array | tuple[Array, ...]:
    """Logits, float32 [B, D, H, W, num_outputs], or with deep supervision a tuple of one such array
    per stage but the lowest, full resolution first; ValueError where the patch is not divisible by
    `config.divisor`."""
    shape, divisor = x_BDHWC.shape[1:4], self.config.divisor
    if any(size % d for size, d in zip(shape, divisor, strict=True)):
      raise ValueError(f"patch {shape} is not divisible by {divisor}")
    if self.config.members > 1:
      one = dataclasses.replace(self.config, members=1)
      every = [UNet(one, self.num_outputs, self.platform, name=f"members_{i}")(
        x_BDHWC, deep_supervision) for i in range(self.config.members)]
      return jax.tree.map(lambda *logits: sum(logits) / len(logits), *every)
    axes = tuple(axis + 1 for axis in self.config.mirrored)
    x_BDHWC = jnp.flip(x_BDHWC, axes) if axes else x_BDHWC
    platform = self.platform or default_platform()
    skips = Encoder(self.config, platform, name="encoder")(x_BDHWC.astype(self.config.dtype))
    decoder = Decoder(self.config, self.num_outputs, platform, name="decoder")
    outputs = decoder(skips, deep_supervision)
    outputs = tuple(jnp.flip(y, axes) for y in outputs) if axes else outputs
    return outputs if deep_supervision else outputs[0]
