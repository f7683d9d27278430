import dataclasses
import itertools
import json
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data import resampling
from rfmedsam2_jax.data.datasets import (
  IGNORED,
  Case,
  Dataset,
  Labels,
  Structure,
  read_case,
  read_dataset,
)
from rfmedsam2_jax.data.files import load_json, save_json
from rfmedsam2_jax.data.fingerprint import (
  CaseFingerprint,
  ChannelStatistics,
  Fingerprint,
  make_fingerprint,
)
from rfmedsam2_jax.data.plan import (
  ChannelRule,
  PlanConfig,
  choose_patch,
  choose_slice_axis,
  choose_spacing,
  load_plan,
  make_plan,
  pooling,
  save_plan,
)
from rfmedsam2_jax.data.preprocessing import (
  Restore,
  load_case,
  prepare_atoms,
  preprocess,
  save_case,
  stored_cases,
)
from rfmedsam2_jax.data.volumes import load_image, load_label_map

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
LABELS = Labels((Structure("a", (1,)), Structure("b", (2,))), False, (1, 2), ignore=3)


def fingerprint(spacings, shapes, channels=("MRI",), nonzero=None, intensities=True):
  statistics = ChannelStatistics(40.0, 25.0, 42.0, -100.0, 200.0, -300.0, 900.0)
  return Fingerprint(
    "test", channels, LABELS,
    tuple(CaseFingerprint(f"case{i}", spacing, shape, nonzero or shape, (10, 10))
          for i, (spacing, shape) in enumerate(zip(spacings, shapes, strict=True))),
    (statistics,) * len(channels) if intensities else None)


def volume_of(tmp_path, array, spacing):
  """A volume from canonical [z, y, x] by way of a file."""
  image = nib.Nifti1Image(array[:, ::-1, ::-1].T, np.diag([*spacing[::-1], 1.0]))
  nib.save(image, tmp_path / "image.nii")
  volume = load_image(tmp_path / "image.nii")
  np.testing.assert_array_equal(volume.array[0], array)
  return volume


def smooth(shape, seed=0):
  noise = np.random.default_rng(seed).normal(size=shape)
  return (scipy.ndimage.gaussian_filter(noise, 1.5) * 300).astype(np.float32)


def itk_resample(array, spacing, shape, interpolator):
  """Resampling with half-pixel centres by SimpleITK; spacing and shapes (z, y, x)."""
  image = sitk.GetImageFromArray(array)
  image.SetSpacing(spacing[::-1])
  new = [old * n / m for old, n, m in zip(spacing, array.shape, shape, strict=True)]
  origin = [(b - a) / 2 for a, b in zip(spacing, new, strict=True)]
  grid = sitk.Image(shape[::-1], sitk.sitkFloat32)
  grid.SetSpacing(new[::-1])
  grid.SetOrigin(origin[::-1])
  filt = sitk.ResampleImageFilter()
  filt.SetReferenceImage(grid)
  filt.SetInterpolator(interpolator)
  filt.SetUseNearestNeighborExtrapolator(True)
  return sitk.GetArrayFromImage(filt.Execute(image))


@pytest.mark.parametrize("shape", [(9, 14, 11), (20, 9, 30), (12, 5, 1)])
def test_separable_matrices_equal_whole_volume_resampling(shape):
  array = smooth((12, 10, 8))
  def resample(matrix):
    return resampling.apply_separable(array, [matrix(n, m) for n, m in
                                              zip(array.shape, shape, strict=True)])
  zoom = [m / n for n, m in zip(array.shape, shape, strict=True)]
  for matrix, order in ((resampling.spline_matrix, 3), (resampling.linear_matrix, 1)):
    expected = scipy.ndimage.zoom(array, zoom, order=order, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(resample(matrix), expected, atol=2e-3)
  expected = jax.image.resize(array, shape, "linear", antialias=True)
  np.testing.assert_allclose(resample(resampling.antialiased_matrix), expected, atol=2e-3)
  nearest = resample(resampling.nearest_matrix)
  assert np.isin(nearest, array).all()
  if 1 not in shape:
    expected = itk_resample(array, (1.0, 1.0, 1.0), shape, sitk.sitkNearestNeighbor)
    assert np.mean(nearest == expected) > 0.8  # equal but for centres on a border of two voxels


def test_maps_of_any_resolution_return_to_the_native_grid():
  for order in itertools.permutations(range(3)):
    restore = Restore((14, 13, 12), (3.0, 1.0, 1.5), (2, 0, 3), (12, 13, 9), order, (7, 9, 8))
    native = smooth((14, 13, 12))
    crop = native[2:12, :, 3:9]
    low = itk_resample(crop, (3.0, 1.0, 1.5), (5, 6, 4), sitk.sitkLinear)
    expected = np.full(native.shape, -7, np.float32)
    expected[2:12, :, 3:9] = itk_resample(low, (6.0, 13 / 6, 9 / 4), crop.shape, sitk.sitkLinear)
    result = restore.to_native(low.transpose(order), -7)
    np.testing.assert_allclose(result, expected, atol=2e-3)
    for rows in (slice(0, 3), slice(3, 11), slice(11, None), slice(0, 2), slice(13, 14)):
      np.testing.assert_array_equal(restore.to_native(low.transpose(order), -7, rows),
                                    result[rows])
    same = np.ascontiguousarray(crop.transpose(order))  # nothing to resample
    np.testing.assert_array_equal(restore.to_native(same, -7, slice(1, 9))[1:, :, 3:9],
                                  native[2:9, :, 3:9])
    full = dataclasses.replace(restore, lower=(0, 0, 0), upper=(14, 13, 12))
    expected = itk_resample(low, (1.0, 1.0, 1.0), (14, 13, 12), sitk.sitkLinear)
    np.testing.assert_allclose(full.to_native(low.transpose(order), 0), expected, atol=2e-3)


def test_given_points_land_on_the_same_place_of_the_prepared_image(tmp_path):
  grid = np.stack(np.meshgrid(*map(np.arange, (16, 24, 20)), indexing="ij")).astype(np.float32)
  config = PlanConfig(plane="coronal", spacing=(0.8, 2.4, 1.1))
  plan = make_plan(fingerprint([(2.0, 1.0, 1.0)], [(16, 24, 20)]), config)
  points = np.array([[3, 5, 7], [8, 16, 10.0]])
  for axis in range(3):  # an image whose value is a coordinate
    prepared = preprocess(volume_of(tmp_path, grid[axis] + 1, (2.0, 1.0, 1.0)), plan)
    moved = prepared.restore.native_to_prepared(points)
    values = scipy.ndimage.map_coordinates(prepared.image[0], moved.T, order=1)
    mean, std = (grid[axis] + 1).mean(), (grid[axis] + 1).std()
    np.testing.assert_allclose(values * std + mean - 1, points[:, axis], atol=0.05)
    np.testing.assert_allclose(prepared.restore.prepared_to_native(moved), points, atol=1e-9)


def test_intensities_follow_nnunets_rules(tmp_path):
  array = smooth((6, 7, 8)) * 10
  ct = make_plan(fingerprint([(1.0,) * 3], [(6, 7, 8)], ("CT",)))
  prepared = preprocess(volume_of(tmp_path, array, (1.0,) * 3), ct)
  np.testing.assert_allclose(prepared.image[0], (np.clip(array, -100, 200) - 40) / 25, rtol=1e-5)
  np.testing.assert_allclose(prepared.window, [[-140 / 25, 160 / 25]], rtol=1e-6)

  array[:, :2] = 0
  array[0] = 0
  array[3, 4, 5] = 0  # a hole is inside
  mr = make_plan(fingerprint([(1.0,) * 3], [(6, 7, 8)], nonzero=(4, 5, 8)))
  assert mr.channels[0].masked  # more than a quarter of the volume is empty
  prepared = preprocess(volume_of(tmp_path, array, (1.0,) * 3), mr)
  crop = array[1:, 2:]
  assert prepared.restore.lower == (1, 2, 0) and prepared.image.shape[1:] == crop.shape
  np.testing.assert_allclose(prepared.image[0], (crop - crop.mean()) / crop.std(), atol=1e-4)
  low, high = np.percentile(crop[crop != 0], (0.5, 99.5))
  np.testing.assert_allclose(prepared.window[0], (np.array([low, high]) - crop.mean()) / crop.std(),
                             rtol=1e-4)
  crop[0, 0, 0] = 0  # a corner is outside
  array[1:, 2:] = crop
  prepared = preprocess(volume_of(tmp_path, array, (1.0,) * 3), mr)
  inside = np.ones(crop.shape, bool)
  inside[0, 0, 0] = False
  assert prepared.image[0][0, 0, 0] == 0
  np.testing.assert_allclose(prepared.image[0][inside],
                             (crop[inside] - crop[inside].mean()) / crop[inside].std(), atol=1e-4)


def test_a_constant_image_stays_finite(tmp_path):
  plan = make_plan(fingerprint([(1.0,) * 3], [(4, 4, 4)]))
  for value in (0, 5):
    prepared = preprocess(volume_of(tmp_path, np.full((4, 4, 4), value, np.float32), (1.0,) * 3),
                          plan)
    assert np.isfinite(prepared.image).all()
    assert (np.diff(prepared.window) > 0).all() and np.isfinite(prepared.window).all()


def test_resampling_respects_anisotropy_and_range(tmp_path):
  array = smooth((8, 24, 20))
  plan = make_plan(fingerprint([(4.0, 1.0, 1.0)], [(8, 24, 20)]),
                   PlanConfig(spacing=(3.0, 0.8, 0.8)))
  prepared = preprocess(volume_of(tmp_path, array, (4.0, 1.0, 1.0)), plan)
  assert prepared.image.shape == (1, 11, 30, 25)
  normalised = (array - array.mean()) / array.std()
  flat = np.stack([scipy.ndimage.zoom(plane, (30 / 24, 25 / 20), order=3, mode="nearest",
                                      grid_mode=True) for plane in normalised])
  nearest = flat[np.floor((np.arange(11) + 0.5) * 8 / 11).astype(int)]  # no mixing across slices
  np.testing.assert_allclose(prepared.image[0], np.clip(nearest, normalised.min(),
                                                        normalised.max()), atol=1e-3)


def test_labels_take_the_largest_share_and_keep_what_is_ignored(tmp_path):
  label = (smooth((16, 20, 18)) > 0).astype(np.int32)
  label[8:, :, 9:] = 2
  label[:3] = 3
  plan = make_plan(fingerprint([(1.0,) * 3], [label.shape]), PlanConfig(spacing=(0.7, 0.8, 0.6)))
  prepared = preprocess(volume_of(tmp_path, label + 1.0, (1.0,) * 3), plan)
  atoms = prepare_atoms(plan.labels.to_atoms(label), plan, prepared.restore)
  shares = [itk_resample((label == v).astype(np.float32), (1.0,) * 3, atoms.shape, sitk.sitkLinear)
            for v in range(4)]
  expected = np.array([0, 1, 2, IGNORED])[np.argmax(shares, axis=0)]
  top = np.sort(shares, axis=0)
  decided = top[-1] - top[-2] > 1e-4
  assert decided.mean() > 0.95
  np.testing.assert_array_equal(atoms[decided], expected[decided])
  with pytest.raises(UserError, match="label.nii: labels 9 are not in dataset.json"):
    prepare_atoms(plan.labels.to_atoms((label > 0) * 9, "label.nii"), plan, prepared.restore)


def test_labels_do_not_mix_across_thick_slices(tmp_path):
  label = np.random.default_rng(0).integers(0, 3, (6, 16, 16))
  plan = make_plan(fingerprint([(5.0, 1.0, 1.0)], [label.shape]),
                   PlanConfig(spacing=(3.0, 0.8, 0.8)))
  prepared = preprocess(volume_of(tmp_path, label + 1.0, (5.0, 1.0, 1.0)), plan)
  atoms = prepare_atoms(plan.labels.to_atoms(label), plan, prepared.restore)
  source = np.floor((np.arange(10) + 0.5) * 0.6).astype(int)  # the slice that each one lies in
  for i, j in zip(range(9), range(1, 10), strict=True):
    assert np.array_equal(atoms[i], atoms[j]) == (source[i] == source[j])


def test_fingerprint_statistics_are_of_the_annotated_structures(tmp_path):
  rng = np.random.default_rng(0)
  cases, seen = [], []
  for name in ("x", "y"):
    image, label = rng.normal(50, 20, (8, 9, 10)), rng.integers(0, 5, (8, 9, 10))
    image[:2] = 0
    image = image.astype(np.float32)
    for folder, array in (("image", image), ("label", label.astype(np.uint8))):
      nib.save(nib.Nifti1Image(array, np.diag([1.0, 2, 3, 1])), tmp_path / f"{name}_{folder}.nii")
    cases.append(Case(name, (tmp_path / f"{name}_image.nii",), tmp_path / f"{name}_label.nii"))
    seen.append(image[np.isin(label, (1, 2))])
  labels = dataclasses.replace(LABELS, others=(4,))  # 3 is ignored, 4 is background
  found = make_fingerprint(Dataset("set", ("CT",), labels, tuple(cases)))
  values = np.concatenate(seen)
  expected = [values.mean(), values.std(), np.median(values), *np.percentile(values, (0.5, 99.5)),
              values.min(), values.max()]
  np.testing.assert_allclose(dataclasses.astuple(found.intensities[0]), expected, rtol=1e-5)
  first = found.cases[0]
  assert (first.spacing, first.shape) == ((3.0, 2.0, 1.0), (10, 9, 8))
  assert first.nonzero_shape == (10, 9, 6) and sum(first.structure_voxels) == len(seen[0])


def test_a_stored_case_is_read_back_and_its_locations_lie_in_the_structures(tmp_path):
  label = np.zeros((20, 30, 30), np.int32)
  label[2:18, 4:26, 4:26], label[5, 5, 5:8], label[0] = 1, 2, 3
  plan = make_plan(fingerprint([(1.0,) * 3], [label.shape]))
  prepared = preprocess(volume_of(tmp_path, smooth(label.shape), (1.0,) * 3), plan)
  atoms = prepare_atoms(plan.labels.to_atoms(label), plan, prepared.restore)
  for _ in range(2):
    save_case(tmp_path / "store", "case.1", prepared, atoms, plan.labels)
    save_case(tmp_path / "store", "plain", prepared, None, plan.labels)
  assert stored_cases(tmp_path / "store") == ["case.1", "plain"]
  case = load_case(tmp_path / "store", "case.1")
  assert isinstance(case.image, np.memmap) and not case.image.flags.writeable
  np.testing.assert_array_equal(case.image, prepared.image)
  np.testing.assert_array_equal(case.atoms, atoms)
  np.testing.assert_array_equal(case.window, prepared.window)
  assert case.restore == prepared.restore and case.spacing == (1.0, 1.0, 1.0)
  assert [len(places) for places in case.locations] == [2000, 3]
  for k, places in enumerate(case.locations):
    assert (atoms[tuple(places.T)] == k + 1).all() and len(np.unique(places, axis=0)) == len(places)
  plain = load_case(tmp_path / "store", "plain")
  assert plain.atoms is None and [len(places) for places in plain.locations] == [0, 0]
  with pytest.raises(UserError, match="other.json: does not exist"):
    load_case(tmp_path / "store", "other")
  (tmp_path / "store" / "plain_image.npy").write_bytes(b"")
  with pytest.raises(UserError, match="plain_image.npy: cannot be read"):
    load_case(tmp_path / "store", "plain")


def test_slices_run_along_the_coarsest_axis_axial_if_tied():
  assert choose_slice_axis(np.array([3.0, 1.0, 1.0])) == 0
  assert choose_slice_axis(np.array([1.0, 3.0, 1.0])) == 1
  assert choose_slice_axis(np.array([1.0, 1.0, 3.0])) == 2
  assert choose_slice_axis(np.array([1.0, 1.0, 1.0])) == 0
  assert choose_slice_axis(np.array([0.98, 1.0, 1.0])) == 0
  assert choose_slice_axis(np.array([0.5, 1.0, 1.0])) == 1
  plan = make_plan(fingerprint([(1.0, 5.0, 0.9)] * 3, [(100, 20, 120)] * 3))
  assert plan.slice_axis == 1 and plan.order == (1, 0, 2)
  assert plan.spacing == (5.0, 1.0, 0.9) and plan.median_shape == (20, 100, 120)
  assert make_plan(fingerprint([(1.0, 5.0, 0.9)], [(100, 20, 120)]),
                   PlanConfig(plane="sagittal")).spacing == (0.9, 1.0, 5.0)


def test_far_coarser_axes_take_the_tenth_percentile_of_their_spacing():
  spacings = np.array([[z, 0.8, 0.8] for z in (2.0, 5.0, 5.0, 5.0, 6.0)])
  shapes = np.array([[40, 512, 512]] * 5)
  np.testing.assert_allclose(choose_spacing(spacings, shapes), [3.2, 0.8, 0.8])
  np.testing.assert_allclose(choose_spacing(spacings, shapes // [1, 5, 5]), [5.0, 0.8, 0.8])
  spacings[:, 0] = (0.5, 0.5, 5.0, 5.0, 5.0)  # never finer than the other axes
  np.testing.assert_allclose(choose_spacing(spacings, shapes), [0.80001, 0.8, 0.8])


@pytest.mark.parametrize(("spacing", "patch", "strides", "thin_kernels"), [
  # nnU-Net's published plans of Task04, BTCV and LiTS.
  ((1, 1, 1), (40, 56, 40), [(2, 2, 2)] * 3, 0),
  ((3, 0.76, 0.76), (48, 192, 192), [(1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)], 1),
  ((1, 0.77, 0.77), (128, 128, 128), [(2, 2, 2)] * 5, 0),
])
def test_the_unet_has_nnunets_shape(spacing, patch, strides, thin_kernels):
  found, kernels, size = pooling(np.array(spacing), np.array(patch))
  assert list(found) == [(1, 1, 1), *strides] and tuple(size) == patch
  assert list(kernels) == [(1, 3, 3)] * thin_kernels + [(3, 3, 3)] * (len(found) - thin_kernels)
  limited = pooling(np.array(spacing), np.array(patch), 2)[0]
  assert np.prod(limited, axis=0).tolist() == [4, 4, 4]


def test_patches_keep_to_the_voxel_budget_and_divide():
  for spacing, median, budget in (((3, 0.76, 0.76), (148, 512, 512), 128**3),
                                  ((1, 1, 1), (36, 50, 35), 128**3),
                                  ((1, 1, 1), (36, 50, 35), 30_000),
                                  ((5, 0.8, 0.8), (20, 512, 512), 50_000),
                                  ((1, 1, 1), (300, 300, 300), 10)):
    patch = choose_patch(np.array(spacing, float), np.array(median), budget, None)
    assert patch.prod() <= max(budget, 8**3)
    strides, _, padded = pooling(np.array(spacing), patch)
    np.testing.assert_array_equal(padded, patch)
    assert (patch % np.prod(strides, axis=0) == 0).all() and (patch > 0).all()


def test_a_plan_is_strict_json(tmp_path):
  found = fingerprint([(1.0, 5.0, 0.9)], [(100, 20, 120)], ("ct", "PET"))
  plan = make_plan(found)
  assert plan.labels.membership.shape == (3, 2)  # a cached value must not reach the file
  save_plan(tmp_path / "plan.json", plan)
  assert load_plan(tmp_path / "plan.json") == plan
  assert plan.channels == (ChannelRule("ct", "ct", -100.0, 200.0, 40.0, 25.0),
                           ChannelRule("PET", "zscore")) and not plan.crops_to_nonzero
  save_json(tmp_path / "fingerprint.json", found)
  assert load_json(tmp_path / "fingerprint.json", Fingerprint) == found
  content = json.loads((tmp_path / "plan.json").read_text("utf-8"))
  content["channels"][0]["colour"] = 1
  (tmp_path / "plan.json").write_text(json.dumps(content))
  with pytest.raises(UserError, match="plan.json: channels.0.colour"):
    load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(("config", "says"), [
  (PlanConfig(spacing=(0.0, 1.0, 1.0)), "plan.spacing"),
  (PlanConfig(patch_size=(0, 8, 8)), "plan.patch_size"),
  (PlanConfig(intensity=("ct", "ct")), "plan.intensity"),
  (PlanConfig(intensity=("ct",)), "no case has a voxel"),
])
def test_options_that_contradict_the_data_are_refused(config, says):
  with pytest.raises(UserError, match=says):
    make_plan(fingerprint([(1.0,) * 3], [(9, 9, 9)], intensities=False), config)


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is absent")
def test_the_hippocampus_gets_nnunets_published_plan():
  data = read_dataset(REAL / "Task04_Hippocampus")
  cases = data.cases[::10]
  plan = make_plan(make_fingerprint(data, cases))
  assert plan.patch_size == (40, 56, 40) and plan.spacing == (1.0, 1.0, 1.0)
  assert plan.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)) and plan.slice_axis == 0
  for case in cases[:3]:
    volume, atoms = read_case(case, 1, data.labels)
    prepared = preprocess(volume, plan)
    label = load_label_map(case.label, volume.geometry)
    prepared_atoms = prepare_atoms(plan.labels.to_atoms(label), plan, prepared.restore)
    np.testing.assert_array_equal(prepared_atoms, atoms)
    np.testing.assert_allclose([prepared.image.mean(), prepared.image.std()], [0, 1], atol=1e-4)
