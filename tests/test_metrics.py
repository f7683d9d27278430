import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from rfmedsam2_jax.evaluation.metrics import dice, mean_score, score, surface_distances

SPACING = (3.0, 0.8, 1.1)


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(seed)
  field = ndimage.gaussian_filter(rng.standard_normal((14, 30, 26)), 2.5)
  other = field + 0.5 * ndimage.gaussian_filter(rng.standard_normal(field.shape), 2.5)
  return field > 0.06, other > 0.06


def brute_force(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Surface distances by all pairs of points, with surfaces found by looking at six neighbours."""

  def points(mask):
    padded = np.pad(mask, 1)
    inner = padded.copy()
    for axis in range(3):
      for step in (-1, 1):
        inner &= np.roll(padded, step, axis)
    return np.argwhere(padded & ~inner) * np.array(SPACING)

  p, q = points(a), points(b)
  distance = np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1))
  return distance.min(1), distance.min(0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_equal_brute_force_over_point_sets(seed):
  a, b = blobs(seed)
  there, back = brute_force(a, b)
  for tolerance in (0.0, 1.0, 2.5):
    found = score(a, b, SPACING, tolerance)
    within = (there <= tolerance).sum() + (back <= tolerance).sum()
    assert found.surface_dice == pytest.approx(within / (there.size + back.size), abs=1e-12)
  assert found.hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dice_volume_and_greatest_distance_equal_simpleitk(seed):
  a, b = blobs(seed)
  images = []
  for mask in (a, b):
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing(SPACING[::-1])
    images.append(image)
  overlap = sitk.LabelOverlapMeasuresImageFilter()
  overlap.Execute(*images)
  shape = sitk.LabelShapeStatisticsImageFilter()
  shape.Execute(images[0])
  found = score(a, b, SPACING)
  assert found.dice == pytest.approx(overlap.GetDiceCoefficient(), abs=1e-12)
  assert found.volume == pytest.approx(shape.GetPhysicalSize(1) / 1000)
  # SimpleITK measures from all voxels, inner ones too: the greatest distance is the same.
  hausdorff = sitk.HausdorffDistanceImageFilter()
  hausdorff.Execute(*images)
  distances = surface_distances(a, b, SPACING)
  outside = [distances[0][~b[surface(a)]], distances[1][~a[surface(b)]]]
  greatest = max(d.max() for d in outside)
  assert greatest == pytest.approx(hausdorff.GetHausdorffDistance(), rel=1e-5)


def surface(mask: np.ndarray) -> np.ndarray:
  return mask & ~ndimage.binary_erosion(mask)


def test_empty_masks_follow_the_stated_convention():
  a, _ = blobs(0)
  none = np.zeros_like(a)
  both, missed, invented = (score(*pair, SPACING) for pair in ((none, none), (none, a), (a, none)))
  assert np.isnan([both.dice, both.surface_dice, both.hd95, missed.hd95, invented.hd95]).all()
  assert [missed.dice, missed.surface_dice, invented.dice, invented.surface_dice] == [0, 0, 0, 0]
  assert missed.volume == 0 and missed.reference_volume > 0
  # Absent on both sides is no statement, missed is one.
  assert mean_score([both, missed, score(a, a, SPACING)]).dice == 0.5
  assert mean_score([both, missed, score(a, a, SPACING)]).hd95 == 0


def test_unknown_voxels_count_for_nothing():
  a, b = blobs(1)
  known = np.ones_like(a)
  known[:, :15] = False
  half = score(a[:, 15:], b[:, 15:], SPACING)
  assert score(a, b, SPACING, known=known) == half
  assert dice(a & known, b & known) == half.dice


def test_without_a_tolerance_no_distances_are_computed(monkeypatch):
  a, b = blobs(2)
  whole = score(a, b, SPACING)
  monkeypatch.delattr("rfmedsam2_jax.evaluation.metrics.surface_distances")
  found = score(a, b, SPACING, None)
  assert (found.dice, found.volume) == (whole.dice, whole.volume)
  assert np.isnan([found.surface_dice, found.hd95]).all()
