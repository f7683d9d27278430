"""Probabilities as files: one NIfTI of bytes per structure, so that memory and disk stay bounded.

Their `scl_slope` is 1/255, so that every reader gets numbers from 0 to 1.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rfmedsam2_jax.data.volumes import Geometry, write_on_grid


def probability_paths(case: str, names: Mapping[int, str]) -> dict[str, str]:
  """Where a case's probabilities lie in the folder of a prediction, by structure.

  `names` are of the values in label maps.
  """
  # A name of dataset.json may hold what no file name can.
  return {name: f"probabilities/{case}/{value}_{re.sub('[^A-Za-z0-9.-]+', '_', name)}.nii.gz"
          for value, name in names.items()}


def write_probability(path: str | Path, probability: np.ndarray, geometry: Geometry) -> None:
  """Writes float32 [D, H, W] from 0 to 1, canonical, on the grid of an input, in steps of 1/255.

  Half a step is rounded down: what is above 0.5 before is above it afterwards, and nothing else.
  """
  steps = np.empty(probability.shape, np.uint8)
  for plane, out in zip(probability, steps, strict=True):
    out[:] = np.ceil(np.clip(plane, 0, 1) * 255 - 0.5)
  write_on_grid(path, steps, geometry, 1 / 255)
