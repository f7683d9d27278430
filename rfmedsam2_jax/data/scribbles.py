"""Scribbles: a line that a person draws becomes a few points, as SAM 2 takes them."""

import numpy as np
from numpy.typing import ArrayLike

# SAM 2 was trained with at most eight points on a slice: a first one and seven corrections
# (sam2.1 training, num_correction_pt_per_frame). So a line inside and one outside make as many.
MOST_POINTS = 4


def points_of_line(path: ArrayLike) -> np.ndarray:
  """Points along a line, each in the middle of one of its equal parts.

  So none lies at an end, where a stroke comes near the border. As many as the line is long, in
  voxels or whatever its coordinates are, at least 1 and at most `MOST_POINTS`.

  Args:
    path: real [n, 3], its vertices in their order, n from 1.

  Returns:
    float64 [m, 3].
  """
  vertices = np.asarray(path, np.float64).reshape(-1, 3)
  lengths = np.linalg.norm(np.diff(vertices, axis=0), axis=1)
  vertices = vertices[np.concatenate([[True], lengths > 0])]  # where a hand rested
  along = np.concatenate([[0.0], np.cumsum(lengths[lengths > 0])])
  count = int(np.clip(along[-1], 1, MOST_POINTS))
  places = (np.arange(count) + 0.5) / count * along[-1]
  return np.stack([np.interp(places, along, column) for column in vertices.T], axis=1)
