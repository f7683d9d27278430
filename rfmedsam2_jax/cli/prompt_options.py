"""The prompts of `rfmedsam2 track`, as its options have them."""

import argparse
from collections.abc import Sequence

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.volumes import Geometry
from rfmedsam2_jax.prompted.slice_frame import Plane, VoxelPrompt, read_masks, read_prompts

# What the numbers of an option mean: the slice, then its two coordinates.
_ORDER = {"axial": "zxy", "coronal": "yxz", "sagittal": "xyz"}


def prompts_of(options: argparse.Namespace, geometry: Geometry) -> list[VoxelPrompt]:
  """Everything that a command line says about what to follow."""
  plane, world = options.plane, options.world
  return [
    *(parse_box(text, geometry, plane, world) for text in options.box),
    *(parse_point(text, geometry, plane, world) for text in options.point),
    *(p for path in options.prompts for p in read_prompts(path, geometry, world)),
    *(p for path in options.masks for p in read_masks(path, geometry))]


def parse_box(text: str, geometry: Geometry, plane: Plane = "axial", world: bool = False
              ) -> VoxelPrompt:
  """`LABEL:z,x0,y0,x1,y1` (axial; coronal `LABEL:y,x0,z0,x1,z1`, sagittal `LABEL:x,y0,z0,y1,z1`).

  Numbers are voxels of the file, from 0, along the axes nearest to left-right (x), front-back (y)
  and head-foot (z), inclusive; or `world`, millimetres, RAS+ as in the file's affine (and in 3D
  Slicer). UserError for another form.
  """
  source = f"--box {text}"
  label, parts = _split(text, source, 5, "LABEL:z,x0,y0,x1,y1")
  corners = parts[:3], [parts[0], *parts[3:]]
  low, high = (_canonical(c, source, geometry, plane, world) for c in corners)
  return VoxelPrompt(label, box=(low, high), source=source)


def parse_point(text: str, geometry: Geometry, plane: Plane = "axial", world: bool = False
                ) -> VoxelPrompt:
  """`LABEL:z,x,y,+` for a point in the structure, `-` for one that is not; see `parse_box`."""
  source = f"--point {text}"
  label, parts = _split(text, source, 4, "LABEL:z,x,y,+ or LABEL:z,x,y,-")
  if parts[3] not in ("+", "-"):
    raise UserError(f"{source}: ends in {parts[3]!r}; end it in + (inside) or - (outside)")
  z, y, x = _canonical(parts[:3], source, geometry, plane, world)
  return VoxelPrompt(label, points=((z, y, x, parts[3] == "+"),), source=source)


def _split(text: str, source: str, count: int, form: str) -> tuple[int, list[str]]:
  label, _, rest = text.partition(":")
  parts = rest.split(",")
  if len(parts) != count or not label.isdigit():
    raise UserError(f"{source}: is not of the form {form}; correct it")
  return int(label), parts


def _canonical(parts: Sequence[str], source: str, geometry: Geometry, plane: Plane, world: bool
               ) -> tuple[float, float, float]:
  """The coordinates of an option as canonical (z, y, x)."""
  try:
    named = dict(zip(_ORDER[plane], map(float, parts), strict=True))
  except ValueError:
    raise UserError(f"{source}: has a coordinate that is no number; correct it") from None
  row = [named[name] for name in "xyz"]
  if not world:
    for axis, name in zip(geometry.axes, "zyx", strict=True):
      row[axis] = named[name]
  z, y, x = geometry.canonical_points([row], world)[0].tolist()
  return z, y, x
