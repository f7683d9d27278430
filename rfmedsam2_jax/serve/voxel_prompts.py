"""Prompts of a request as those of the tracker."""

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.geometry import Geometry
from rfmedsam2_jax.data.scribbles import points_of_line
from rfmedsam2_jax.prompted.slice_frame import VoxelPrompt
from rfmedsam2_jax.serve.schema import Prompt, Space, Track


def voxel_prompts(asked: Track, geometry: Geometry) -> tuple[VoxelPrompt, ...]:
  """All prompts of a request in canonical voxels; UserError if there is none."""
  if not asked.prompts:
    raise UserError("no prompt; draw a box or set a point first")
  return tuple(_placed(prompt, asked.space, geometry) for prompt in asked.prompts)


def _placed(prompt: Prompt, space: Space, geometry: Geometry) -> VoxelPrompt:
  rows = [(*place, line.inside) for line in prompt.lines for place in points_of_line(line.path)]
  rows = [*prompt.points, *rows]
  given = np.array([*(prompt.box or ()), *(row[:3] for row in rows)], float).reshape(-1, 3)
  if space != "zyx":
    given = geometry.canonical_points(given, world=space == "ras")
  places = [tuple(place) for place in given.tolist()]
  box = None
  if prompt.box is not None:
    box = places.pop(0), places.pop(0)
  points = tuple((*place, row[3]) for place, row in zip(places, rows, strict=True))
  return VoxelPrompt(prompt.label, box, points, round=prompt.round, source=f"label {prompt.label}")
