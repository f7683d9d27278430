"""Convolutions that are fast on every platform: 3D for the U-Net, 2D for SAM 2.

All modules keep the parameters of a native convolution, which GPU and TPU take. XLA:CPU has no fast
3D or grouped convolution, nor a fast gradient of a kernel within a loop, so there the same sum is
formed from operations that it does well. Padding is PyTorch's (the same on both sides whatever the
stride; Flax's SAME differs at stride 2).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from rfmedsam2_jax.nn.layers import Array, DType, settled
from rfmedsam2_jax.nn.platform import Platform, default_platform
from rfmedsam2_jax.nn.winograd import Triple, winograd_conv3d


def _native(x: Array, kernel: Array, stride: Sequence[int], groups: int = 1) -> Array:
  """lax's own convolution in 2D or 3D, channels last."""
  axes = "DHW"[5 - x.ndim :]
  return lax.conv_general_dilated(
    x, kernel, stride, [(k // 2, k // 2) for k in kernel.shape[:-2]],
    dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"), feature_group_count=groups,
  )


def native_conv3d(x_BDHWC: Array, kernel: Array, stride: Triple = (1, 1, 1)) -> Array:
  """lax's own 3D convolution with PyTorch's padding; kernel [kd, kh, kw, Cin, Cout]."""
  return _native(x_BDHWC, kernel, stride)


def depth_taps_conv3d(x_BDHWC: Array, kernel: Array, stride: Triple = (1, 1, 1)) -> Array:
  """The same sum as 2D convolutions over the depth taps: twice as fast under XLA:CPU."""
  batch, depth, *plane = x_BDHWC.shape
  kd = len(kernel)
  padded = jnp.pad(x_BDHWC, ((0, 0), (kd // 2, kd // 2), (0, 0), (0, 0), (0, 0)))
  depth_out = (depth - 1) // stride[0] + 1

  def tap(i: int) -> Array:
    x = padded[:, i : i + stride[0] * (depth_out - 1) + 1 : stride[0]]
    return _native(x.reshape(batch * depth_out, *plane), kernel[i], stride[1:])

  taps = [tap(i) for i in range(kd)]
  y = sum(taps[1:], taps[0])
  return y.reshape(batch, depth_out, *y.shape[1:])


def winograd_pays(x_BDHWC: Array, kernel: Array, stride: Triple) -> bool:
  """Whether Winograd is the fastest form under XLA:CPU (benchmarks/conv3d.py)."""
  if tuple(stride) != (1, 1, 1) or x_BDHWC.dtype != jnp.float32:
    return False
  if not set(kernel.shape[:3]) <= {1, 3} or max(kernel.shape[1:3]) < 3:
    return False
  channels = kernel.shape[3:]
  # Transforming the kernel has to be worth it, and the channels fill the vector registers.
  return min(channels) >= 8 and math.prod(x_BDHWC.shape[:4]) >= 64 * max(channels)


def conv3d(
  x_BDHWC: Array, kernel: Array, stride: Triple = (1, 1, 1), platform: Platform | None = None
) -> Array:
  """3D convolution, channels last, PyTorch's padding, in the form that suits the platform; kernel
  [kd, kh, kw, Cin, Cout] of odd sizes. platform: None is the default backend."""
  if not (platform or default_platform()).is_cpu:
    return native_conv3d(x_BDHWC, kernel, stride)
  if winograd_pays(x_BDHWC, kernel, stride):
    return winograd_conv3d(x_BDHWC, kernel)
  return depth_taps_conv3d(x_BDHWC, kernel, stride)


def native_depthwise_conv2d(x_BHWC: Array, kernel: Array) -> Array:
  """lax's own grouped convolution, stride 1, PyTorch's padding; kernel [kh, kw, 1, C]."""
  return _native(x_BHWC, kernel, (1, 1), groups=x_BHWC.shape[-1])


def shifted_depthwise_conv2d(x_BHWC: Array, kernel: Array) -> Array:
  """The same sum as shifted multiply-adds, 30 times as fast forward under XLA:CPU."""
  (kh, kw), (h, w) = kernel.shape[:2], x_BHWC.shape[1:3]
  padded = jnp.pad(x_BHWC, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
  taps = [padded[:, i : i + h, j : j + w] * kernel[i, j, 0] for i in range(kh) for j in range(kw)]
  return sum(taps[1:], taps[0])


def unfolded_conv2d(x_BHWC: Array, kernel: Array, stride: int) -> Array:
  """A 2D convolution, PyTorch's padding, as matrix products of shifted images; kernel [k, k, Cin,
  Cout]. Under XLA:CPU's loops its gradient is 4 to 20 times as fast as that of lax's own.
  """
  side = len(kernel)
  reach = side // 2
  padded = jnp.pad(x_BHWC, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
  height, width = (stride * ((n - 1) // stride) + 1 for n in x_BHWC.shape[1:3])
  taps = [padded[:, i : i + height : stride, j : j + width : stride]
          for i in range(side) for j in range(side)]
  if x_BHWC.shape[-1] == 1:  # one channel is not worth gathering
    return sum((x * kernel[divmod(n, side)] for n, x in enumerate(taps[1:], 1)),
               taps[0] * kernel[0, 0])
  return jnp.concatenate(taps, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _in_windows(x_BHWC: Array, kernel: Array) -> Array:
  """A 2D convolution whose windows do not overlap and leave nothing out, as one matrix product."""
  batch, height, width, channels = x_BHWC.shape
  side = len(kernel)
  x = x_BHWC.reshape(batch, height // side, side, width // side, side, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // side, width // side, -1)
  return x @ kernel.reshape(-1, kernel.shape[-1])


class Conv2D(nn.Module):
  """2D convolution [B, H, W, Cin] -> [B, H', W', features] with PyTorch's symmetric padding:
  `padding` zeros on all four sides. Parameters, both float32: kernel [k, k, Cin, features], bias
  [features]. `platform`: where given and a CPU, the form that suits loops over few channels."""

  features: int
  kernel: int
  stride: int = 1
  padding: int = 0
  dtype: DType = jnp.float32
  platform: Platform | None = None

  @nn.compact
  def __call__(self, x_BHWC: Array) -> Array:
    shape = (self.kernel, self.kernel, x_BHWC.shape[-1], self.features)
    weight = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    x, weight = x_BHWC.astype(self.dtype), weight.astype(self.dtype)
    if self.kernel == self.stride and not self.padding:
      y = _in_windows(x, weight)
    elif self.platform is not None and self.platform.is_cpu and self.padding == self.kernel // 2:
      y = unfolded_conv2d(x, weight, self.stride)
    else:
      y = lax.conv_general_dilated(
        x, weight, 2 * (self.stride,), 2 * [2 * (self.padding,)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + bias.astype(self.dtype)


# As in nnU-Net.
HE_NORMAL = settled(nn.initializers.variance_scaling(2.0, "fan_in", "normal"))


class Conv3D(nn.Module):
  """3D convolution with PyTorch's padding; parameters, both float32: kernel [kd, kh, kw, Cin,
  features] of odd sizes, bias [features]."""

  features: int
  kernel: Triple
  stride: Triple
  dtype: jnp.dtype
  platform: Platform

  @nn.compact
  def __call__(self, x_BDHWC: Array) -> Array:
    shape = (*self.kernel, x_BDHWC.shape[-1], self.features)
    weight = self.param("kernel", HE_NORMAL, shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    y = conv3d(x_BDHWC.astype(self.dtype), weight.astype(self.dtype), self.stride,
               self.platform)
    return y + bias.astype(self.dtype)


class DepthwiseConv2D(nn.Module):
  """Depth-wise 2D convolution, stride 1, PyTorch's padding; parameters, both float32: kernel [k, k,
  1, features], bias [features]."""

  features: int
  kernel: tuple[int, int] = (3, 3)
  dtype: jnp.dtype = jnp.float32
  platform: Platform = dataclasses.field(default_factory=default_platform)

  @nn.compact
  def __call__(self, x_BHWC: Array) -> Array:
    shape = (*self.kernel, 1, self.features)
    weight = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    fast = shifted_depthwise_conv2d if self.platform.is_cpu else native_depthwise_conv2d
    return fast(x_BHWC.astype(self.dtype), weight.astype(self.dtype)) + bias.astype(self.dtype)
