"""Which transform of a NIfTI file counts, against SimpleITK: every pair of codes and of forms."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.segmentations import write_segmentation
from rfmedsam2_jax.data.volumes import load_image, load_label_map, write_label_map

VOXELS = np.random.default_rng(0).integers(0, 900, (5, 6, 7)).astype(np.int16)


def affine_of(angles=(10, 20, 30), sizes=(1, 2, 3), origin=(5, 6, 7)):
  affine = np.eye(4)
  affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(sizes)
  affine[:3, 3] = origin
  return affine


QFORM = affine_of()
SFORMS = {
  "the same": QFORM, "100 mm away": affine_of(origin=(5, 6, 107)),
  "turned": affine_of((-40, 3, 60)), "mirrored": affine_of(sizes=(-1, 2, 3), origin=(5, 6, 8)),
  "other sizes": affine_of(sizes=(1.5, 2, 3)), "empty": np.zeros((4, 4)),
  "sheared": QFORM @ np.array([[1, 0.3, 0, 0], [0, 1, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
}


def save(path, qform=QFORM, qcode=0, sform=None, scode=0, units="mm", shape=()):
  array = VOXELS.reshape(*VOXELS.shape, *shape)
  header = nib.Nifti1Image(array, None).header
  header.set_qform(qform, 1)
  if sform is not None:
    header.set_sform(sform, 1)
  header["qform_code"], header["sform_code"] = qcode, scode
  header["pixdim"][1:4] = 1, 2, 3
  header.set_xyzt_units(units)
  nib.save(nib.Nifti1Image(array, None, header), path)
  return path


def itk_affine(path):
  """float64 [4, 4], RAS+, mm, as SimpleITK sees a file."""
  image = sitk.ReadImage(str(path))
  affine = np.eye(4)
  affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
  affine[:3, 3] = image.GetOrigin()
  return np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize("name", SFORMS)
def test_all_pairs_of_codes_lie_where_simpleitk_sees_them(tmp_path, name):
  """What is written lies there for SimpleITK and for nibabel, by its qform and by its sform."""
  for qcode, scode in itertools.product(range(5), repeat=2):
    path = save(tmp_path / "scan.nii", qcode=qcode, sform=SFORMS[name], scode=scode)
    if name in ("sheared", "empty") and qcode == 0 < scode or name == "sheared" and scode == 1:
      with pytest.raises(UserError, match="right angles|axis without length"):
        load_image(path)  # SimpleITK refuses too, but for a scanner's sform beside a qform
      continue
    expected, volume = itk_affine(path), load_image(path)
    np.testing.assert_allclose(volume.geometry.affine, expected, atol=1e-4)
    before = nib.load(path)
    forms = [before.affine, *([QFORM] if qcode else []), *([SFORMS[name]] if scode else [])]
    contradict = not all(np.allclose(form, expected, atol=1e-3) for form in forms)
    assert len(volume.geometry.remarks) == contradict, (qcode, scode)
    write_label_map(tmp_path / "out.nii", (volume.array[0] > 450).astype(np.uint8), volume.geometry)
    np.testing.assert_allclose(itk_affine(tmp_path / "out.nii"), expected, atol=1e-4)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out.nii"))),
                                  (VOXELS > 450).T)
    written = nib.load(tmp_path / "out.nii").header
    if contradict and qcode + scode:
      for form in (written.get_qform(), written.get_sform()):
        np.testing.assert_allclose(form, expected, atol=1e-4)
    else:
      for key in ("pixdim", "qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x"):
        np.testing.assert_array_equal(written[key], before.header[key])


def test_slicer_segmentations_and_world_coordinates_follow_simpleitk_too(tmp_path):
  path = save(tmp_path / "scan.nii", qcode=1, sform=SFORMS["100 mm away"], scode=2)
  volume, image = load_image(path), sitk.ReadImage(str(path))
  assert volume.geometry.remarks[0].startswith("its qform and sform contradict each other by up to "
                                               "100 mm")
  write_segmentation(tmp_path / "out.seg.nrrd", np.ones((7, 6, 5), np.uint8), volume.geometry, {})
  np.testing.assert_allclose(itk_affine(tmp_path / "out.seg.nrrd"), itk_affine(path), atol=1e-4)
  index = (1, 4, 2)
  ras = np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
  (found,) = volume.geometry.canonical_points([ras], world=True)
  assert volume.array[0][tuple(np.rint(found).astype(int))] == VOXELS[index]


@pytest.mark.parametrize("units", ["mm", "meter", "micron", "unknown"])
def test_world_coordinates_and_grids_are_in_millimetres(tmp_path, units):
  path = save(tmp_path / "scan.nii", qcode=1, sform=QFORM, scode=1, units=units)
  volume, image = load_image(path), sitk.ReadImage(str(path))
  np.testing.assert_allclose(volume.geometry.affine_mm, itk_affine(path), rtol=1e-6, atol=1e-8)
  ras = np.array(image.TransformIndexToPhysicalPoint((1, 4, 2))) * (-1, -1, 1)
  (found,) = volume.geometry.canonical_points([ras], world=True)
  assert volume.array[0][tuple(np.rint(found).astype(int))] == VOXELS[1, 4, 2]
  sitk.WriteImage(image, str(tmp_path / "label.nii"))  # in mm, on the same grid
  np.testing.assert_array_equal(load_label_map(tmp_path / "label.nii", volume.geometry),
                                volume.array[0])


@pytest.mark.parametrize("origin", [(5, 6, 7), (5, 6, 107)])
def test_forms_along_the_patients_axes_lie_where_simpleitk_sees_them(tmp_path, origin):
  """ITK does not tell an axis from its reverse, if both forms have one origin."""
  qform = np.diag([-1.0, -2, 3, 1])
  qform[:3, 3] = 5, 6, 7
  for order in itertools.permutations(range(3)):
    for signs in itertools.product((1, -1), repeat=3):
      sform = np.eye(4)
      sform[:3, :3] = np.eye(3)[:, order] @ np.diag(signs) @ np.diag([1, 2, 3])
      sform[:3, 3] = origin
      path = save(tmp_path / "scan.nii", qform, 1, sform, 2)
      geometry = load_image(path).geometry
      np.testing.assert_allclose(geometry.affine, itk_affine(path), atol=1e-4)
      assert bool(geometry.remarks) == (not np.allclose(qform, sform))
  save(tmp_path / "scan.nii", QFORM, 1, affine_of(sizes=(-1, 2, 3)), 2)
  with pytest.raises(UserError, match="mirror images of each other"):
    load_image(tmp_path / "scan.nii")


@pytest.mark.parametrize("qfac", [0, -1, 1])
def test_the_sign_of_the_third_axis_is_taken_as_simpleitk_takes_it(tmp_path, qfac):
  path = save(tmp_path / "scan.nii", qcode=1)
  _patch(path, 76, qfac)
  np.testing.assert_allclose(load_image(path).geometry.affine, itk_affine(path), atol=1e-4)


def _patch(path, at, value):
  """float32 at a byte of a header; nibabel would mend what it writes."""
  content = bytearray(path.read_bytes())
  content[at:at + 4] = np.float32(value).tobytes()
  path.write_bytes(content)


@pytest.mark.parametrize("size", [0, -1, np.nan])
@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1)])
def test_voxel_sizes_that_are_not_above_0_are_refused(tmp_path, codes, size):
  """nibabel makes them positive, ITK mirrors the axis."""
  path = save(tmp_path / "scan.nii", qcode=codes[0], sform=QFORM, scode=codes[1])
  _patch(path, 80, size)
  with pytest.raises(UserError, match=f"pixdim. are {size:g} x 2 x 3, not above 0"):
    load_image(path)


def test_a_file_without_a_transform_says_that_no_side_is_known(tmp_path):
  volume = load_image(save(tmp_path / "scan.nii"))
  assert "nothing says which side is left" in volume.geometry.remarks[0]
  np.testing.assert_array_equal(volume.array[0], VOXELS.T)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1)])
def test_one_point_in_time_is_no_axis(tmp_path, shape):
  volume = load_image(save(tmp_path / "scan.nii", qcode=1, shape=shape))
  assert volume.array.shape == (1, *volume.geometry.canonical_shape)
  load_label_map(tmp_path / "scan.nii", volume.geometry)


def test_components_of_a_vector_are_channels(tmp_path):
  """SimpleITK writes them along the fifth axis."""
  parts = [sitk.GetImageFromArray(VOXELS.T), sitk.GetImageFromArray(2 * VOXELS.T)]
  sitk.WriteImage(sitk.Compose(parts), str(tmp_path / "scan.nii"))
  array = load_image(tmp_path / "scan.nii", 2).array
  assert (array[1] == 2 * array[0]).all() and array[0].any()


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("degrees", [20, 0.6, 0.4])
def test_a_grid_without_right_angles_is_refused_or_measured_by_its_determinant(
    tmp_path, ending, degrees):
  sheared = affine_of((0, 0, 0), origin=(0, 0, 0))
  sheared[1, 2] = np.tan(np.radians(degrees)) * sheared[2, 2]
  path = tmp_path / f"scan{ending}"
  if ending == ".nii":
    nib.save(nib.Nifti1Image(VOXELS, sheared), path)
  else:
    image = sitk.GetImageFromArray(VOXELS.T)
    sizes = np.linalg.norm(sheared[:3, :3], axis=0)
    image.SetSpacing(sizes.tolist())
    image.SetDirection((np.diag([-1, -1, 1]) @ sheared[:3, :3] / sizes).ravel().tolist())
    sitk.WriteImage(image, str(path))
  if degrees > 0.5:
    with pytest.raises(UserError, match=f"{degrees:.1f} degrees from right angles") as error:
      load_image(path)
    assert str(error.value).startswith(f"{path}: ")
    return
  geometry = load_image(path).geometry
  assert geometry.voxel_ml == pytest.approx(abs(np.linalg.det(sheared)) / 1000, rel=2e-6)
  write_label_map(tmp_path / "out.nii", np.ones((7, 6, 5), np.uint8), geometry)
  np.testing.assert_allclose(nib.load(tmp_path / "out.nii").affine, geometry.affine, atol=1e-5)
  load_label_map(tmp_path / "out.nii", geometry)
