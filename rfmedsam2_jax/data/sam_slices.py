"""Slices to SAM's square: separable resizing by small matrices, in training and prediction alike.

Images become S x S (antialiased linear), truth becomes the occupancy of each cell of the 4G x 4G
mask grid (area average).
"""

import functools

import numpy as np
import scipy.sparse

from rfmedsam2_jax.data.resampling import antialiased_matrix

# Sparse matrices, because the rows have a few entries only, and because the threads of a dense
# product (BLAS) would fight with the training step for the same cores.


@functools.lru_cache(maxsize=256)
def _linear_weights(n_in: int, n_out: int) -> scipy.sparse.csr_array:
  return scipy.sparse.csr_array(antialiased_matrix(n_in, n_out))


@functools.lru_cache(maxsize=256)
def _area_weights(n_in: int, n_out: int) -> scipy.sparse.csr_array:
  """Area averaging, float32 [n_out, n_in]: which share of every new pixel an old one covers."""
  edges = np.arange(n_out + 1) * (n_in / n_out)
  low = np.maximum(edges[:-1, None], np.arange(n_in)[None])
  high = np.minimum(edges[1:, None], np.arange(n_in)[None] + 1)
  weights = np.maximum(high - low, 0) * (n_out / n_in)
  return scipy.sparse.csr_array(weights.astype(np.float32))


def resize_linear(slices: np.ndarray, side: int) -> np.ndarray:
  """Resizes [..., H, W] to float32 [..., side, side] by antialiased linear interpolation."""
  return _resize(slices, *(_linear_weights(size, side) for size in slices.shape[-2:]))


def resize_area(slices: np.ndarray, side: int) -> np.ndarray:
  """Resizes [..., H, W] to float32 [..., side, side] by averages; a mask becomes its occupancy."""
  return _resize(slices, *(_area_weights(size, side) for size in slices.shape[-2:]))


def _resize(slices: np.ndarray, rows: scipy.sparse.csr_array, columns: scipy.sparse.csr_array
            ) -> np.ndarray:
  height, width = slices.shape[-2:]
  flat = np.asarray(slices, np.float32).reshape(-1, height, width)
  narrow = columns @ flat.transpose(2, 0, 1).reshape(width, -1)  # [side, N H]
  narrow = narrow.reshape(-1, len(flat), height).transpose(2, 1, 0).reshape(height, -1)
  resized = (rows @ narrow).reshape(rows.shape[0], len(flat), columns.shape[0])
  return np.ascontiguousarray(resized.transpose(1, 0, 2)).reshape(
    *slices.shape[:-2], rows.shape[0], columns.shape[0])


def window_slices(image: np.ndarray, window: np.ndarray, channels: tuple[int, ...]) -> np.ndarray:
  """What SAM sees of slices before squashing, float32 [len(channels), ..., H, W] in [0, 1].

  `image` is [C, ..., H, W], normalised as the plan says; `window` [C, 2], the intensities that
  become 0 and 1; `channels` are one, shown three times by `as_rgb`, or three.
  """
  chosen = np.asarray(image[list(channels)], np.float32)
  low, high = np.asarray(window, np.float32)[list(channels)].T
  low, high = (v.reshape(-1, *[1] * (chosen.ndim - 1)) for v in (low, high))
  return np.clip((chosen - low) / np.maximum(high - low, 1e-6), 0, 1)


def as_rgb(channels_first: np.ndarray) -> np.ndarray:
  """[1 or 3, ..., H, W] as a view [..., H, W, 3]; a single channel is seen three times."""
  rgb = np.moveaxis(channels_first, 0, -1)
  return np.broadcast_to(rgb, (*rgb.shape[:-1], 3))


def with_neighbours(slices: np.ndarray, depth: int) -> np.ndarray:
  """The slices before, at and behind slices [n] of a volume, int [3, n]; the ends repeat."""
  return np.clip(slices + np.array([[-1], [0], [1]]), 0, depth - 1)
