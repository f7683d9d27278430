"""Volumes on the plan's grid with normalised intensities, the way back, and the store of both."""

import dataclasses
import math
import operator
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.ndimage

from rfmedsam2_jax.base import buckets
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data import resampling
from rfmedsam2_jax.data.datasets import Labels
from rfmedsam2_jax.data.files import Stored, load_json, replacing, save_json
from rfmedsam2_jax.data.fingerprint import draw_places, nonzero_box
from rfmedsam2_jax.data.plan import ANISOTROPY, ChannelRule, Plan, Triple
from rfmedsam2_jax.data.resampling import antialiased_matrix, apply_separable, nearest_matrix
from rfmedsam2_jax.data.volumes import Volume

# A volume longer than this (mm) has a wrong header; so has one that is resampled to more than
# _LARGEST voxels and more than _FINER times its own.
_LONGEST, _LARGEST, _FINER = 10_000.0, 512**3, 64

LOCATIONS = 2000  # places kept per structure, from which patches with foreground are drawn

# An axis that loses more than this is averaged (triangle) instead of sampled by a spline, which
# would alias. nnU-Net never averages, but its target is the median spacing; ours can be set.
_AVERAGED = 1.5


@dataclasses.dataclass(frozen=True)
class Restore(Stored):
  """The way from a prepared grid back to the canonical native grid (z, y, x)."""

  native_shape: Triple  #: voxels, canonical
  native_spacing: tuple[float, float, float]  #: mm, canonical
  lower: Triple  #: first index of the crop, canonical
  upper: Triple  #: index behind the last of the crop, canonical
  order: Triple  #: the canonical axis along each prepared axis
  prepared_shape: Triple  #: voxels, prepared order

  @property
  def crop_shape(self) -> Triple:
    """Native voxels of the crop, prepared order."""
    a, b, c = (self.upper[axis] - self.lower[axis] for axis in self.order)
    return a, b, c

  @property
  def spacing(self) -> tuple[float, float, float]:
    """Exact mm, prepared order; the plan's, up to the rounding to whole voxels."""
    a, b, c = (size * self.native_spacing[axis] / count for size, axis, count
               in zip(self.crop_shape, self.order, self.prepared_shape, strict=True))
    return a, b, c

  def to_native(self, array: np.ndarray, fill: float, rows: slice | None = None) -> np.ndarray:
    """A map of the crop on the native grid by linear interpolation, float32 canonical [D, H, W].

    Args:
      array: real [d, h, w], prepared order, covers the crop's field of view at any resolution.
      fill: value outside the crop.
      rows: of canonical z, D many; only these are computed, which bounds the memory. None: all.
    """
    depth = self.native_shape[0]
    first, behind, step = (slice(None) if rows is None else rows).indices(depth)
    if step != 1:
      raise ValueError("rows must be consecutive")
    behind = max(first, behind)
    inner = slice(max(first, self.lower[0]), max(min(behind, self.upper[0]), self.lower[0], first))
    if inner == slice(0, depth) and (self.lower, self.upper) == ((0, 0, 0), self.native_shape):
      return np.ascontiguousarray(self._interpolate(array, inner))
    result = np.full((behind - first, *self.native_shape[1:]), fill, np.float32)
    if inner.stop > inner.start:
      result[inner.start - first:inner.stop - first, self.lower[1]:self.upper[1],
             self.lower[2]:self.upper[2]] = self._interpolate(array, inner)
    return result

  def native_to_prepared(self, points: np.ndarray) -> np.ndarray:
    """Real [..., 3], canonical native (z, y, x), whole at voxel centres, to prepared (d, h, w)."""
    scale = np.array(self.prepared_shape) / np.array(self.crop_shape)
    moved = (np.asarray(points, np.float64) - self.lower)[..., self.order]
    return (moved + 0.5) * scale - 0.5

  def prepared_to_native(self, points: np.ndarray) -> np.ndarray:
    """The inverse of `native_to_prepared`."""
    scale = np.array(self.crop_shape) / np.array(self.prepared_shape)
    moved = (np.asarray(points, np.float64) + 0.5) * scale - 0.5
    return moved[..., np.argsort(self.order)] + np.array(self.lower)

  def _interpolate(self, array: np.ndarray, rows: slice) -> np.ndarray:
    """The crop's part of these rows, canonical order."""
    kept = slice(rows.start - self.lower[0], rows.stop - self.lower[0])
    matrices = [None if n_in == n_out else resampling.linear_matrix(n_in, n_out)
                for n_in, n_out in zip(array.shape, self.crop_shape, strict=True)]
    z = self.order.index(0)
    along_z = matrices[z]
    if along_z is None:
      array = array[(slice(None),) * z + (kept,)]
    else:
      matrices[z] = along_z[kept]
    return apply_separable(array, matrices).transpose(np.argsort(self.order))


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """A volume on the plan's grid."""

  image: np.ndarray  #: float32 [C, D, H, W], normalised, slice axis first
  #: float32 [C, 2], the normalised intensities that are 0 and 1 for SAM 2: the clip of CT; else the
  #: case's 0.5 and 99.5 percentiles of voxels that are not 0.
  window: np.ndarray
  restore: Restore  #: the way back

  @property
  def spacing(self) -> tuple[float, float, float]:
    """mm, prepared order."""
    return self.restore.spacing


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedCase(Prepared):
  """A stored case; the arrays are memory-mapped and read-only."""

  identifier: str
  atoms: np.ndarray | None  #: uint8 [D, H, W], or None if the case has no label
  #: Per structure, int32 [n <= LOCATIONS, 3], voxels (d, h, w) that belong to it.
  locations: tuple[np.ndarray, ...]


def preprocess(volume: Volume, plan: Plan) -> Prepared:
  """Crops, normalises and resamples, in nnU-Net's order; UserError for other channels, sizes."""
  if len(volume.array) != len(plan.channels):
    raise UserError(f"{volume.geometry.path}: has {len(volume.array)} channels where the plan has "
                    f"{len(plan.channels)}; give images of the kind that was trained on")
  depth, height, width = volume.array.shape[1:]
  lower, upper = (nonzero_box(volume.array) if plan.crops_to_nonzero
                  else ((0, 0, 0), (depth, height, width)))
  cropped = volume.array[(slice(None), *map(slice, lower, upper))]
  inside = (scipy.ndimage.binary_fill_holes((cropped != 0).any(axis=0))
            if any(rule.masked for rule in plan.channels) else None)
  order = plan.order
  spacing = [volume.spacing[axis] for axis in order]
  shape = tuple(cropped.shape[1 + axis] for axis in order)
  a, b, c = map(lambda n, old, new: max(1, round(n * old / new)), shape, spacing, plan.spacing)
  target = a, b, c
  _check_size(volume, spacing, shape, target)
  apart = _separate_axis(spacing, plan.spacing)
  matrices = [_image_matrix(n_in, n_out, axis == apart)
              for axis, (n_in, n_out) in enumerate(zip(shape, target, strict=True))]
  image = np.empty((len(cropped), *target), np.float32)
  window = np.empty((len(cropped), 2), np.float32)
  for index, rule in enumerate(plan.channels):
    normalised, window[index] = _normalise(cropped[index], rule, inside)
    moved = np.ascontiguousarray(normalised.transpose(order))
    image[index] = apply_separable(moved, matrices)
    if target != shape:  # a spline overshoots at edges
      np.clip(image[index], moved.min(), moved.max(), out=image[index])
  restore = Restore((depth, height, width), volume.spacing, lower, upper, order, target)
  return Prepared(image, window, restore)


def _check_size(volume: Volume, spacing: list[float], shape: tuple[int, ...], target: Triple
                ) -> None:
  """UserError where a wrong header makes a volume too large to be real, or to be resampled."""
  length, voxels = max(map(operator.mul, shape, spacing)), math.prod(target)
  if length > _LONGEST or voxels > max(_LARGEST, _FINER * math.prod(shape)):
    sizes = " x ".join(f"{size:g}" for size in spacing)
    raise UserError(f"{volume.geometry.path}: has voxels of {sizes} mm and a length of "
                    f"{length:.3g} mm, which are {float(voxels):.3g} voxels at the plan's spacing; "
                    "correct the spacing in its header")


def prepare_atoms(atoms: np.ndarray, plan: Plan, restore: Restore) -> np.ndarray:
  """Atoms on the prepared grid, uint8 [d, h, w]: the one with the largest share of each new voxel.

  From uint8 [D, H, W], canonical native grid (`Labels.to_atoms`); `restore` is the image's.
  """
  if atoms.shape != restore.native_shape:
    raise ValueError(f"atoms have shape {atoms.shape}, the image {restore.native_shape}")
  cropped = atoms[tuple(map(slice, restore.lower, restore.upper))]
  moved = np.ascontiguousarray(cropped.transpose(restore.order))
  shape, target = restore.crop_shape, restore.prepared_shape
  if shape == target:
    return moved
  apart = _separate_axis([restore.native_spacing[axis] for axis in restore.order], plan.spacing)
  matrices = [(nearest_matrix if axis == apart else antialiased_matrix)(n_in, n_out)
              for axis, (n_in, n_out) in enumerate(zip(shape, target, strict=True))]
  result = np.zeros(target, np.uint8)
  best, total = np.zeros((2, *target), np.float32)
  # A structure fills a small part of a volume: only its box is computed, and the background,
  # whose box is all, is what the others leave.
  for atom, box in enumerate(scipy.ndimage.find_objects(moved), 1):
    if box is not None:
      reach = tuple(resampling.support(matrix, 1, chosen)
                    for matrix, chosen in zip(matrices, box, strict=True))
      share = apply_separable(moved[box] == atom, [
        matrix[rows, columns] for matrix, rows, columns in zip(matrices, reach, box, strict=True)])
      result[reach][share > best[reach]] = atom
      best[reach] = np.maximum(best[reach], share)
      total[reach] += share
  result[1 - total >= best] = 0
  return result


def save_case(folder: str | Path, identifier: str, prepared: Prepared, atoms: np.ndarray | None,
              labels: Labels, seed: int = 0) -> None:
  """Stores a prepared case; its .json comes last, so a case that has one is complete.

  `atoms` are from `prepare_atoms`; `seed` is of the locations, every case draws its own.
  """
  folder = Path(folder)
  locations = [np.zeros((0, 3), np.int32)] * len(labels.structures)
  arrays = {"image": prepared.image}
  if atoms is not None:
    rng = np.random.default_rng([seed, zlib.crc32(identifier.encode())])
    locations = [_draw_locations(atoms, members, rng) for members in labels.membership.T]
    arrays["atoms"] = atoms
  arrays["locations"] = np.concatenate(locations)
  for name, array in arrays.items():
    with replacing(folder / f"{identifier}_{name}.npy") as temporary:
      np.save(temporary, array)
  save_json(folder / f"{identifier}.json", _CaseRecord(
    prepared.restore, tuple((float(low), float(high)) for low, high in prepared.window),
    tuple(map(len, locations)), atoms is not None))


def load_case(folder: str | Path, identifier: str) -> PreparedCase:
  """Opens a stored case without reading its arrays; UserError if it is not there or readable."""
  folder, advice = Path(folder), "preprocess the data set again"
  record = load_json(folder / f"{identifier}.json", _CaseRecord)
  places = open_array(folder / f"{identifier}_locations.npy", None, advice)
  image = open_array(folder / f"{identifier}_image.npy", "r", advice)
  atoms = open_array(folder / f"{identifier}_atoms.npy", "r", advice) if record.labelled else None
  return PreparedCase(image, np.array(record.window, np.float32), record.restore, identifier, atoms,
                      tuple(np.split(places, np.cumsum(record.location_counts)[:-1])))


def stored_cases(folder: str | Path) -> list[str]:
  """Identifiers of the complete cases of a folder, in alphabetical order."""
  return sorted(name.removesuffix(".json") for name in buckets.names(Path(folder))
                if name.endswith(".json") and not name.startswith("."))


@dataclasses.dataclass(frozen=True)
class _CaseRecord(Stored):
  """What a case's .json holds beside the arrays."""

  restore: Restore
  window: tuple[tuple[float, float], ...]
  location_counts: tuple[int, ...]
  labelled: bool


def _normalise(image: np.ndarray, rule: ChannelRule, inside: np.ndarray | None
               ) -> tuple[np.ndarray, tuple[float, float]]:
  """One channel [z, y, x] normalised, and its window."""
  if rule.kind == "ct":
    low, high, mean, std = rule.lower, rule.upper, rule.mean, rule.std
    normalised = (np.clip(image, low, high) - np.float32(mean)) / np.float32(std)
  else:
    chosen = image[inside] if rule.masked and inside is not None else image
    mean = float(chosen.mean(dtype=np.float64))
    std = max(float(chosen.std(dtype=np.float64)), 1e-8)
    normalised = (image - np.float32(mean)) / np.float32(std)
    if rule.masked and inside is not None:
      normalised[~inside] = 0
    nonzero = image[image != 0]
    low, high = np.percentile(nonzero, (0.5, 99.5)) if nonzero.size else (0.0, 0.0)
  window = (float((low - mean) / std), float((high - mean) / std))
  # A constant image has no range; any width will do as long as nothing is divided by 0.
  return normalised, window if window[1] > window[0] else (window[0], window[0] + 1)


def _separate_axis(spacing: list[float], target: tuple[float, float, float]) -> int | None:
  """The axis so coarse, now or in the plan, that values must not mix along it (nnU-Net)."""
  for sizes in (np.array(spacing), np.array(target)):
    if sizes.max() > ANISOTROPY * sizes.min():
      coarsest = np.flatnonzero(sizes == sizes.max())
      return int(coarsest[0]) if len(coarsest) == 1 else None
  return None


def _image_matrix(n_in: int, n_out: int, apart: bool) -> np.ndarray | None:
  if n_in == n_out:
    return None
  if n_in > _AVERAGED * n_out:
    return antialiased_matrix(n_in, n_out)
  return (nearest_matrix if apart else resampling.spline_matrix)(n_in, n_out)


def _draw_locations(atoms: np.ndarray, members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """int32 [n, 3]: up to LOCATIONS voxels whose atom is a member."""
  table = np.zeros(256, bool)
  table[:len(members)] = members
  places = draw_places(table[atoms], LOCATIONS, rng)
  return np.stack(np.unravel_index(places, atoms.shape), axis=1).astype(np.int32)


def open_array(path: Path, mode: Literal["r"] | None, advice: str) -> np.ndarray:
  """A stored array, memory-mapped with mode "r"; UserError, which ends with `advice`."""
  try:
    return np.load(buckets.fetched(path, once=True), mmap_mode=mode)
  except (OSError, ValueError, EOFError) as error:
    raise UserError(f"{path}: cannot be read ({error}); {advice}") from None
