"""Scores of masks of whole volumes: Dice, surface Dice, 95 % Hausdorff distance, volumes.

A surface is the voxels of a mask with a face neighbour outside of it (or of the array); distances
are between voxel centres, in mm. Where prediction and reference are both empty, Dice and surface
Dice are nan ("no statement") and means leave them out; where one is empty both are 0. The Hausdorff
distance is nan then: none is fair to a structure that was missed, and its Dice says so.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

from rfmedsam2_jax.data.measures import voxel_ml


@dataclasses.dataclass(frozen=True)
class Score:
  """One structure of one case."""

  dice: float
  surface_dice: float  # share of both surfaces that lies within the tolerance of the other
  hd95: float  # mm, the larger of the two directed 95 % distances
  volume: float  # ml, prediction
  reference_volume: float  # ml


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
  """Dice of two masks, bool of any equal shape; nan if both are empty."""
  total = np.count_nonzero(prediction) + np.count_nonzero(reference)
  return 2 * np.count_nonzero(prediction & reference) / total if total else math.nan


def surface_distances(
  prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """mm, float64 [n], from each surface voxel of the prediction to the reference's, and back.

  Args:
    prediction, reference: bool [D, H, W], neither empty. spacing: mm, in the order of the axes.
  """
  # Both surfaces lie in the box of the union, and so does every distance between them.
  box = ndimage.find_objects((prediction | reference).astype(np.uint8))[0]
  ours, theirs = (m & ~ndimage.binary_erosion(m) for m in (prediction[box], reference[box]))
  to_theirs = ndimage.distance_transform_edt(~theirs, sampling=spacing)[ours]
  to_ours = ndimage.distance_transform_edt(~ours, sampling=spacing)[theirs]
  return to_theirs, to_ours


def score(
  prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...],
  tolerance: float | None = 1.0, known: np.ndarray | None = None,
) -> Score:
  """Scores one structure.

  Args:
    prediction, reference: bool [D, H, W]. spacing: mm, in the order of the axes.
    tolerance: mm, of the surface Dice; None leaves out what needs surface distances (nan).
    known: bool [D, H, W]; voxels without a reference (nnU-Net's ignore label) are left out.
  """
  if prediction.shape != reference.shape:
    raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ")
  if known is not None:
    prediction, reference = prediction & known, reference & known
  volumes = [float(np.count_nonzero(m)) * voxel_ml(spacing) for m in (prediction, reference)]
  overlap = dice(prediction, reference)
  if tolerance is None or not all(volumes):
    return Score(overlap, math.nan if tolerance is None else overlap, math.nan, *volumes)
  distances = surface_distances(prediction, reference, spacing)
  within = sum(np.count_nonzero(d <= tolerance) for d in distances)
  surface_dice = within / sum(d.size for d in distances)
  hd95 = max(float(np.percentile(d, 95)) for d in distances)
  return Score(overlap, surface_dice, hd95, *volumes)


def known_mean(values: Iterable[float | None]) -> float | None:
  """Mean of the values that make a statement (neither None nor nan); None where none does."""
  known = [value for value in values if value is not None and not math.isnan(value)]
  return float(np.mean(known)) if known else None


def mean_score(scores: Sequence[Score]) -> Score:
  """Mean of every score over those that make a statement; nan where none does."""
  names = [field.name for field in dataclasses.fields(Score)]
  means = (known_mean(getattr(score, name) for score in scores) for name in names)
  return Score(*(math.nan if mean is None else mean for mean in means))
