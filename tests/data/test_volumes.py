import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.volumes import load_grid, load_image, load_label_map, write_label_map

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"

ORDERS = [(axes, flips) for axes in itertools.permutations(range(3))
          for flips in itertools.product((False, True), repeat=3)]


def rotation(degrees, axis):
  a, b = (i for i in range(3) if i != axis)
  turn = np.eye(3)
  c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
  turn[[a, a, b, b], [a, b, a, b]] = c, -s, s, c
  return turn


def affine_of(directions=None, spacing=(0.7, 0.9, 2.5), origin=(-31.0, 12.5, 40.25)):
  affine = np.eye(4)
  affine[:3, :3] = (np.diag([-1, -1, 1]) if directions is None else directions) * spacing
  affine[:3, 3] = origin
  return affine


def save(path, array, affine, units="mm", codes=(1, 1)):
  image = nib.Nifti1Image(array, affine)
  image.header.set_xyzt_units(units, "sec")
  image.set_sform(affine, codes[1])
  image.set_qform(affine, codes[0])
  nib.save(image, path)
  return path


def reordered(array, affine, axes, flips):
  """The same volume in world space with other axes, by nibabel."""
  ornt = np.array([[axes[i], -1 if flips[i] else 1] for i in range(3)])
  image = nib.Nifti1Image(array, affine).as_reoriented(ornt)
  return np.asarray(image.dataobj), image.affine


@pytest.fixture
def voxels():
  return np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)


@pytest.mark.parametrize("directions", [
  None, rotation(20, 2) @ rotation(-35, 0), rotation(45, 2) @ np.diag([-1, -1, 1])])
def test_all_48_axis_orders_become_the_same_canonical_volume(tmp_path, voxels, directions):
  affine = affine_of(directions)
  reference = load_image(save(tmp_path / "reference.nii", voxels, affine))
  labels = (reference.array[0] > 0).astype(np.uint8)
  label_file = tmp_path / "labels.nii"
  write_label_map(label_file, labels, reference.geometry)
  world = reference.geometry.canonical_affine
  assert world[2, 0] > 0 and world[1, 1] < 0 and world[0, 2] < 0  # to superior, posterior, left
  for axes, flips in ORDERS:
    volume = load_image(save(tmp_path / "other.nii", *reordered(voxels, affine, axes, flips)))
    assert volume.array.tobytes() == reference.array.tobytes()
    assert volume.spacing == reference.spacing
    np.testing.assert_allclose(volume.geometry.canonical_affine, world, atol=1e-4)
    np.testing.assert_array_equal(load_label_map(label_file, volume.geometry), labels)
    write_label_map(tmp_path / "out.nii", labels, volume.geometry)
    written = nib.load(tmp_path / "out.nii")
    expected, _ = reordered((voxels > 0).astype(np.uint8), affine, axes, flips)
    np.testing.assert_array_equal(np.asarray(written.dataobj), expected)


def test_canonical_arrays_are_simpleitks_lps_arrays(tmp_path, voxels):
  for axes, flips in ORDERS[::5]:
    path = save(tmp_path / "image.nii", *reordered(voxels, affine_of(), axes, flips))
    oriented = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    volume = load_image(path)
    np.testing.assert_array_equal(volume.array[0], sitk.GetArrayFromImage(oriented))
    np.testing.assert_allclose(volume.spacing, oriented.GetSpacing()[::-1], rtol=1e-6)


@pytest.mark.parametrize(("units", "kind"), [("mm", np.int16), ("micron", np.float32),
                                             ("meter", np.float64)])
def test_spacing_is_in_millimetres_whatever_the_units(tmp_path, voxels, units, kind):
  path = save(tmp_path / "image.nii.gz", voxels.astype(kind), affine_of(), units)
  expected = sitk.ReadImage(str(path)).GetSpacing()[::-1]
  np.testing.assert_allclose(load_image(path).spacing, expected, rtol=1e-5)


@pytest.mark.parametrize("codes", [(1, 1), (0, 2), (3, 0), (0, 0), (1, 4)])
@pytest.mark.parametrize("units", ["mm", "micron"])
def test_label_maps_are_written_on_the_inputs_own_grid(tmp_path, voxels, codes, units):
  affine = affine_of(rotation(10, 1) @ np.diag([1, -1, 1]))
  path = save(tmp_path / "image.nii.gz", voxels, affine, units, codes)
  volume = load_image(path)
  labels = (volume.array[0] > 100).astype(np.int64) * 300
  write_label_map(tmp_path / "out.nii.gz", labels, volume.geometry)

  before, after = nib.load(path), nib.load(tmp_path / "out.nii.gz")
  assert after.get_data_dtype() == np.uint16 and after.shape == before.shape
  for key in ("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c",
              "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"):
    np.testing.assert_array_equal(before.header[key], after.header[key], err_msg=key)
  np.testing.assert_array_equal(np.asarray(after.dataobj), (voxels > 100) * 300)
  ours, theirs = sitk.ReadImage(str(path)), sitk.ReadImage(str(tmp_path / "out.nii.gz"))
  for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
    assert getattr(ours, what)() == getattr(theirs, what)()


def test_the_label_type_is_the_smallest_and_no_temporary_file_stays(tmp_path, voxels):
  volume = load_image(save(tmp_path / "image.nii", voxels, affine_of()))
  for top, kind in ((1, np.uint8), (255, np.uint8), (256, np.uint16), (65536, np.uint32)):
    labels = np.full(volume.array.shape[1:], top)
    write_label_map(tmp_path / "out" / "labels.nii.gz", labels, volume.geometry)
    written = nib.load(tmp_path / "out" / "labels.nii.gz")
    assert written.get_data_dtype() == kind and np.asarray(written.dataobj).max() == top
  assert [file.name for file in (tmp_path / "out").iterdir()] == ["labels.nii.gz"]


def test_channels_come_from_files_or_from_the_fourth_axis(tmp_path, voxels):
  pair = [voxels, (voxels // 2).astype(np.int16)]
  whole = save(tmp_path / "both.nii.gz", np.stack(pair, axis=-1), affine_of())
  # The second file has another axis order: channels are aligned in world space too.
  files = [save(tmp_path / "a.nii.gz", pair[0], affine_of()),
           save(tmp_path / "b.nii.gz", *reordered(pair[1], affine_of(), (2, 0, 1), (1, 0, 1)))]
  one, two = load_image(whole, 2), load_image(files, 2)
  assert one.array.shape == (2, 7, 6, 5) and one.array.dtype == np.float32
  np.testing.assert_array_equal(one.array, two.array)
  write_label_map(tmp_path / "out.nii.gz", np.ones((7, 6, 5), int), one.geometry)
  assert nib.load(tmp_path / "out.nii.gz").shape == (5, 6, 7)


def test_slope_and_intercept_are_applied(tmp_path, voxels):
  image = nib.Nifti1Image(voxels, affine_of())
  image.header.set_slope_inter(0.5, -3)
  nib.save(image, tmp_path / "image.nii")
  read = load_image(tmp_path / "image.nii")
  expected = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "image.nii")))
  np.testing.assert_allclose(read.array[0], expected, rtol=1e-6)


def _header_value(key, value):
  def change(path, voxels):
    image = nib.Nifti1Image(voxels, affine_of())
    nib.save(image, path)
    content = bytearray(gzip.decompress(path.read_bytes()))
    offset = image.header.template_dtype.fields[key][1]
    raw = np.asarray(value, image.header.template_dtype.fields[key][0].base).tobytes()
    content[offset:offset + len(raw)] = raw
    path.write_bytes(gzip.compress(bytes(content)))
  return change


def _truncated(path, voxels):
  save(path, np.random.default_rng(0).random((30, 30, 30)), affine_of())
  path.write_bytes(path.read_bytes()[:20000])


def _with_voxel(value):
  def change(path, voxels):
    array = voxels.astype(np.float32)
    array[1, 2, 3] = value
    save(path, array, affine_of())
  return change


def _shaped(*shape):
  return lambda path, voxels: save(path, np.zeros(shape, np.float32), affine_of())


@pytest.mark.parametrize(("make", "says"), [
  (lambda path, voxels: None, "does not exist"),
  (_truncated, "perhaps truncated"),
  (lambda path, voxels: path.write_bytes(b""), "cannot be read"),
  (lambda path, voxels: path.write_bytes(b"not a volume"), "cannot be read"),
  (lambda path, voxels: path.mkdir(), "is a folder without DICOM files"),
  (_shaped(4, 5, 6, 3), "has 4 axes (4x5x6x3) where a 3D image is expected"),
  (_shaped(4, 5), "three axes"),
  (_with_voxel(np.nan), "1 of 210 voxels are NaN or infinite"),
  (_with_voxel(np.inf), "NaN or infinite"),
  (_header_value("srow_x", [np.nan] * 4), "affine is not finite"),
  (_header_value("srow_x", [-1, 1, 0, 0, 1, -1, 0, 0, 0, 0, 1, 0]), "affine is singular"),
  (_header_value("srow_y", [0, 0, 0, 0]), "an axis without length"),
  (_header_value("dim", [3, 0, 6, 7]), "size 0x6x7"),
  (_header_value("datatype", 128), "convert the file to whole or real numbers"),
])
def test_bad_images_get_one_line_that_names_the_file(tmp_path, voxels, make, says):
  path = tmp_path / "case_0000.nii.gz"
  make(path, voxels)
  with pytest.raises(UserError) as error:
    load_image(path)
  assert str(error.value).startswith(f"{path}: ") and says in str(error.value)
  assert "\n" not in str(error.value)


def test_a_truncated_uncompressed_file_is_an_error_too(tmp_path, voxels):
  path = save(tmp_path / "image.nii", voxels, affine_of())
  path.write_bytes(path.read_bytes()[:-50])
  with pytest.raises(UserError, match="perhaps truncated"):
    load_image(path)


@pytest.mark.parametrize(("change", "says"), [
  (lambda a: (a, affine_of(origin=(-31.0, 13.5, 40.25))), "image and label of different space"),
  (lambda a: (a, affine_of(spacing=(0.7, 0.9, 2.7))), "image and label of different space"),
  (lambda a: (a[:-1], affine_of()), "image and label of different space"),
  (lambda a: (a + 0.5, affine_of()), "not whole numbers"),
  (lambda a: (a * np.nan, affine_of()), "not whole numbers"),
  (lambda a: (a[..., None] * np.ones(2), affine_of()), "has 4 axes"),
  (lambda a: (a * 1e10, affine_of()), "beyond 32 bits"),
])
def test_bad_label_maps_get_one_line_that_names_the_file(tmp_path, voxels, change, says):
  volume = load_image(save(tmp_path / "image.nii", voxels, affine_of()))
  label = save(tmp_path / "label.nii", *change((voxels > 0).astype(np.float32)))
  with pytest.raises(UserError) as error:
    load_label_map(label, volume.geometry)
  assert str(error.value).startswith(f"{label}: ") and says in str(error.value)


@pytest.mark.parametrize("kind", ["uint8", "int16", "uint16", "int8"])
@pytest.mark.parametrize("largest", [5, 7, 13])
def test_whole_numbers_behind_a_slope_are_those_that_nibabel_was_given(tmp_path, kind, largest):
  labels = np.random.default_rng(1).integers(0, largest + 1, (6, 5, 4))
  labels.flat[:2] = 0, largest
  image = nib.Nifti1Image(labels.astype(np.float64), np.diag([-1.0, -1, 1, 1]))
  image.set_data_dtype(kind)  # nibabel chooses the slope
  nib.save(image, tmp_path / "a.nii.gz")
  stored = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")))
  assert stored.dtype.kind == "f" and np.abs(stored - labels.T).max() < 0.03
  found = load_label_map(tmp_path / "a.nii.gz", load_grid(tmp_path / "a.nii.gz"))
  np.testing.assert_array_equal(found, labels.T)


@pytest.mark.parametrize(("stored", "slope", "inter", "whole"), [
  ([0, 1, 200], 1.0, 0.0, True), ([-3, 0, 4], 2.0, -5.0, True), ([0, 3, 9], 1 / 3, 0.0, True),
  ([0, 1000, 2000], 0.000999999, 0.0, True),
  ([0, 1], 0.5, 0.0, False), ([0, 1], 0.999, 0.0, False), ([0, 1], 0.7, 0.0, False),
  ([0, 1], 1.0, 0.5, False), ([0, 99], 0.01, 0.0, False), ([0, 50], 0.0196, 0.01, False),
  ([0, 2], 0.01, 0.0, False),
])
def test_a_slope_makes_no_whole_numbers_of_fractions(tmp_path, stored, slope, inter, whole):
  image = nib.Nifti1Image(np.tile(np.array(stored, np.int16), (3, 4, 1)), np.eye(4))
  image.header.set_slope_inter(slope, inter)
  nib.save(image, tmp_path / "a.nii")
  grid = load_grid(tmp_path / "a.nii")
  if not whole:
    with pytest.raises(UserError, match="not whole numbers"):
      load_label_map(tmp_path / "a.nii", grid)
  else:
    expected = np.rint(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii"))))
    assert set(load_label_map(tmp_path / "a.nii", grid).ravel()) == set(expected.ravel())


@pytest.mark.parametrize(("value", "whole"), [
  (0.999999, True), (np.float32(3) * np.float32(1 / 3), True), (-2.000001, True), (4e4, True),
  (0.9999, False), (70000.5, False), (2.5, False)])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_real_numbers_are_labels_up_to_float32s_rounding(tmp_path, value, whole, ending):
  array = np.zeros((3, 4, 5), np.float32)
  array[1, 2, 3] = value
  sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / f"a{ending}"))
  grid = load_grid(tmp_path / f"a{ending}")
  if whole:
    found = load_label_map(tmp_path / f"a{ending}", grid)
    assert found.dtype == np.int32 and sorted({*found.flat}) == sorted({0, round(float(value))})
  else:
    with pytest.raises(UserError, match="not whole numbers"):
      load_label_map(tmp_path / f"a{ending}", grid)


def test_rounded_headers_still_match(tmp_path, voxels):
  volume = load_image(save(tmp_path / "image.nii", voxels, affine_of()))
  affine = np.round(affine_of(rotation(0.3, 2) @ np.diag([-1, -1, 1])), 3)
  load_label_map(save(tmp_path / "label.nii", (voxels > 0).astype(np.uint8), affine),
                 volume.geometry)


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is absent")
def test_the_flipped_label_of_a_real_ct_lies_on_the_liver():
  volume = load_image(REAL / "ct_abdomen_512" / "ct.nii.gz")
  label = load_label_map(REAL / "ct_abdomen_512" / "labels.nii.gz", volume.geometry)
  stored = [np.asarray(nib.load(REAL / "ct_abdomen_512" / name).dataobj)
            for name in ("ct.nii.gz", "labels.nii.gz")]
  assert stored[0][stored[1] == 5].mean() < 0  # paired by index, the trap
  assert 60 < volume.array[0][label == 5].mean() < 130
