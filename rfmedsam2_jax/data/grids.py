"""When a grid of voxels can be worked with, and when two of them are one."""

import itertools

import numpy as np

# Largest distance of the same corner voxel in image and label, in units of the smallest spacing.
# Rounded headers stay far below; a shift by a voxel stays far above.
GRID_TOLERANCE = 0.25
# Degrees by which axes may miss right angles: half a degree is rounding or a gantry that is nearly
# straight, and changes distances by less than 1 %.
TILT_TOLERANCE = 0.5
SINGULAR = 1e-3  # determinant of axes of length 1, below which they nearly coincide


def lean(axes: np.ndarray) -> float:
  """Degrees by which a grid's axes, the columns of float [3, 3], miss right angles, at most.

  Of one axis: its angle to the normal of the plane of the two others.
  """
  lengths = np.linalg.norm(axes, axis=0) * np.linalg.norm(np.linalg.inv(axes), axis=1)
  return float(np.degrees(np.arccos(np.minimum(1.0, 1 / lengths)).max()))


def displacement(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
  """Largest distance between the same corner voxels of two affines, [4, 4], of a grid's shape."""
  corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in shape))])
  return float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())
