"""Augmentation of patches and of runs of slices (one in-plane transform each), as in nnU-Net.

Pure numpy functions of (rng, arrays) for data.pipeline. An affine transform is a matrix from voxels
of the wanted sample, counted from its centre, to voxels of the source from the same centre.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from scipy import ndimage

from rfmedsam2_jax.base.ranges import STRICT, Axis
from rfmedsam2_jax.data.cuts import Cut, whole


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
  """Probabilities are per sample, ranges are drawn from uniformly."""

  __pydantic_config__ = STRICT

  # Axes of (slice, row, column) along which a sample may be mirrored. None by default: left and
  # right organs become each other's picture.
  flips: tuple[Axis, ...] = ()

  # nnU-Net's, which nobody has found a reason to turn.
  rotation: ClassVar[float] = 30.0  # degrees, about each axis; only in-plane if anisotropic
  rotation_probability: ClassVar[float] = 0.2
  scaling: ClassVar[tuple[float, float]] = (0.7, 1.4)  # above 1 magnifies
  scaling_probability: ClassVar[float] = 0.2
  noise: ClassVar[float] = 0.1  # greatest variance, in units of the normalised image
  noise_probability: ClassVar[float] = 0.1
  blur: ClassVar[tuple[float, float]] = (0.5, 1.0)  # sigma in voxels
  blur_probability: ClassVar[float] = 0.1
  brightness: ClassVar[tuple[float, float]] = (0.75, 1.25)  # factor
  brightness_probability: ClassVar[float] = 0.15
  contrast: ClassVar[tuple[float, float]] = (0.75, 1.25)  # factor about the mean, range kept
  contrast_probability: ClassVar[float] = 0.15
  gamma: ClassVar[tuple[float, float]] = (0.7, 1.5)  # exponent within the sample's own range
  gamma_probability: ClassVar[float] = 0.3
  gamma_inverted_probability: ClassVar[float] = 0.1  # the same on the inverted image


def draw_affine(rng: np.random.Generator, config: AugmentationConfig, spacing: tuple[float, ...],
                in_plane: bool) -> np.ndarray | None:
  """Draws flips, rotation and scaling: float64 [3, 3], or None for the identity.

  Rotations are rigid in mm, by `spacing` along slice, row, column. `in_plane`: rows and columns
  only are rotated and scaled, as for runs and anisotropic patches.
  """
  matrix = np.eye(3)
  if rng.random() < config.rotation_probability:
    for axis in (0,) if in_plane else (0, 1, 2):
      angle = np.deg2rad(rng.uniform(-config.rotation, config.rotation))
      turn, rows = np.eye(3), [a for a in range(3) if a != axis]
      turn[np.ix_(rows, rows)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
      matrix = matrix @ turn
  if rng.random() < config.scaling_probability:
    factor = 1 / rng.uniform(*config.scaling)
    matrix = matrix @ np.diag([1.0 if in_plane else factor, factor, factor])
  millimetres = np.asarray(spacing, np.float64)
  matrix = matrix * millimetres[None] / millimetres[:, None]
  for axis in config.flips:
    if rng.random() < 0.5:
      matrix[:, axis] *= -1
  return None if np.array_equal(matrix, np.eye(3)) else matrix


def is_anisotropic(spacing: tuple[float, ...]) -> bool:
  """Whether slices are more than three pixels apart, where nnU-Net rotates in-plane only."""
  return spacing[0] > 3 * min(spacing[1:])


def sample_patch(array: np.ndarray, centre: np.ndarray, size: tuple[int, int, int],
                 matrix: np.ndarray | None, order: int, fill: float) -> np.ndarray:
  """Cuts a patch, [*size] of the array's dtype, out of a volume, reading only what it needs.

  Args:
    array: [D, H, W], may be memory-mapped.
    centre: [3] voxel coordinates of the patch's centre (the middle of voxel i is i).
    matrix: as `draw_affine` gives it; None and pure flips need no interpolation.
    order: 1 linear (images), 0 nearest (labels). fill: outside of the volume.
  """
  half = (np.array(size) - 1) / 2
  matrix = np.eye(3) if matrix is None else matrix
  reach = np.abs(matrix) @ half
  exact = np.array_equal(np.abs(matrix), np.eye(3))
  if exact:  # on whole voxels, so that nothing is interpolated
    low = np.round(centre - half).astype(int)
    high = low + size
  else:
    low, high = np.floor(centre - reach).astype(int), np.ceil(centre + reach).astype(int) + 1
  inner_low = np.clip(low, 0, array.shape)
  inner_high = np.clip(high, inner_low, array.shape)
  block = np.asarray(array[tuple(map(slice, inner_low, inner_high))])
  if exact:
    width = np.stack([inner_low - low, high - inner_high], axis=1)
    block = np.pad(block, width, constant_values=fill)
    return np.ascontiguousarray(block[tuple(slice(None, None, int(s)) for s in np.diag(matrix))])
  if block.size == 0:
    return np.full(size, fill, array.dtype)
  offset = centre - inner_low - matrix @ half
  return ndimage.affine_transform(
    block, matrix, offset, output_shape=size, order=order, mode="grid-constant", cval=fill)


def transform_slices(slices: np.ndarray, matrix: np.ndarray | None, order: int, fill: float,
                     cut: Cut | None = None) -> np.ndarray:
  """Applies the in-plane part of a transform to every slice of [..., H, W] about its centre.

  `matrix` is in pixels of these slices: see `on_grid` for slices of another resolution.
  cut: the part of the slices that is transformed, about its own centre; None: all of it. What is
  turned into it from around is not `fill`.
  """
  plane = np.eye(2) if matrix is None else matrix[1:, 1:]
  if np.array_equal(np.abs(plane), np.eye(2)):
    seen = slices if cut is None else cut.of(slices, fill)
    return seen[..., :: int(plane[0, 0]), :: int(plane[1, 1])]
  cut = whole(slices.shape[-2:]) if cut is None else cut
  half = (np.array(cut.shape) - 1) / 2
  offset = half + (cut.top, cut.left) - plane @ half
  flat = slices.reshape(-1, *slices.shape[-2:])
  out = np.empty((len(flat), *cut.shape), slices.dtype)
  for source, target in zip(flat, out, strict=True):
    ndimage.affine_transform(source, plane, offset, output=target, order=order,
                             mode="grid-constant", cval=fill)
  return out.reshape(*slices.shape[:-2], *cut.shape)


def on_grid(matrix: np.ndarray | None, source: tuple[int, int], target: tuple[int, int]
            ) -> np.ndarray | None:
  """A transform of slices of `source` (H, W) as it acts on the same slices of `target` (H, W)."""
  if matrix is None:
    return None
  scale = np.array([1.0, target[0] / source[0], target[1] / source[1]])
  return matrix * scale[:, None] / scale[None]


def augment_intensity(rng: np.random.Generator, image: np.ndarray, config: AugmentationConfig,
                      in_plane: bool) -> np.ndarray:
  """A copy with noise, blur, brightness, contrast and gamma, in nnU-Net's order.

  Both are float32 [C, D, H, W]; each channel draws for itself. `in_plane`: no blur across slices.
  """
  image = np.array(image, np.float32)
  for channel in image:
    if rng.random() < config.noise_probability:
      sigma = np.sqrt(rng.uniform(0, config.noise))
      channel += np.float32(sigma) * rng.standard_normal(channel.shape, dtype=np.float32)
    if rng.random() < config.blur_probability:
      sigma = rng.uniform(*config.blur)
      # Truncated early: at these widths more taps change nothing that matters and cost time.
      ndimage.gaussian_filter(
        channel, (0 if in_plane else sigma, sigma, sigma), output=channel, truncate=2.5)
    if rng.random() < config.brightness_probability:
      channel *= rng.uniform(*config.brightness)
    if rng.random() < config.contrast_probability:
      low, high, mean = channel.min(), channel.max(), channel.mean()
      channel -= mean
      channel *= rng.uniform(*config.contrast)
      channel += mean
      np.clip(channel, low, high, out=channel)
    for sign, probability in ((-1, config.gamma_inverted_probability),
                              (1, config.gamma_probability)):
      if rng.random() < probability:
        channel[...] = sign * _gamma(sign * channel, rng.uniform(*config.gamma))
  return image


def _gamma(channel: np.ndarray, gamma: float) -> np.ndarray:
  """Power law within the channel's own range; mean and deviation are kept, as in nnU-Net."""
  low, span = channel.min(), np.ptp(channel)
  if span < 1e-6:
    return channel
  mean, deviation = channel.mean(), channel.std()
  changed = np.power((channel - low) / span, np.float32(gamma)) * span
  spread = changed.std()
  return (changed - changed.mean()) * (deviation / max(float(spread), 1e-6)) + mean
