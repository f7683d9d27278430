import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from rfmedsam2_jax.evaluation.metrics import dice, mean_score, score, surface_distances
from rfmedsam2_jax.evaluation.surfaces import (
  _CORNERS,
  _nearest_by_transform,
  _nearest_by_tree,
  element_areas,
)

SPACING = (3.0, 0.8, 1.1)
SPACINGS = [(1.0, 1.0, 1.0), (5.0, 1.0, 1.0), SPACING, (0.7, 2.0, 0.7)]
SHEARED = np.array([[3.0, 0.1, 0.4], [-0.6, 0.8, 0.3], [1.2, 0.0, 1.1]])  # columns are steps in mm


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(seed)
  field = ndimage.gaussian_filter(rng.standard_normal((14, 30, 26)), 2.5)
  other = field + 0.5 * ndimage.gaussian_filter(rng.standard_normal(field.shape), 2.5)
  return field > 0.06, other > 0.06


def ellipsoid(*centre: float) -> np.ndarray:
  """Of half axes 20, 14 and 11 mm, in voxels of 5 x 1 x 1 mm."""
  grid = zip(np.ogrid[:14, :40, :40], centre, (4, 14, 11), strict=True)
  return sum(((x - at) / half) ** 2 for x, at, half in grid) <= 1


@pytest.fixture
def witness(monkeypatch):
  """DeepMind's surface-distance."""
  package = pytest.importorskip("surface_distance")
  monkeypatch.setattr(np, "Inf", np.inf, raising=False)  # it is older than numpy 2
  for name in ("filters", "morphology"):
    monkeypatch.setattr(ndimage, name, ndimage, raising=False)
  return package


@pytest.mark.parametrize("spacing", SPACINGS)
def test_areas_of_all_256_neighbourhoods_are_deepminds(witness, spacing):
  kernel = witness.lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL
  bits = [int(kernel[tuple(corner)]) for corner in _CORNERS]
  codes = [sum(value for n, value in enumerate(bits) if code >> n & 1) for code in range(256)]
  theirs = witness.lookup_tables.create_table_neighbour_code_to_surface_area(spacing)[codes]
  np.testing.assert_allclose(element_areas(np.diag(spacing)), theirs, rtol=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_surface_dice_and_hd95_are_deepminds(witness, spacing):
  apart = ellipsoid(6, 20, 20), ellipsoid(7, 20, 20)
  noise = np.random.default_rng(0).random((2, 9, 10, 11)) < 0.4
  whole = np.ones((4, 5, 6), bool), np.pad(np.ones((2, 3, 4), bool), 1)  # up to the array's border
  for a, b in (*map(blobs, range(3)), apart, noise, whole):
    theirs = witness.compute_surface_distances(b, a, spacing)
    for tolerance in (0.0, 0.9, 1.9, 5.03):
      found = score(a, b, spacing, tolerance)
      expected = witness.compute_surface_dice_at_tolerance(theirs, tolerance)
      assert found.surface_dice == pytest.approx(expected, abs=1e-9)
    assert found.hd95 == pytest.approx(witness.compute_robust_hausdorff(theirs, 95), abs=1e-9)


def test_areas_of_a_sheared_grid_are_those_of_parallelograms():
  """Of a block only the faces grow with the product of two sides."""
  def area(*sides):
    block = np.pad(np.ones(sides, bool), 1)
    return surface_distances(block, block, SHEARED)[0].areas.sum()

  for axis in range(3):
    u, v = (grown for grown in range(3) if grown != axis)
    sides = lambda *grown: [3 + (n in grown) for n in range(3)]  # noqa: E731
    found = area(*sides(u, v)) - area(*sides(u)) - area(*sides(v)) + area(*sides())
    assert found == pytest.approx(2 * np.linalg.norm(np.cross(SHEARED[:, u], SHEARED[:, v])))


def test_a_sheared_grid_prefers_no_direction():
  """A mask and its shear, mirrored together, are the same thing in space."""
  noise = np.random.default_rng(0).random((2, 8, 8, 8)) < 0.4
  found = score(*noise, SHEARED, 1.5)
  for order, signs in itertools.product(((1, 2, 0), (0, 2, 1)), ((-1, 1, 1), (1, -1, -1))):
    turned = (mask.transpose(order)[tuple(slice(None, None, s) for s in signs)] for mask in noise)
    again = score(*turned, SHEARED[:, order] * signs, 1.5)
    assert (again.surface_dice, again.hd95) == pytest.approx((found.surface_dice, found.hd95))


def places(mask: np.ndarray) -> np.ndarray:
  """Amid which 2 x 2 x 2 voxels a mask has a surface."""
  around = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (2, 2, 2))
  return around.any((3, 4, 5)) & ~around.all((3, 4, 5))


@pytest.mark.parametrize("steps", [np.diag(SPACING), SHEARED], ids=["upright", "sheared"])
def test_distances_are_those_of_all_pairs_of_places(steps):
  a, b = blobs(1)
  p, q = (np.argwhere(places(mask)) @ steps.T for mask in (a, b))
  between = np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1))
  there, back = surface_distances(a, b, steps)
  np.testing.assert_allclose(there.mm, between.min(1), atol=1e-9)
  np.testing.assert_allclose(back.mm, between.min(0), atol=1e-9)


def test_both_ways_to_the_nearest_place_are_equal():
  p, q = map(places, blobs(2))
  both = (nearest(p, q, np.diag(SPACING)) for nearest in (_nearest_by_transform, _nearest_by_tree))
  np.testing.assert_allclose(*both, atol=1e-9)


def test_a_turned_grid_has_the_scores_of_the_same_grid_upright():
  a, b = blobs(0)
  turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
  found, upright = score(a, b, turn * SPACING, 1.9), score(a, b, SPACING, 1.9)
  assert found.surface_dice == pytest.approx(upright.surface_dice, abs=1e-9)
  assert found.hd95 == pytest.approx(upright.hd95, abs=1e-9)


def test_a_surface_exactly_the_tolerance_away_is_within_it():
  cube = np.zeros((20, 12, 12), bool)
  cube[4:9, 4:9, 4:9] = True
  moved = np.roll(cube, 3, 0)
  for spacing in (0.1, float(np.float32(0.1)), 0.7):  # 3 * 0.1 > 0.3 in floating point
    tolerance = float(f"{3 * spacing:.6g}")
    assert score(cube, moved, (spacing,) * 3, tolerance).surface_dice == 1
    assert score(cube, moved, (spacing,) * 3, tolerance * 0.999).surface_dice < 1


def test_volume_of_a_sheared_voxel_is_its_determinant():
  a, b = blobs(0)
  assert score(a, b, SHEARED).volume == pytest.approx(a.sum() * np.linalg.det(SHEARED) / 1000)


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
  # From all places of one surface to the other's: what SimpleITK calls the Hausdorff distance.
  surfaces = [sitk.GetImageFromArray(places(mask).astype(np.uint8)) for mask in (a, b)]
  for image in surfaces:
    image.SetSpacing(SPACING[::-1])
  hausdorff = sitk.HausdorffDistanceImageFilter()
  hausdorff.Execute(*surfaces)
  greatest = max(directed.mm.max() for directed in surface_distances(a, b, SPACING))
  assert greatest == pytest.approx(hausdorff.GetHausdorffDistance(), rel=1e-5)


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


def test_a_missed_structure_costs_what_is_asked():
  a, _ = blobs(0)
  none = np.zeros_like(a)
  farthest = np.linalg.norm(np.multiply(a.shape, SPACING))
  corners = np.array(list(itertools.product((0, 1), repeat=3))) * a.shape @ SHEARED.T
  for missing, voxel, cost in (
    (12.5, SPACING, 12.5), ("worst", SPACING, farthest),
    ("worst", SHEARED, max(np.linalg.norm(p - q) for p in corners for q in corners)),
  ):
    for pair in ((none, a), (a, none)):
      found = score(*pair, voxel, missing=missing)
      assert found.hd95 == pytest.approx(cost) and found.surface_dice == 0 and found.unmatched
    both = score(none, none, voxel, missing=missing)
    assert np.isnan([both.hd95, both.surface_dice]).all() and not both.unmatched
    assert score(a, a, voxel, missing=missing).hd95 == 0
  assert np.isnan(score(none, a, SPACING, None, missing=12.5).hd95)


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
