"""Boxes that a person would draw around a structure, computed from its reference."""

import numpy as np

from rfmedsam2_jax.data.cuts import bounds
from rfmedsam2_jax.prompted.slice_frame import VoxelPrompt


def box_of(mask: np.ndarray, value: int, z: int) -> VoxelPrompt:
  """The box on an axial slice of a structure, bool [D, H, W]; ValueError if it is not there."""
  found = bounds([mask[z]])
  if found is None:
    raise ValueError(f"label {value} is not on slice {z}")
  (y0, x0), (y1, x1) = (corner.tolist() for corner in found)
  return VoxelPrompt(value, box=((z, y0, x0), (z, y1, x1)))


def boxes_of_ends(mask: np.ndarray, value: int) -> list[VoxelPrompt]:
  """Boxes on the first, the middle and the last axial slice of a structure; none if it is empty."""
  slices = np.flatnonzero(mask.any(axis=(1, 2))).tolist()
  return [box_of(mask, value, z)
          for z in sorted({*slices[:1], *slices[len(slices) // 2 :][:1], *slices[-1:]})]
