"""Scores of masks of whole volumes: Dice, surface Dice, 95 % Hausdorff distance, volumes.

What surfaces are, `surfaces` says. Where prediction and reference are both empty, Dice, surface
Dice and HD95 are nan ("no statement") and means leave them out; where one is empty, Dice and
surface Dice are 0 and HD95 is what the caller says (`Missing`), nan by default: no distance is fair
to a structure that was missed, and its Dice says so.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from rfmedsam2_jax.evaluation.surfaces import diagonal, surface_distances, voxel_steps

# HD95 of a structure that one side alone has: mm, nan, or the diagonal of the volume.
Missing = float | Literal["worst"]


@dataclasses.dataclass(frozen=True)
class Score:
  """One structure of one case."""

  dice: float
  surface_dice: float  # share of both surfaces' area that lies within the tolerance of the other
  hd95: float  # mm, the larger of the distances within which 95 % of either surface's area lies
  volume: float  # ml, prediction
  reference_volume: float  # ml

  @property
  def unmatched(self) -> bool:
    """Whether only one side has the structure."""
    return (self.volume == 0) != (self.reference_volume == 0)


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
  """Dice of two masks, bool of any equal shape; nan if both are empty."""
  total = np.count_nonzero(prediction) + np.count_nonzero(reference)
  return 2 * np.count_nonzero(prediction & reference) / total if total else math.nan


def score(
  prediction: np.ndarray, reference: np.ndarray, voxel: ArrayLike, tolerance: float | None = 1.0,
  known: np.ndarray | None = None, missing: Missing = math.nan,
) -> Score:
  """Scores one structure.

  Args:
    prediction, reference: bool [D, H, W].
    voxel: mm, the spacing in the order of the axes, or what `Geometry.voxel_steps` gives.
    tolerance: mm, of the surface Dice; None leaves out what needs surface distances (nan).
    known: bool [D, H, W]; voxels without a reference (nnU-Net's ignore label) are left out.
    missing: HD95 where one mask alone is empty.
  """
  if prediction.shape != reference.shape:
    raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ")
  if known is not None:
    prediction, reference = prediction & known, reference & known
  ml = abs(float(np.linalg.det(voxel_steps(voxel)))) / 1000
  volumes = [float(np.count_nonzero(mask)) * ml for mask in (prediction, reference)]
  found = Score(dice(prediction, reference), math.nan, math.nan, *volumes)
  if tolerance is None or not any(volumes):
    return found
  if found.unmatched:
    hd95 = diagonal(prediction.shape, voxel) if missing == "worst" else missing
    return dataclasses.replace(found, surface_dice=0.0, hd95=hd95)
  directed = surface_distances(prediction, reference, voxel)
  within = sum(distances.area_within(tolerance) for distances in directed)
  area = sum(float(distances.areas.sum()) for distances in directed)
  hd95 = max(distances.quantile(0.95) for distances in directed)
  return dataclasses.replace(found, surface_dice=within / area, hd95=hd95)


def known_mean(values: Iterable[float | None]) -> float | None:
  """Mean of the values that make a statement (neither None nor nan); None where none does."""
  known = [value for value in values if value is not None and not math.isnan(value)]
  return float(np.mean(known)) if known else None


def mean_score(scores: Sequence[Score]) -> Score:
  """Mean of every score over those that make a statement; nan where none does."""
  names = [field.name for field in dataclasses.fields(Score)]
  means = (known_mean(getattr(score, name) for score in scores) for name in names)
  return Score(*(math.nan if mean is None else mean for mean in means))
