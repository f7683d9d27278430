"""Separable resampling: one matrix per axis, float32 [n_out, n_in], applied with BLAS.

Two grids cover the same field of view, index i of n has its centre at (i + 0.5) / n of it
(half-pixel centres), and beyond the border its values are repeated.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.ndimage

_BLOCK = 64  # output rows computed together


def _cached(make: Callable[[int, int], np.ndarray]) -> Callable[[int, int], np.ndarray]:
  """Read-only float32, because everybody gets the same array."""
  @functools.lru_cache(maxsize=256)
  @functools.wraps(make)
  def cached(n_in: int, n_out: int) -> np.ndarray:
    matrix = np.ascontiguousarray(make(n_in, n_out), dtype=np.float32)
    matrix.flags.writeable = False
    return matrix

  return cached


def _centres(n_in: int, n_out: int) -> np.ndarray:
  """float64 [n_out]: where the output's centres lie, in the input's indices."""
  return (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5


@_cached
def linear_matrix(n_in: int, n_out: int) -> np.ndarray:
  """Linear interpolation, without antialiasing."""
  position = np.clip(_centres(n_in, n_out), 0, n_in - 1)
  low = np.minimum(position.astype(int), max(n_in - 2, 0))
  matrix, rows = np.zeros((n_out, n_in)), np.arange(n_out)
  matrix[rows, low] = 1 - (position - low)
  if n_in > 1:
    matrix[rows, low + 1] = position - low
  return matrix


@_cached
def antialiased_matrix(n_in: int, n_out: int) -> np.ndarray:
  """Linear when growing, a triangle two new voxels wide when shrinking.

  The same as `jax.image.resize(method="linear", antialias=True)` and PIL's bilinear filter.
  """
  distance = np.abs(_centres(n_in, n_out)[:, None] - np.arange(n_in)) / max(n_in / n_out, 1.0)
  weights = np.maximum(1 - distance, 0)
  return weights / weights.sum(axis=1, keepdims=True)


@_cached
def spline_matrix(n_in: int, n_out: int) -> np.ndarray:
  """Cubic B-spline interpolation (nnU-Net's order 3, border repeated)."""
  if n_in == 1:
    return np.ones((n_out, 1))
  # Spline prefilter and evaluation are linear, so their response to the unit vectors is the matrix.
  matrix = scipy.ndimage.zoom(
    np.eye(n_in), (n_out / n_in, 1), order=3, mode="nearest", grid_mode=True)
  # The response falls by a factor of 3.7 per voxel; what float32 would not see anyway becomes 0,
  # which `apply_separable` can leave out.
  return np.where(np.abs(matrix) < 1e-8, 0, matrix)


@_cached
def nearest_matrix(n_in: int, n_out: int) -> np.ndarray:
  """The voxel in which the output's centre lies."""
  return np.eye(n_in)[np.clip(np.floor(_centres(n_in, n_out) + 0.5), 0, n_in - 1).astype(int)]


def apply_separable(array: np.ndarray, matrices: Sequence[np.ndarray | None]) -> np.ndarray:
  """Applies one matrix, float32 [m, n], to each of the last axes; None leaves it as it is.

  float32 [..., n_1, n_2, ...] to [..., m_1, m_2, ...], contiguous unless nothing is to be done.
  """
  result = np.asarray(array, np.float32)
  steps = [(axis, m) for axis, m in enumerate(matrices, result.ndim - len(matrices))
           if m is not None]
  # What shrinks comes first: less memory and arithmetic for the rest.
  for axis, matrix in sorted(steps, key=lambda step: step[1].shape[0] / step[1].shape[1]):
    result = _apply(matrix, result, axis)
  return result


def support(matrix: np.ndarray, axis: int, chosen: slice) -> slice:
  """Where the rows (axis 0) or columns (axis 1) that are `chosen` are not all 0, without gaps."""
  rows = matrix[chosen] if axis == 0 else matrix[:, chosen].T
  places = np.flatnonzero(rows.any(axis=0))
  return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)


def _apply(matrix: np.ndarray, array: np.ndarray, axis: int) -> np.ndarray:
  """One axis, in blocks of output rows: each needs few of the input's, and BLAS does the rest."""
  shape, (n_out, n_in) = array.shape, matrix.shape
  before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1:])
  source = array.reshape(before, n_in, after)
  result = np.empty((before, n_out, after), np.float32)
  for start in range(0, n_out, _BLOCK):
    rows = slice(start, min(start + _BLOCK, n_out))
    columns = support(matrix, 0, rows)
    if after == 1:
      np.matmul(source[:, columns, 0], matrix[rows, columns].T, out=result[:, rows, 0])
    else:
      np.matmul(matrix[rows, columns], source[:, columns], out=result[:, rows])
  return result.reshape(*shape[:axis], n_out, *shape[axis + 1:])
