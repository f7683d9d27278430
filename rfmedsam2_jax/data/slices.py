"""Slices of a series, each with its own place and axes, as one grid; or why they are none.

In: where each file says that its pixels lie. Out: their order, how each is turned, and one affine.
Coordinates are DICOM's: LPS+, mm.
"""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.grids import GRID_TOLERANCE, TILT_TOLERANCE

# What two distances of neighbours may differ in, as a part of the usual one. Rounded positions stay
# below, a missing slice far above.
SPACING_TOLERANCE = 0.05
_TURNED = 1.0  # degrees, of which no rounding speaks
_SAME_PLACE = 0.01  # pixels between slices that do not differ in place
_MEND = "give a folder with one volume, or convert it to NIfTI, for example by dcm2niix"


@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
  """One file of a series.

  Attributes:
    shape: pixels along i (columns) and j (rows).
    origin: float64 [3], the centre of pixel (0, 0).
    steps: float64 [3, 2], from a pixel to the next along i and along j, at right angles.
    transposed, flipped: what is to be done with the stored pixels, in this order.
    header: pydicom's data set without pixels.
  """

  path: Path
  shape: tuple[int, int]
  origin: np.ndarray
  steps: np.ndarray
  transposed: bool = False
  flipped: tuple[bool, bool] = (False, False)
  header: Any = None

  def turn(self, pixels: np.ndarray) -> np.ndarray:
    """[j, i] as they are stored, as [i, j] of the grid."""
    ours = pixels if self.transposed else pixels.T
    return ours[tuple(slice(None, None, -1 if flip else 1) for flip in self.flipped)]


def stack(folder: Path, slices: Sequence[Slice]) -> tuple[list[Slice], np.ndarray]:
  """Slices in the order of their places, and the affine, float64 [4, 4], of (i, j, k) of the grid.

  What is stored otherwise (rows upwards, columns and rows exchanged, seen from the other side) and
  lies on the grid is turned. UserError, with the first file that differs from most, if pixels,
  sizes, directions or places make no grid; for a tilted gantry.
  """
  most = _usual(slices)
  normal = np.cross(*(most.steps / _lengths(most)).T)
  placed = sorted((_aligned(one, most) for one in slices), key=lambda one: one.origin @ normal)
  for one in placed:
    _check_plane(one, most)
  places = np.array([one.origin for one in placed])
  distance = _distance(folder, placed, places @ normal, _lengths(most).min())
  _check_column(folder, placed, places @ (most.steps / _lengths(most)), distance,
                _lengths(most).min())
  affine = np.eye(4)
  affine[:3] = np.column_stack([placed[0].steps, normal * distance, placed[0].origin])
  return placed, affine


def _lengths(one: Slice) -> np.ndarray:
  return np.linalg.norm(one.steps, axis=0)


def _usual(slices: Sequence[Slice]) -> Slice:
  """The first one of those of which there are most, by pixels, sizes and directions."""
  def kind(one: Slice) -> tuple:
    return one.shape, *np.round(one.steps, 2).ravel().tolist()

  most = collections.Counter(map(kind, slices)).most_common(1)[0][0]
  return next(one for one in slices if kind(one) == most)


def _aligned(one: Slice, like: Slice) -> Slice:
  """With the axes of `like`, as far as exchanging and reversing its own gets there."""
  cosines = np.abs((like.steps / _lengths(like)).T @ (one.steps / _lengths(one)))
  transposed = bool(cosines[0, 1] + cosines[1, 0] > np.trace(cosines))
  order = [1, 0] if transposed else [0, 1]
  steps, shape = one.steps[:, order], (one.shape[order[0]], one.shape[order[1]])
  flip = (steps * like.steps).sum(axis=0) < 0
  origin = one.origin + steps @ (flip * (np.array(shape) - 1))
  return Slice(one.path, shape, origin, np.where(flip, -steps, steps), transposed,
               (bool(flip[0]), bool(flip[1])), one.header)


def _check_plane(one: Slice, like: Slice) -> None:
  """UserError unless an aligned slice has the pixels of `like`, wherever it lies."""
  cosines = (one.steps * like.steps).sum(axis=0) / (_lengths(one) * _lengths(like))
  degrees = np.degrees(np.arccos(np.clip(cosines, -1, 1))).max()
  turned = (f"{one.path}: is turned by {degrees:.3g} degrees against {like.path.name}, as the "
            f"slices of a localizer are; {_MEND}")
  if degrees > _TURNED:
    raise UserError(turned)
  if one.shape != like.shape:
    raise UserError(f"{one.path}: has {_product(one.shape)} pixels, {like.path.name} has "
                    f"{_product(like.shape)}; {_MEND}")
  apart = np.linalg.norm(one.steps - like.steps, axis=0) * (np.array(like.shape) - 1)
  if apart.max() <= GRID_TOLERANCE * _lengths(like).min():
    return
  longer = np.abs(_lengths(one) - _lengths(like)) * (np.array(like.shape) - 1)
  if 2 * longer.max() > apart.max():
    raise UserError(f"{one.path}: its pixels are {_product(_lengths(one))} mm, those of "
                    f"{like.path.name} {_product(_lengths(like))} mm; {_MEND}")
  raise UserError(turned)


def _product(numbers: Sequence[float] | np.ndarray) -> str:
  return " x ".join(f"{number:.5g}" for number in numbers)


def _distance(folder: Path, placed: Sequence[Slice], depths: np.ndarray, pixel: float) -> float:
  """Between neighbours, in mm; UserError if some are missing, doubled or unevenly spaced."""
  gaps = np.diff(depths)
  for gap, one, following in zip(gaps, placed[:-1], placed[1:], strict=True):
    if gap < _SAME_PLACE * pixel:
      raise UserError(f"{following.path}: has the same position as {one.path.name} (a copy, "
                      f"another phase or echo?); {_MEND}")
  usual = float(np.median(gaps))
  for gap, one, following in zip(gaps, placed[:-1], placed[1:], strict=True):
    if abs(gap / usual - 1) > SPACING_TOLERANCE:
      raise UserError(f"{folder}: {one.path.name} and {following.path.name} are {gap:.4g} mm "
                      f"apart, others {usual:.4g} mm; add what is missing or resample it")
  return float(depths[-1] - depths[0]) / len(gaps)


def _check_column(folder: Path, placed: Sequence[Slice], across: np.ndarray, distance: float,
                  pixel: float) -> None:
  """UserError unless slices lie above each other.

  Args:
    across: mm [n, 2], where they lie along their own axes.
  """
  step = np.median(np.diff(across, axis=0), axis=0)  # of a tilted gantry it is not zero
  straight = across - np.arange(len(across))[:, None] * step
  usual = int(np.abs(straight[:, None] - straight).sum(axis=(1, 2)).argmin())
  beside = np.linalg.norm(straight - straight[usual], axis=1)
  if len(odd := np.flatnonzero(beside > GRID_TOLERANCE * pixel)):
    first = int(odd[0])
    raise UserError(f"{placed[first].path}: lies {beside[first]:.4g} mm beside "
                    f"{placed[usual].path.name}, in its plane; {_MEND}")
  tilt = float(np.degrees(np.arctan2(np.linalg.norm(step), distance)))
  if tilt > TILT_TOLERANCE:
    raise UserError(f"{folder}: its slices are tilted by {tilt:.1f} degrees against their stack "
                    "(gantry tilt); correct it, for example by dcm2niix")
