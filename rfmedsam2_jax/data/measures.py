"""What a label map of any axis order says in numbers: volumes in ml per label value."""

import numpy as np

_CHUNK = 2**22  # voxels that are counted at once; bincount takes eight bytes for each


def voxel_ml(spacing: tuple[float, ...]) -> float:
  """The volume of one voxel with right angles in ml; spacing in mm, in any order."""
  return float(np.prod(spacing)) / 1000


def volumes_ml(labels: np.ndarray, voxel: float) -> dict[int, float]:
  """ml of every value of uint8 or uint16 labels but background's 0; `voxel`: ml of one."""
  counts = joint_counts([labels], int(labels.max(initial=0)) + 1)
  return {int(value): float(counts[value]) * voxel
          for value in np.flatnonzero(counts) if value}


def joint_counts(maps: list[np.ndarray], values: int) -> np.ndarray:
  """int64 [values] * len(maps): voxels by values, from 0 to `values` - 1, in maps of one shape."""
  shape = (values,) * len(maps)
  total = np.zeros(values ** len(maps), np.int64)
  flat = [found.reshape(-1) for found in maps]
  for first in range(0, flat[0].size, _CHUNK):
    index = np.ravel_multi_index([f[first : first + _CHUNK].astype(np.intp) for f in flat], shape)
    total += np.bincount(index, minlength=total.size)
  return total.reshape(shape)
