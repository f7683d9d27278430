"""What of a label map is wanted: chosen structures, and of each the pieces that are large enough.

In: a label map as it was fused, canonical, and what a person asked for. Out: one with the rest
gone. Needs no JAX.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.kept import near
from rfmedsam2_jax.data.datasets import Labels

Box = tuple[slice, slice, slice]

# A voxel and the 26 around it: a piece hangs together by faces, edges or corners.
TOUCHING = np.ones((3, 3, 3), bool)
_ROUNDING = 1e-6  # of a piece's volume, whose voxel sizes have six digits


@dataclasses.dataclass(frozen=True)
class Choice:
  """organs: numbers of the structures that are kept, in the plan's order; None keeps all.
  min_volume: ml; a piece that is smaller goes."""

  organs: tuple[int, ...] | None = None
  min_volume: float = 0.0

  def of(self, labels: Labels) -> tuple[int, ...]:
    """Numbers of the structures that are kept."""
    return tuple(range(len(labels.structures))) if self.organs is None else self.organs


@dataclasses.dataclass(frozen=True)
class Removed:
  """Of one structure, what was too small."""

  pieces: int = 0
  voxels: int = 0


def make_choice(
  labels: Labels, structures: Sequence[str] | None, min_volume: float,
  said: tuple[str, str] = ("structures", "min_volume"),
) -> Choice:
  """A choice by names; UserError for unknown ones, none, and what is no volume.

  said: how a person calls the two, for errors.
  """
  if isinstance(structures, str):  # a sequence of letters otherwise
    structures = [structures]
  for name in () if structures is None else structures:
    if name not in labels.names:
      close = near(name, labels.names)
      close = f"the nearest known one is {close}; " if close else ""
      raise UserError(f"{said[0]} {name}: is no structure of this model; {close}"
                      f"choose from {', '.join(labels.names)}")
  if structures is not None and not structures:
    raise UserError(f"{said[0]}: names none; choose from {', '.join(labels.names)}")
  try:
    least = float(min_volume)
  except (TypeError, ValueError):
    least = math.nan
  if not 0 <= least < math.inf:
    raise UserError(f"{said[1]} {min_volume}: is no volume; give a number of ml, 0 or more")
  organs = None if structures is None else tuple(sorted(map(labels.names.index, set(structures))))
  return Choice(organs, least)


def value_names(labels: Labels, choice: Choice) -> dict[int, str]:
  """What the values of a label map of chosen structures are called, in the plan's order."""
  return {labels.output_values[organ]: labels.names[organ] for organ in choice.of(labels)}


def owned_values(labels: Labels) -> list[tuple[int, ...]]:
  """Of every structure, the values of its voxels in a written label map; regions may share them."""
  return ([structure.values for structure in labels.structures] if labels.regions
          else [(value,) for value in labels.output_values])


def boxes_of(found: np.ndarray, owned: Sequence[tuple[int, ...]]) -> list[Box | None]:
  """The tight box of every structure in a label map [D, H, W]; None where it has no voxel."""
  by_value = dict(enumerate(ndimage.find_objects(found), 1))
  return [_around([box for value in values if (box := by_value.get(value)) is not None])
          for values in owned]


def _around(boxes: Sequence[Box]) -> Box | None:
  """The smallest box that holds them all."""
  if not boxes:
    return None
  a, b, c = (slice(min(side.start for side in sides), max(side.stop for side in sides))
             for sides in zip(*boxes, strict=True))
  return a, b, c


def with_structures(found: np.ndarray, labels: Labels, choice: Choice) -> np.ndarray:
  """A label map of chosen structures alone, each voxel as in the whole one.

  A voxel of a region that is not chosen shows the last chosen one that it lies in.
  """
  return found if choice.organs is None else _shown(labels, choice.organs, found.dtype)[found]


def without_small(
  found: np.ndarray, labels: Labels, choice: Choice, voxel_ml: float
) -> tuple[np.ndarray, list[Removed]]:
  """A label map of chosen structures without pieces that are too small, and what went of each.

  Where a piece goes is background, or the region around it. Regions are looked at from the last
  to the first, as their pieces lie on top of each other. What went is by number of the structure.
  """
  owned, organs = owned_values(labels), choice.of(labels)
  removed = [Removed()] * len(owned)
  if choice.min_volume == 0:
    return found, removed
  found, boxes = found.copy(), boxes_of(found, owned)
  limit = choice.min_volume * (1 - _ROUNDING)
  for organ in reversed(organs):
    if (box := boxes[organ]) is None:
      continue
    here = found[box]
    pieces, _ = ndimage.label(np.isin(here, owned[organ]), TOUCHING)
    sizes = np.bincount(pieces.ravel())
    small = sizes * voxel_ml < limit
    small[0] = False
    if small.any():
      removed[organ] = Removed(int(small.sum()), int(sizes[small].sum()))
      gone = small[pieces]
      around = [other for other in organs if labels.output_values[other] not in owned[organ]]
      here[gone] = _shown(labels, around, found.dtype)[here[gone]]
  return found, removed


def _shown(labels: Labels, organs: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """By value of a label map, that of the last of some structures which it belongs to, or 0."""
  table, owned = np.zeros(max(labels.output_values) + 1, dtype), owned_values(labels)
  for organ in organs:
    table[[value for value in owned[organ] if value < len(table)]] = labels.output_values[organ]
  for organ in organs:  # what says so itself
    table[labels.output_values[organ]] = labels.output_values[organ]
  return table
