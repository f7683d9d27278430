"""A person's prompts as they are given: options of a command, a JSON file, a sparse label map.

Out: `VoxelPrompt`s in voxels of the canonical volume, whatever the file's own axes are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.files import is_row, read_json
from rfmedsam2_jax.data.volumes import Geometry, load_label_map
from rfmedsam2_jax.prompted.slice_frame import Plane, VoxelPrompt

# What the numbers of an option mean: the slice, then its two coordinates.
_ORDER: dict[str, str] = {"axial": "zxy", "coronal": "yxz", "sagittal": "xyz"}


def parse_box(text: str, geometry: Geometry, plane: Plane = "axial", world: bool = False
              ) -> VoxelPrompt:
  """`LABEL:z,x0,y0,x1,y1` (axial; coronal `LABEL:y,x0,z0,x1,z1`, sagittal `LABEL:x,y0,z0,y1,z1`).

  Args:
    geometry: of the image. Numbers are voxels of the file, from 0, along the axes nearest to
      left-right (x), front-back (y) and head-foot (z); inclusive.
    world: they are millimetres instead, RAS+ as in the file's affine (and in 3D Slicer).

  Raises:
    UserError: not of that form.
  """
  source = f"--box {text}"
  label, parts = _split(text, source, 5, "LABEL:z,x0,y0,x1,y1")
  numbers = _numbers(parts, source)
  corners = [numbers[:3], [numbers[0], *numbers[3:]]]
  low, high = (_canonical(c, geometry, plane, world) for c in corners)
  return VoxelPrompt(label, box=(low, high), source=source)


def parse_point(text: str, geometry: Geometry, plane: Plane = "axial", world: bool = False
                ) -> VoxelPrompt:
  """`LABEL:z,x,y,+` for a point in the structure, `-` for one that is not; see `parse_box`."""
  source = f"--point {text}"
  label, parts = _split(text, source, 4, "LABEL:z,x,y,+ or LABEL:z,x,y,-")
  if parts[3] not in ("+", "-"):
    raise UserError(f"{source}: ends in {parts[3]!r}; end it in + (inside) or - (outside)")
  z, y, x = _canonical(_numbers(parts[:3], source), geometry, plane, world)
  return VoxelPrompt(label, points=((z, y, x, parts[3] == "+"),), source=source)


def read_prompts(path: str | Path, geometry: Geometry, world: bool = False) -> list[VoxelPrompt]:
  """Boxes and points of a JSON file.

      [{"label": 1, "box": [[i, j, k], [i, j, k]]},
       {"label": 1, "points": [[i, j, k, 1], [i, j, k, 0]], "round": 1}]

  Coordinates are voxels of the image file, from 0 (`world`: millimetres, RAS+); an entry lies on
  one slice. The last number of a point says whether it lies inside. Entries of a later round
  correct what was found before it.
  """
  content = read_json(path)
  if not isinstance(content, list) or not content:
    raise UserError(f"{path}: must hold a list of prompts, one at least; correct the file")
  return [_entry(entry, f"{path}: prompt {i}", geometry, world) for i, entry in enumerate(content)]


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


def _entry(entry: Any, source: str, geometry: Geometry, world: bool) -> VoxelPrompt:
  known = {"label", "box", "points", "round"}
  if not isinstance(entry, dict) or not set(entry) <= known:
    raise UserError(f"{source}: has keys besides {', '.join(sorted(known))}; correct it")
  label, number = entry.get("label"), entry.get("round", 0)
  if type(label) is not int or type(number) is not int or number < 0:
    raise UserError(f"{source}: needs a whole number as label (and as round); correct it")
  box, points = entry.get("box") or [], entry.get("points") or []
  rows = [(box, 3), (points, 4)]
  right = all(
    isinstance(group, list) and all(is_row(row, width) for row in group)
    for group, width in rows
  )
  if not right or len(box) not in (0, 2) or not (box or points):
    raise UserError(f"{source}: a box is two corners [i, j, k], points are [i, j, k, 1 or 0]")
  corners = [_from_file(row, geometry, world) for row in box]
  return VoxelPrompt(
    label,
    box=(corners[0], corners[1]) if corners else None,
    points=tuple((*_from_file(row[:3], geometry, world), bool(row[3])) for row in points),
    round=number,
    source=source,
  )


def _split(text: str, source: str, count: int, form: str) -> tuple[int, list[str]]:
  label, separator, rest = text.partition(":")
  parts = rest.split(",")
  if not separator or len(parts) != count or not label.isdigit():
    raise UserError(f"{source}: is not of the form {form}; correct it")
  return int(label), parts


def _numbers(parts: Sequence[str], source: str) -> list[float]:
  try:
    return [float(part) for part in parts]
  except ValueError:
    raise UserError(f"{source}: has a coordinate that is no number; correct it") from None


def _canonical(
  numbers: Sequence[float], geometry: Geometry, plane: Plane, world: bool
) -> tuple[float, float, float]:
  """Numbers of an option as canonical (z, y, x)."""
  named = dict(zip(_ORDER[plane], numbers, strict=True))
  if world:
    return _from_file([named["x"], named["y"], named["z"]], geometry, True)
  native = [0.0, 0.0, 0.0]
  for axis, name in zip(geometry.axes, "zyx", strict=True):
    native[axis] = named[name]
  return _from_file(native, geometry, False)


def _from_file(
  row: Sequence[float], geometry: Geometry, world: bool
) -> tuple[float, float, float]:
  """A voxel (i, j, k) of the file, or a point in its world, as canonical (z, y, x)."""
  at = np.array([*row, 1.0])
  if not world:
    at = geometry.affine @ at
  z, y, x = (np.linalg.inv(geometry.canonical_affine) @ at)[:3]
  # The way through the world leaves rounding errors of the affine's size behind.
  return tuple(round(float(v), 4) for v in (z, y, x))  # type: ignore[return-value]
