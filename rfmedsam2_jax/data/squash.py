"""Slices to SAM's square and back: separable resizing by small matrices.

Images become S x S (antialiased linear), truth becomes the occupancy of each cell of the 4G x 4G
mask grid (area average). Between data.preprocessing's grid and what data.pipeline hands to the
refiner; inference uses the same functions, so that training and prediction see the same pixels.
"""

import functools

import numpy as np

from rfmedsam2_jax.data.resampling import antialiased_matrix, apply_separable


@functools.lru_cache(maxsize=64)
def area_matrix(n_in: int, n_out: int) -> np.ndarray:
  """Weights of area averaging, float32 [n_out, n_in]: how much of every new pixel an old one is."""
  edges = np.arange(n_out + 1) * (n_in / n_out)
  low = np.maximum(edges[:-1, None], np.arange(n_in)[None])
  high = np.minimum(edges[1:, None], np.arange(n_in)[None] + 1)
  weights = (np.maximum(high - low, 0) * (n_out / n_in)).astype(np.float32)
  weights.flags.writeable = False  # shared by the cache
  return weights


def resize_linear(slices: np.ndarray, side: int) -> np.ndarray:
  """Resizes [..., H, W] to float32 [..., side, side] by antialiased linear interpolation."""
  return apply_separable(slices, [antialiased_matrix(n, side) for n in slices.shape[-2:]])


def resize_area(slices: np.ndarray, side: int) -> np.ndarray:
  """Resizes [..., H, W] to float32 [..., side, side] by averages; a mask becomes its occupancy."""
  return apply_separable(slices, [area_matrix(n, side) for n in slices.shape[-2:]])


def window_slices(image: np.ndarray, window: np.ndarray, channels: tuple[int, ...]) -> np.ndarray:
  """What SAM sees of prepared slices, before squashing.

  Args:
    image: [C, ..., H, W], normalised as the plan says.
    window: [C, 2], the normalised intensities that become 0 and 1.
    channels: one channel, shown three times by `as_rgb`, or three.

  Returns:
    float32 [len(channels), ..., H, W] in [0, 1].
  """
  chosen = np.asarray(image[list(channels)], np.float32)
  low, high = np.asarray(window, np.float32)[list(channels)].T
  low, high = (v.reshape(-1, *[1] * (chosen.ndim - 1)) for v in (low, high))
  return np.clip((chosen - low) / np.maximum(high - low, 1e-6), 0, 1)


def as_rgb(channels_first: np.ndarray) -> np.ndarray:
  """[1 or 3, ..., H, W] to [..., H, W, 3]; a single channel is repeated."""
  rgb = np.moveaxis(channels_first, 0, -1)
  return np.repeat(rgb, 3, axis=-1) if rgb.shape[-1] == 1 else rgb
