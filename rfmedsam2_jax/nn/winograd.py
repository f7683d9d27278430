"""3D convolution with stride 1 by Winograd's minimal filtering, for XLA:CPU (nn.convolutions).

Overlapping tiles are transformed along D, H and W, multiplied by the transformed kernel (one matrix
product per coefficient, an eighth of the arithmetic) and transformed back; Lavin and Gray, arXiv
1509.09308, F(4, 3) along every axis. Tiles go layer by layer, so that the arrays between stay in
the cache; that is worth more than the arithmetic. Rounding is about thirty times that of a direct
sum: 2e-5 to 5e-5 of the largest value, in the output and in both gradients.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rfmedsam2_jax.nn.layers import Array

Triple = tuple[int, int, int]


class Transform(NamedTuple):
  """Matrices of F(m, k) along one axis: outputs = back @ ((kernel @ w) * (input @ tile))."""

  input: np.ndarray  # [n, n], n = m + k - 1
  kernel: np.ndarray  # [n, k]
  back: np.ndarray  # [m, n]

  @property
  def outputs(self) -> int:
    return self.back.shape[0]

  @property
  def size(self) -> int:
    return self.back.shape[1]


def _transform(*matrices: Any) -> Transform:
  return Transform(*(np.array(matrix, np.float32) for matrix in matrices))


IDENTITY = _transform([[1]], [[1]], [[1]])
F2 = _transform(
  [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]],
  [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], [[1, 1, 1, 0], [0, 1, -1, 1]]
)
_KERNEL_24 = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
F4 = _transform(
  [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
   [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]],
  np.array(_KERNEL_24, np.float32) / 24,
  [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)


class Tiling(NamedTuple):
  """How a volume [B, D, H, W] is cut: transforms and numbers of tiles along D, H, W."""

  transforms: tuple[Transform, ...]
  tiles: tuple[int, ...]


def tiling(shape: Sequence[int], kernel: Sequence[int]) -> Tiling:
  """The cut of a volume for kernels of 1 or 3 along each axis."""
  transforms = tuple(
    IDENTITY if k == 1 else (F2 if size <= 2 else F4) for size, k in zip(shape, kernel, strict=True)
  )
  tiles = tuple(-(-size // t.outputs) for size, t in zip(shape, transforms, strict=True))
  return Tiling(transforms, tiles)


def _blocks(x_BDHWC: Array, cut: Tiling, overlap: bool) -> Array:
  """Depth tiles [layers, n, H', W', C] of all samples: overlapping by the kernel (the inputs of a
  convolution), or just cut (its outputs)."""
  pads = []
  for size, t, count in zip(x_BDHWC.shape[1:4], cut.transforms, cut.tiles, strict=True):
    m, halo = t.outputs, (t.size - t.outputs) // 2
    # One tile more than there is, so that a tile's overlap can be read from its neighbour.
    begin, length = (halo, (count + (halo > 0)) * m) if overlap else (0, count * m)
    pads.append((begin, length - begin - size))
  x = jnp.pad(x_BDHWC, ((0, 0), *pads, (0, 0)))
  t, count = cut.transforms[0], cut.tiles[0]
  m, n = t.outputs, t.size if overlap else t.outputs
  parts = [x[:, i : i + m * (count - 1) + 1 : m] for i in range(n)]
  return jnp.stack(parts, axis=2).reshape(-1, n, *x.shape[2:])


def _transform_tiles(x: Array, matrices: list[np.ndarray], cut: Tiling) -> Array:
  """A layer of tiles [d, H', W', C] to coefficients [h * w, d, positions, C]."""
  depth, (_, rows, columns), (_, th, tw) = len(matrices[0]), cut.tiles, cut.transforms
  _, height, width, channels = x.shape
  x = (jnp.asarray(matrices[0]) @ x.reshape(x.shape[0], -1)).reshape(
    depth, height // th.outputs, th.outputs, width // tw.outputs, tw.outputs, channels
  )

  def part(p: int, q: int) -> Array:
    a, b = p // th.outputs, q // tw.outputs
    return x[:, a : a + rows, p % th.outputs, b : b + columns, q % tw.outputs]

  parts = [part(p, q) for p, q in np.ndindex(matrices[1].shape[1], matrices[2].shape[1])]
  # Both in-plane axes in one product: XLA:CPU is slow where few rows are transformed.
  plane = jnp.asarray(np.kron(matrices[1], matrices[2]))
  y = plane @ jnp.stack(parts).reshape(len(parts), -1)
  return y.reshape(len(plane), depth, rows * columns, channels)


def _transform_back(y: Array, cut: Tiling) -> Array:
  """Coefficients [h * w, d, positions, C] to a layer of outputs [d, H', W', C]."""
  td, th, tw = cut.transforms
  plane = jnp.asarray(np.kron(th.back, tw.back))
  y = (plane @ y.reshape(y.shape[0], -1)).reshape(len(plane), td.size, -1)
  y = jnp.einsum("ab,kbr->akr", td.back, y)
  y = y.reshape(td.outputs, th.outputs, tw.outputs, *cut.tiles[1:], -1).transpose(0, 3, 1, 4, 2, 5)
  return y.reshape(td.outputs, cut.tiles[1] * th.outputs, cut.tiles[2] * tw.outputs, -1)


def _kernel_matrix(cut: Tiling) -> Array:
  """Kernel transform of all axes, in the order H, W, D."""
  td, th, tw = cut.transforms
  return jnp.asarray(np.kron(np.kron(th.kernel, tw.kernel), td.kernel))


def _forward(x_BDHWC: Array, kernel: Array) -> Array:
  batch, depth, height, width, cin = x_BDHWC.shape
  cout = kernel.shape[-1]
  cut = tiling((depth, height, width), kernel.shape[:3])
  td, th, tw = cut.transforms
  # One matrix product: an einsum over three axes is ten times as slow here.
  weights = _kernel_matrix(cut) @ kernel.transpose(1, 2, 0, 3, 4).reshape(-1, cin * cout)
  weights = weights.reshape(th.size * tw.size, td.size, cin, cout)

  def layer(x: Array) -> Array:
    tiles = _transform_tiles(x, [t.input for t in cut.transforms], cut)
    return _transform_back(jnp.einsum("knmc,knco->knmo", tiles, weights), cut)

  y = lax.map(layer, _blocks(x_BDHWC, cut, overlap=True))
  y = y.reshape(batch, cut.tiles[0] * td.outputs, *y.shape[-3:])
  return y[:, :depth, :height, :width]


def _kernel_gradient(x_BDHWC: Array, dy_BDHWC: Array, kernel_size: Sequence[int]) -> Array:
  cin, cout = x_BDHWC.shape[-1], dy_BDHWC.shape[-1]
  cut = tiling(x_BDHWC.shape[1:4], kernel_size)
  td, th, tw = cut.transforms

  def layer(total: Array, blocks: tuple[Array, Array]) -> tuple[Array, None]:
    x, dy = blocks
    tiles = _transform_tiles(x, [t.input for t in cut.transforms], cut)
    outputs = _transform_tiles(dy, [t.back.T for t in cut.transforms], cut)
    return total + jnp.einsum("knmc,knmo->knco", tiles, outputs), None

  total = jnp.zeros((th.size * tw.size, td.size, cin, cout), x_BDHWC.dtype)
  blocks = _blocks(x_BDHWC, cut, overlap=True), _blocks(dy_BDHWC, cut, overlap=False)
  total, _ = lax.scan(layer, total, blocks)
  kd, kh, kw = kernel_size
  gradient = _kernel_matrix(cut).T @ total.reshape(-1, cin * cout)
  return gradient.reshape(kh, kw, kd, cin, cout).transpose(2, 0, 1, 3, 4)


@jax.custom_vjp
def winograd_conv3d(x_BDHWC: Array, kernel: Array) -> Array:
  """3D convolution, stride 1, zero padding k // 2; kernel [kd, kh, kw, Cin, Cout], sizes 1 or 3."""
  return _forward(x_BDHWC, kernel)


def _vjp_backward(saved: tuple[Array, Array], dy_BDHWC: Array) -> tuple[Array, Array]:
  x_BDHWC, kernel = saved
  dx = _forward(dy_BDHWC, kernel[::-1, ::-1, ::-1].swapaxes(3, 4))
  return dx, _kernel_gradient(x_BDHWC, dy_BDHWC, kernel.shape[:3])


winograd_conv3d.defvjp(lambda x, kernel: (_forward(x, kernel), (x, kernel)), _vjp_backward)
