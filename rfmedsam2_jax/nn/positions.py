"""Position encodings of SAM 2: sine (image grid, pointers), Hiera's learned grid, random Fourier.

Pure functions; the parameters that some of them take belong to the modules that call them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.nn.layers import Array


def _sine_periods(channels: int) -> np.ndarray:
  """Divisors of the position for each channel, the same for a sine and its cosine."""
  return 10000.0 ** (2 * (np.arange(channels) // 2) / channels)


def _sines_and_cosines(angles: Array) -> Array:
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


@functools.lru_cache(maxsize=32)
def sine_positions_2d(height: int, width: int, channels: int) -> np.ndarray:
  """Fixed positions of a grid, float32 [height, width, channels] (position_encoding.py:79 of sam2
  1.1.0). Positions count from 1 and are normalised to 2 pi. The first half of the channels encodes
  y, the second x; sine and cosine are interleaved."""
  half = channels // 2

  def encode(size: int) -> np.ndarray:
    angles = np.arange(1, size + 1)[:, None] / (size + 1e-6) * (2 * math.pi) / _sine_periods(half)
    return np.where(np.arange(half) % 2 == 0, np.sin(angles), np.cos(angles))

  y = np.broadcast_to(encode(height)[:, None], (height, width, half))
  x = np.broadcast_to(encode(width)[None, :], (height, width, half))
  return np.concatenate([y, x], axis=-1).astype(np.float32)


def sine_positions_1d(positions: Array, channels: int) -> Array:
  """Positions of object pointers in time, [...] to float32 [..., channels]; unlike the grid's, all
  sines come before all cosines (sam2_utils.py:63 of sam2 1.1.0)."""
  periods = _sine_periods(channels // 2).astype(np.float32)
  return _sines_and_cosines(positions[..., None] / periods)


def hiera_positions(background_1HWC: Array, window_1HWC: Array, height: int, width: int) -> Array:
  """Hiera's position embedding of a grid, float32 [1, height, width, C]: a background [1, h, w, C],
  resized by bicubic interpolation as PyTorch does it, plus a tiled window [1, s, s, C].

  Raises:
    ValueError: s does not divide `height` and `width`.
  """
  side, channels = window_1HWC.shape[1], window_1HWC.shape[-1]
  if height % side or width % side:
    raise ValueError(
      f"an image of {4 * height} x {4 * width} pixels has {height} x {width} patches, which windows"
      f" of {side} do not tile; choose sides divisible by {4 * side}"
    )
  background = jax.image.resize(
    background_1HWC, (1, height, width, channels), "bicubic-pytorch", antialias=False
  )
  return background + jnp.tile(window_1HWC, (1, height // side, width // side, 1))


def random_fourier(points: Array, matrix_2F: Array) -> Array:
  """Random Fourier features of points [..., 2], x and y in [0, 1]: float32 [..., 2F], sines before
  cosines (position_encoding.py:128 of sam2 1.1.0). The matrix is a fixed draw, never trained."""
  matrix = jax.lax.stop_gradient(matrix_2F.astype(jnp.float32))
  points = 2 * points.astype(jnp.float32) - 1
  # Written out, because a matrix product may be computed in reduced precision on an accelerator
  # and an angle of many turns does not survive that.
  angles = 2 * math.pi * (points[..., :1] * matrix[0] + points[..., 1:] * matrix[1])
  return _sines_and_cosines(angles)


def random_fourier_grid(matrix_2F: Array, height: int, width: int) -> Array:
  """Random Fourier features of the centres of a grid's cells: float32 [height, width, 2F]."""
  x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
  return random_fourier(jnp.asarray(np.stack([x, y], axis=-1), jnp.float32), matrix_2F)
