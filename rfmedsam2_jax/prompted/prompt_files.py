"""`VoxelPrompt`s from a person's files: JSON of boxes and points, a sparse label map."""

from pathlib import Path

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.prompt_entries import read_entries
from rfmedsam2_jax.data.volumes import Geometry, load_label_map
from rfmedsam2_jax.prompted.slice_frame import VoxelPrompt


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
    label, number = int(entry.structure), entry.round
    result.append(VoxelPrompt(label, box, points, round=number, source=entry.source))
  return result


def read_masks(path: str | Path, geometry: Geometry) -> list[VoxelPrompt]:
  """A label map on the image's grid; on the slices that have labels, these are the masks.

  Raises:
    UserError: unreadable, on another grid, empty, or with negative values.
  """
  labels = load_label_map(path, geometry)
  values = [int(v) for v in np.unique(labels) if v]
  if not values:
    raise UserError(f"{path}: has no label; draw at least one slice")
  return [VoxelPrompt(v, mask=labels == v, source=str(path)) for v in values]
