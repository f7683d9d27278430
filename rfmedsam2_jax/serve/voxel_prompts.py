"""Prompts of a request as those of the tracker."""

from typing import NamedTuple

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.geometry import Geometry
from rfmedsam2_jax.data.scribbles import points_of_line
from rfmedsam2_jax.prompted.slice_frame import VoxelPrompt
from rfmedsam2_jax.serve.schema import Place, Prompt, Space, Track


class Given(NamedTuple):
  """A prompt, and a text that is the same for the same prompt."""

  prompt: VoxelPrompt
  key: str


def given_prompts(asked: Track, geometry: Geometry) -> tuple[Given, ...]:
  """All prompts of a request in canonical voxels; UserError if there is none, or for masks that
  are not in the volume."""
  if not asked.prompts:
    raise UserError("no prompt; draw a box or set a point first")
  return tuple(Given(_placed(prompt, asked.space, geometry), asked.space + prompt.model_dump_json())
               for prompt in asked.prompts)


def _placed(prompt: Prompt, space: Space, geometry: Geometry) -> VoxelPrompt:
  source = f"label {prompt.label}"
  rows = [(*place, line.inside) for line in prompt.lines for place in points_of_line(line.path)]
  rows = [*prompt.points, *rows]
  places = [tuple(place) for place in _canonical(
    [*(prompt.box or ()), *(row[:3] for row in rows)], space, geometry).tolist()]
  box = None
  if prompt.box is not None:
    box = places.pop(0), places.pop(0)
  points = tuple((*place, row[3]) for place, row in zip(places, rows, strict=True))
  mask = None
  if prompt.mask:
    if box or points:
      raise UserError(f"{source}: gives a mask besides another prompt; keep one")
    mask = _mask(prompt.mask, space, geometry, source)
  return VoxelPrompt(prompt.label, box, points, mask, prompt.round, source)


def _canonical(places: list[Place], space: Space, geometry: Geometry) -> np.ndarray:
  """float64 [n, 3], (z, y, x)."""
  given = np.array(places, float).reshape(-1, 3)
  return given if space == "zyx" else geometry.canonical_points(given, world=space == "ras")


def _mask(
  pieces: list[tuple[Place, Place]], space: Space, geometry: Geometry, source: str
) -> np.ndarray:
  """bool [D, H, W]: the union of boxes of voxels."""
  ends = np.rint(_canonical([end for piece in pieces for end in piece], space, geometry))
  shape = geometry.canonical_shape
  if (ends < 0).any() or (ends >= shape).any():
    raise UserError(f"{source}: its mask lies outside of the volume; correct its coordinates")
  mask = np.zeros(shape, bool)
  ordered = np.sort(ends.astype(int).reshape(-1, 2, 3), axis=1)
  for (z0, y0, x0), (z1, y1, x1) in ordered.tolist():
    mask[z0 : z1 + 1, y0 : y1 + 1, x0 : x1 + 1] = True
  return mask
