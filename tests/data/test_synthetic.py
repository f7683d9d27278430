"""The stream of synthetic runs: a function of seed and index, varied, and true to its labels."""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pydantic
import pytest
from scipy import ndimage
from scipy.interpolate import BSpline

from rfmedsam2_jax.data import synthetic_shapes
from rfmedsam2_jax.data.synthetic import SyntheticConfig, synthetic_run
from rfmedsam2_jax.data.synthetic_framework import FAMILIES
from rfmedsam2_jax.data.synthetic_scanner import Palette, Tissue
from rfmedsam2_jax.data.synthetic_scene import Scene
from rfmedsam2_jax.data.synthetic_shapes import Space

SIDE = 64
CONFIG = SyntheticConfig()


@pytest.fixture(scope="module")
def runs():
  return [synthetic_run(CONFIG, 0, index, SIDE) for index in range(220)]


def straight_space(side=48, depth=48, planes=1):
  """Space that is not bent, of cubic voxels."""
  rng = np.random.default_rng(0)
  return Space(rng, (depth, side, side), planes, (1 / side,) * 3, 0.0, np.zeros((depth, 2)))


def equal(one, other):
  return (np.array_equal(one.images, other.images) and np.array_equal(one.objects, other.objects)
          and one.kinds == other.kinds)


def test_a_run_is_a_function_of_seed_and_index_whoever_makes_it(runs):
  with ThreadPoolExecutor(2) as workers:
    again = list(workers.map(lambda i: synthetic_run(CONFIG, 0, i, SIDE), reversed(range(12))))
  assert all(equal(a, b) for a, b in zip(runs[:12], reversed(again), strict=True))
  assert not any(equal(a, b) for a, b in zip(runs[:11], runs[1:12], strict=True))
  assert not equal(synthetic_run(CONFIG, 1, 0, SIDE), runs[0])


@pytest.mark.parametrize(("side", "length", "tracks"), [(64, 8, 3), (96, 3, 1), (32, 1, 5)])
def test_shapes_types_and_range(side, length, tracks):
  for index in range(4):
    run = synthetic_run(CONFIG, 3, index, side, length, tracks)
    assert run.images.shape == (length, side, side) and run.images.dtype == np.float32
    assert np.isfinite(run.images).all() and run.images.min() >= 0 and run.images.max() <= 1
    assert run.objects.shape == (tracks, length, side, side) and run.objects.dtype == bool
    assert [bool(k) for k in run.kinds] == sorted(map(bool, run.kinds), reverse=True)
    assert len(run.kinds) == tracks
    for kind, mask in zip(run.kinds, run.objects, strict=True):
      assert kind or not mask.any()


def test_nothing_is_read_or_written():
  opened, listening = [], [True]

  def hook(event, args):
    if listening and event == "open":
      opened.append(args)

  sys.addaudithook(hook)
  synthetic_run(CONFIG, 0, 0, SIDE)
  listening.clear()
  assert opened == []


def test_structures_of_all_kinds_occur(runs):
  seen = Counter()
  for run in runs:
    present = run.objects.any(axis=(2, 3))
    seen["in sight"] += present[0].any()
    for kind, mask, there in zip(run.kinds, run.objects, present, strict=True):
      seen[kind] += 1
      seen["ends within"] += there.any() and not there.all()
      if not there.any():
        continue
      slice_ = mask[mask.sum(axis=(1, 2)).argmax()]
      seen["thin"] += ndimage.distance_transform_edt(np.pad(slice_, 1)).max() <= 2
      seen["small"] += slice_.mean() < 0.005
      seen["large"] += slice_.mean() > 0.2
      seen["pieces"] += ndimage.label(slice_)[1] > 1
      seen["holes"] += (ndimage.binary_fill_holes(slice_) & ~slice_).sum() > 9
    for a in range(3):
      for b in range(a):
        one, other = run.objects[a], run.objects[b]
        both, least = (one & other).sum(), min(one.sum(), other.sum())
        seen["nested"] += least > 0 and both == least
        seen["touching"] += least > 0 and both == 0 and (
          ndimage.binary_dilation(one, np.ones((1, 3, 3))) & other).any()
  assert seen["in sight"] == len(runs)
  few = {"ends within": 50, "thin": 10, "small": 10, "large": 10, "pieces": 10, "holes": 5,
         "nested": 10, "touching": 5, "": 1}
  assert {k: seen[k] for k in few if seen[k] < few[k]} == {}
  kinds = {"organ", "lesion", "kidney", "hollow", "content", "wall", "vessel", "cavity", "ring",
           "crescent", "heart", "bone", "lung", "muscle", "piece", "region", "islands", "field"}
  assert kinds <= set(seen)
  assert min(FAMILIES.values()) > 0


def contrasts(runs, shift=0):
  """Difference of mean intensity within 3 pixels of a surface, out and in, per object's slice."""
  found = []
  for run in runs:
    for mask in np.roll(run.objects, shift, axis=(2, 3)):
      z = mask.sum(axis=(1, 2)).argmax()
      inside = mask[z] & (ndimage.distance_transform_edt(mask[z]) <= 3)
      outside = ~mask[z] & (ndimage.distance_transform_edt(~mask[z]) <= 3)
      if inside.sum() > 30:
        found.append(abs(run.images[z][inside].mean() - run.images[z][outside].mean()))
  return np.array(found)


def test_most_objects_stand_out_and_some_hardly(runs):
  found = contrasts(runs)
  assert 0.55 < (found > 0.06).mean() < 0.95
  assert 0.05 < (found < 0.03).mean() < 0.35


def test_plain_tissues_differ_clearly(runs):
  plain = SyntheticConfig(plain=1.0)
  found = contrasts([synthetic_run(plain, 0, index, SIDE) for index in range(60)])
  assert (found > 0.15).mean() > (contrasts(runs) > 0.15).mean() + 0.1


def test_labels_lie_where_the_picture_shows_the_object(runs):
  here = contrasts(runs).mean()
  for shift in ((3, 0), (-3, 0), (0, 3), (0, -3)):
    assert contrasts(runs, shift).mean() < 0.85 * here


def test_a_smooth_field_is_a_spline_of_unit_deviation():
  rng = np.random.default_rng(0)
  fields = np.stack([synthetic_shapes.smooth_field(rng, (6, 40, 50), (2.0, 6.0, 9.0))
                     for _ in range(100)])
  assert abs(fields.mean()) < 0.12 and abs(fields.std() - 1) < 0.03
  # Neighbouring samples hardly differ along the long wavelength.
  assert np.abs(np.diff(fields, axis=3)).mean() < 0.15
  matrix = synthetic_shapes._spline(np.random.default_rng(5), 30, 4.0).toarray()
  at = np.random.default_rng(5).random() + np.arange(30) / 4.0
  wanted = BSpline.design_matrix(at + 3, np.arange(matrix.shape[1] + 4.0), 3).toarray()
  np.testing.assert_allclose(matrix * synthetic_shapes._SPLINE_DEVIATION, wanted, atol=1e-6)


@pytest.mark.parametrize("boxy", [False, True])
def test_levels_are_distances_near_a_surface(boxy):
  space, rng = straight_space(), np.random.default_rng(1)
  frame = synthetic_shapes.rotation(rng)
  centre, radii = np.array([0.02, -0.05, 0.03]), np.array([0.3, 0.24, 0.2])
  level = space.ellipsoid(centre, radii, frame, boxy, 0.1)
  rod = space.tube(np.array([[-0.2, 0, 0, 0.1, 0.1, 0.2, 0.12, 0.08]]), 0.1)
  for found in (level, rod):
    values = np.full(space.shape, synthetic_shapes.FAR)
    values[found.box] = found.values
    inside = values < 0
    # Exact distances of voxel centres to the other side, to half a voxel.
    exact = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    near = np.abs(exact) < 3
    error = values[near] * 48 - (exact - np.sign(exact) * 0.5)[near]
    assert np.abs(error).mean() < 0.35 and np.abs(error).max() < 1.5


def test_voxels_at_a_surface_take_their_share_across_slices_too():
  thin, thick = straight_space(), straight_space(planes=4)
  scenes = []
  for space in (thin, thick):
    scene = Scene(np.random.default_rng(2), space, Palette(np.random.default_rng(2), "mr"))
    scene.paint(space.ellipsoid(np.zeros(3), np.full(3, 0.3), np.eye(3)), Tissue(1.0), 7)
    scenes.append(scene)
  mean = scenes[0].image.reshape(12, 4, 48, 48).mean(axis=1)
  np.testing.assert_allclose(scenes[1].image, mean, atol=1e-5)
  np.testing.assert_array_equal(scenes[1].owner == 7, scenes[1].image > 0.5)
  # The volume of a ball.
  assert scenes[0].image.sum() / 48**3 == pytest.approx(4 / 3 * np.pi * 0.3**3, rel=0.01)


def test_the_config_is_read_strictly():
  read = pydantic.TypeAdapter(SyntheticConfig).validate_python
  assert read({"ct": 0.2}) == SyntheticConfig(ct=0.2)
  for wrong in ({"ct": 1.5}, {"cut": -0.1}, {"noise": 3}):
    with pytest.raises(pydantic.ValidationError):
      read(wrong)
