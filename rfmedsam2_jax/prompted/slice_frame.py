"""A person's prompts: from files, and from voxels to slices and coordinates of SAM 2's square.

Needs no network, so that what contradicts itself is found before one is loaded.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.cuts import Cut, bounds, whole
from rfmedsam2_jax.data.plan import PLANES
from rfmedsam2_jax.data.prompt_entries import read_entries
from rfmedsam2_jax.data.sam_slices import resize_linear
from rfmedsam2_jax.data.segments import load_masks
from rfmedsam2_jax.data.volumes import Geometry, Volume
from rfmedsam2_jax.nn.boxes import boxes_to_square
from rfmedsam2_jax.tracking import SlicePrompt

Plane = Literal["axial", "coronal", "sagittal"]


@dataclasses.dataclass(frozen=True)
class VoxelPrompt:
  """What a person says of one structure, in voxels of the canonical volume.

  Attributes:
    label: value of the structure in the label map, above 0.
    box: two corners (z, y, x), on one slice, both inclusive; or None.
    points: (z, y, x, inside) each, on one slice.
    mask: bool [D, H, W] with labels on the slices that count; or None. Excludes the others.
    round: 0 for the first prompts; later rounds correct what was found before them, or begin a
      structure.
    source: what is named if something is wrong with it.
    name: of the structure, where a file says it; else "".
  """

  label: int
  box: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
  points: tuple[tuple[float, float, float, bool], ...] = ()
  mask: np.ndarray | None = None
  round: int = 0
  source: str = "prompt"
  name: str = ""


def read_prompts(path: str | Path, geometry: Geometry, world: bool = False) -> list[VoxelPrompt]:
  """Boxes and points of a JSON file, see data.prompt_entries.

  Args:
    geometry: of the image. world: coordinates are millimetres, RAS+ as in the file's affine.
  """
  result = []
  for entry in read_entries(path):
    corners = geometry.canonical_points(entry.box, world).tolist()
    places = geometry.canonical_points(entry.points, world).tolist()
    box = (tuple(corners[0]), tuple(corners[1])) if corners else None
    points = tuple((z, y, x, yes) for (z, y, x), yes in zip(places, entry.inside, strict=True))
    result.append(VoxelPrompt(int(entry.structure), box, points, None, entry.round, entry.source))
  return result


def read_masks(path: str | Path, geometry: Geometry) -> list[VoxelPrompt]:
  """A label map on the image's grid; on the slices that have labels, these are the masks.

  Raises:
    UserError: unreadable, on another grid, empty, with negative values, or with segments that
      share a value.
  """
  found = [VoxelPrompt(value, mask=mask, source=str(path), name=name)
           for value, name, mask in load_masks(path, geometry)]
  if not found:
    raise UserError(f"{path}: has no label; draw at least one slice")
  return found


def names_of(prompts: Sequence[VoxelPrompt]) -> dict[int, str]:
  """What prompts call the structures, by label; UserError if two contradict each other."""
  first: dict[int | str, VoxelPrompt] = {}
  for prompt in (p for p in prompts if p.name):
    for key in (prompt.label, prompt.name):
      other = first.setdefault(key, prompt)
      if (other.label, other.name) != (prompt.label, prompt.name):
        raise UserError(f"{prompt.source}: calls label {prompt.label} '{prompt.name}', but "
                        f"{other.source} calls label {other.label} '{other.name}'; give each "
                        "structure one label and one name")
  return {prompt.label: prompt.name for prompt in first.values()}


class SliceFrame:
  """The slices of a volume along a plane, or a cut of all of them, squashed to squares of `side`
  pixels."""

  def __init__(self, volume: Volume, plane: Plane, side: int, cut: Cut | None = None):
    self._axis, self._plane, self._side = PLANES[plane], plane, side
    self._name = volume.geometry.path.name
    self._order = [self._axis, *(a for a in range(3) if a != self._axis)]
    self._shape = tuple(volume.array.shape[1 + a] for a in self._order)
    self.shape = self._shape[1], self._shape[2]
    self.spacing = np.array([volume.spacing[a] for a in self._order[1:]])  # mm, rows and columns
    self.cut = whole(self.shape) if cut is None else cut

  def rounds(
    self, prompts: Sequence[VoxelPrompt]
  ) -> tuple[tuple[int, ...], list[list[SlicePrompt]]]:
    """The structures that prompts name, in the order in which they begin, and each round's prompts.

    Raises:
      UserError: no prompts, or one that is outside the volume, spans slices, or contradicts
        another.
    """
    if not prompts:
      raise UserError("no prompt: give a box, points or a mask of a structure")
    # A structure that is prompted later must not change the place of another.
    first = sorted(prompts, key=lambda p: (p.round, p.label))
    structures = tuple(dict.fromkeys(p.label for p in first))
    for label in structures:
      if not 1 <= label <= 65535:
        raise UserError(f"label {label}: is no label value; use 1 to 65535")
    return structures, [self.place([p for p in prompts if p.round == number], structures)
                        for number in sorted({p.round for p in prompts})]

  def bounds(self, prompts: Sequence[VoxelPrompt]) -> tuple[np.ndarray, np.ndarray]:
    """The first and last row and column, [2] each, that prompts speak of."""
    corners: list[np.ndarray] = []
    for prompt in prompts:
      if prompt.mask is not None:
        corners += bounds([np.logical_or.reduce(prompt.mask, axis=self._axis)]) or ()
      else:
        given = np.array([*(prompt.box or ()), *(p[:3] for p in prompt.points)], float)
        corners += list(np.rint(given[:, self._order[1:]]))
    inside = np.clip(corners, 0, np.array(self.shape) - 1).astype(int)
    return inside.min(axis=0), inside.max(axis=0)

  def place(self, prompts: Sequence[VoxelPrompt], structures: tuple[int, ...]) -> list[SlicePrompt]:
    """One prompt per structure and slice: those of the same slice join. UserError as `rounds`."""
    found: dict[tuple[int, int], SlicePrompt] = {}
    for prompt in prompts:
      for one in self._placed(structures.index(prompt.label), prompt):
        key = one.track, one.slice
        found[key] = _joined(found[key], one, prompt.source) if key in found else one
    return [found[key] for key in sorted(found)]

  def _placed(self, track: int, prompt: VoxelPrompt) -> list[SlicePrompt]:
    if prompt.mask is not None:
      across = np.moveaxis(prompt.mask, self._axis, 0)
      numbers = np.flatnonzero(across.any(axis=(1, 2)))
      # As the official predictor brings masks to its side.
      masks = resize_linear(self.cut.of(across[numbers].astype(np.float32)), self._side) >= 0.5
      return [SlicePrompt(track, int(z), mask=one) for z, one in zip(numbers, masks, strict=True)]
    rows = np.array([*(prompt.box or ()), *(p[:3] for p in prompt.points)], float)
    if not len(rows) or not np.isfinite(rows).all():
      raise UserError(f"{prompt.source}: has no coordinates; give a box or points")
    rows = rows[:, self._order]
    depth, height, width = self._shape
    if (rows < -0.5).any() or (rows > np.array(self._shape) - 0.5).any():
      raise UserError(f"{prompt.source}: lies outside of {self._name} ({depth} {self._plane} "
                      f"slices of {height} x {width} voxels); correct its coordinates")
    slices = np.unique(np.clip(np.rint(rows[:, 0]).astype(int), 0, depth - 1))
    if len(slices) > 1:
      raise UserError(f"{prompt.source}: spans {self._plane} slices {slices[0]} to {slices[-1]}; "
                      "give one prompt per slice")
    box, xy = None, rows[:, 2:0:-1]
    cut = self.cut
    corner, size = np.array([cut.left, cut.top]), np.array([cut.width, cut.height])
    if prompt.box is not None:
      # Whole voxels: those that the corners lie in.
      corners, xy = np.clip(np.rint(xy[:2]), 0, [width - 1, height - 1]), xy[2:]
      corners = np.concatenate([corners.min(axis=0) - corner, corners.max(axis=0) - corner])
      x0, y0, x1, y1 = boxes_to_square(corners, *cut.shape, self._side).tolist()
      box = x0, y0, x1, y1
    xy = (xy - corner) * (self._side / size)
    labels = np.array([p[3] for p in prompt.points], np.int32)
    return [SlicePrompt(track, int(slices[0]), xy.astype(np.float32), labels, box)]


def _joined(one: SlicePrompt, other: SlicePrompt, source: str) -> SlicePrompt:
  masks = one.mask is not None or other.mask is not None
  if masks or (one.box is not None and other.box is not None):
    what = "a mask besides another prompt" if masks else "two boxes"
    raise UserError(f"{source}: gives {what} for one structure on slice {one.slice}; keep one")
  return dataclasses.replace(
    one, points=np.concatenate([one.points, other.points]),
    labels=np.concatenate([one.labels, other.labels]), box=one.box or other.box,
  )
