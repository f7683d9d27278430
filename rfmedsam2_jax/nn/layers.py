"""Small layers of all networks here, with PyTorch's conventions where JAX's differ."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
AnyArray = jax.Array | np.ndarray
A = TypeVar("A", jax.Array, np.ndarray)  # of what there is on the device and on the host
Params = dict[str, Any]  # nested, of arrays
DType = Any


def settled(init: Callable[..., Array]) -> Callable[..., Array]:
  """An initializer (key, shape, dtype) whose values are the same with and without `jax.jit`.

  In a compiled program XLA makes one factor of all that a draw is multiplied by, and rounds once
  less than the operations do one by one; this is always such a program.
  """
  return jax.jit(init, static_argnums=(1, 2))


def gelu(x: Array) -> Array:
  """The exact GELU; Flax's default is the tanh approximation, which official weights do not use.

  In float32 and with erf, as PyTorch computes it: JAX's own form takes erfc, whose backward pass is
  twice as slow under XLA:CPU.
  """
  y = x.astype(jnp.float32)
  return (0.5 * y * (1.0 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def layer_norm(
  epsilon: float = 1e-5, dtype: DType = jnp.float32, name: str | None = None
) -> nn.LayerNorm:
  """LayerNorm over the last axis. SAM 2 has epsilon 1e-6 in Hiera and in every LayerNorm2d."""
  # The one-pass variance is wrong by 6e-3 where the mean is a hundred times the deviation.
  # Statistics are float32 whatever `dtype` is (Linen's force_float32_reductions).
  return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def upsample2(x_BHWC: Array) -> Array:
  """Nearest-neighbour upsampling by 2."""
  return x_BHWC.repeat(2, axis=1).repeat(2, axis=2)


class ConvTranspose2x2(nn.Module):
  """torch.nn.ConvTranspose2d(kernel_size=2, stride=2): [B, H, W, Cin] -> [B, 2H, 2W, features].

  The windows do not overlap, so it is a dense layer and a depth-to-space. The parameter `kernel`
  is [Cin, 2, 2, features], in PyTorch [Cin, features, 2, 2]; `bias` is [features].
  """

  features: int
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x_BHWC: Array) -> Array:
    batch, height, width, channels = x_BHWC.shape
    init = nn.initializers.variance_scaling(
      1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=3, batch_axis=(1, 2)
    )
    kernel = self.param("kernel", init, (channels, 2, 2, self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x, kernel, bias = nn.dtypes.promote_dtype(x_BHWC, kernel, bias, dtype=self.dtype)
    y = x.reshape(-1, channels) @ kernel.reshape(channels, -1)
    y = y.reshape(batch, height, width, 2, 2, self.features) + bias
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, self.features)


class MLP(nn.Module):
  """Dense layers `layers_0` ... with an activation between them (sam2.modeling.sam2_utils.MLP)."""

  hidden: int  # width of all layers but the last
  out: int  # width of the last layer
  num_layers: int
  activation: Callable[[Array], Array] = nn.relu  # in SAM 2 but for Hiera, which has the exact GELU
  sigmoid_output: bool = False  # of the IoU head; float32, as bfloat16 has few values near 1
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    for i in range(self.num_layers):
      last = i == self.num_layers - 1
      x = nn.Dense(self.out if last else self.hidden, dtype=self.dtype, name=f"layers_{i}")(x)
      if not last:
        x = self.activation(x)
    return nn.sigmoid(x.astype(jnp.float32)) if self.sigmoid_output else x
