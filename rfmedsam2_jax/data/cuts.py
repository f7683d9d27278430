"""Cuts of slices: what is small in a slice is shown large to a network with a small image.

nnInteractive's AutoZoom (Isensee et al., 2025) in SAM 2's terms: a square in millimetres per
structure. By hand it is found from prompts and taken larger where the mask touches its border; the
stages have it from what the generator found. Features, memories and pointers of a structure stay
within its cut.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rfmedsam2_jax.base.errors import UserError

_GROWTH = 1.5  # of a cut whose border the mask touches
_MOST = 100
_LEAST = 8  # voxels along its shorter side


def check_zoom(factor: float | None) -> None:
  """UserError unless it is None, 0 or a factor that leaves something to see."""
  if factor is not None and factor != 0 and not 1 <= factor <= _MOST:
    raise UserError(f"zoom {factor:g}: give a factor from 1 to {_MOST}, or 0 for whole slices")


class Cut(NamedTuple):
  """A rectangle of a slice, in whole voxels; it may reach beyond the slice."""

  top: int
  left: int
  height: int
  width: int

  @property
  def shape(self) -> tuple[int, int]:
    return self.height, self.width

  def of(self, slices: np.ndarray, fill: float = 0) -> np.ndarray:
    """What it shows of slices [..., H, W]: [..., height, width], `fill` beyond them.

    The slices themselves, and no copy, where it is all of them.
    """
    if self == whole(slices.shape[-2:]):
      return slices
    inside, outside = self._overlap(slices.shape[-2:])
    seen = np.full((*slices.shape[:-2], *self.shape), fill, slices.dtype)
    seen[(..., *inside)] = slices[(..., *outside)]
    return seen

  def put(self, whole: np.ndarray, seen: np.ndarray) -> None:
    """Writes [..., height, width] into slices [..., H, W]."""
    inside, outside = self._overlap(whole.shape[-2:])
    whole[(..., *outside)] = seen[(..., *inside)]

  def holds(self, low: np.ndarray, high: np.ndarray) -> bool:
    """Whether voxels from `low` to `high`, inclusive [2], lie within."""
    corner = np.array([self.top, self.left])
    return bool((low >= corner).all() and (high < corner + self.shape).all())

  def touched_by(self, mask: np.ndarray, shape: tuple[int, int]) -> bool:
    """Whether a mask [..., height, width] reaches a border beyond which slices of `shape` go on."""
    go_on = (self.top > 0, self.top + self.height < shape[0],
             self.left > 0, self.left + self.width < shape[1])
    borders = mask[..., 0, :], mask[..., -1, :], mask[..., 0], mask[..., -1]
    return any(on and bool(border.any()) for on, border in zip(go_on, borders, strict=True))

  def grown(self, spacing: np.ndarray, shape: tuple[int, int]) -> "Cut":
    """A larger one with the same centre, or all of the slice."""
    low = np.array([self.top, self.left])
    return around(low, low + self.shape - 1, _GROWTH, spacing, shape)

  def _overlap(self, shape: tuple[int, ...]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    first = np.array([self.top, self.left])
    low = np.maximum(first, 0)
    high = np.maximum(np.minimum(first + self.shape, shape), low)
    inside, outside = (
      (slice(int(a[0]), int(b[0])), slice(int(a[1]), int(b[1])))
      for a, b in ((low - first, high - first), (low, high)))
    return inside, outside


def whole(shape: tuple[int, int]) -> Cut:
  """All of a slice."""
  return Cut(0, 0, *shape)


def around(
  low: np.ndarray, high: np.ndarray, factor: float, spacing: np.ndarray, shape: tuple[int, int]
) -> Cut:
  """A square of millimetres around voxels `low` to `high`, inclusive [2], `factor` times as large.

  All of the slice where that is no larger. spacing: mm [2], of rows and columns.
  """
  side = max(factor * float(((high - low + 1) * spacing).max()), _LEAST * float(spacing.min()))
  size = np.maximum(np.ceil(side / spacing), 1).astype(int)
  if (size >= shape).all():
    return whole(shape)
  top, left = np.rint((low + high + 1 - size) / 2).astype(int).tolist()
  return Cut(top, left, *size.tolist())


def around_points(
  share: float, low: np.ndarray, high: np.ndarray, spacing: np.ndarray, shape: tuple[int, int]
) -> Cut:
  """A cut around points alone: `share` of the slice's shorter side, or what holds them all."""
  side = share * float((np.array(shape) * spacing).min())
  extent = float(((high - low + 1) * spacing).max())
  return around(low, high, max(side, 1.5 * extent) / extent, spacing, shape)


def bounds(masks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
  """First and last rows and columns, [2] each, of masks [H, W]; None where all are empty."""
  any_of = np.logical_or.reduce(masks)
  if not any_of.any():
    return None
  places = np.argwhere(any_of)
  return places.min(axis=0), places.max(axis=0)
