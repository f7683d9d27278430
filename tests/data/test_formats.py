"""Formats besides NIfTI, against SimpleITK, pydicom and pynrrd: in, out, and what is refused."""

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation
from tests_data import save_series

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data import itk
from rfmedsam2_jax.data.colours import colour
from rfmedsam2_jax.data.inputs import find_inputs
from rfmedsam2_jax.data.segmentations import write_itksnap_labels, write_segmentation
from rfmedsam2_jax.data.volumes import load_image, load_label_map

NAMES = {1: "liver", 4: "left  kidney"}


def oblique(seed: int = 0, size=(7, 6, 5)) -> sitk.Image:
  """int16 [k, j, i] of any turn and spacing."""
  rng = np.random.default_rng(seed)
  image = sitk.GetImageFromArray(rng.integers(-900, 900, size[::-1]).astype(np.int16))
  image.SetSpacing(rng.uniform(0.5, 4, 3).tolist())
  image.SetOrigin(rng.uniform(-200, 200, 3).tolist())
  image.SetDirection(Rotation.random(random_state=seed).as_matrix().ravel().tolist())
  return image


def world_of(image: sitk.Image, index) -> np.ndarray:
  return np.array(image.TransformIndexToPhysicalPoint([int(i) for i in index])) * (-1, -1, 1)


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd", ".nii.gz", "dicom"])
@pytest.mark.parametrize("seed", range(3))
def test_every_format_gives_the_voxels_and_the_places_that_simpleitk_gives(tmp_path, ending, seed):
  image = oblique(seed)
  path = tmp_path / f"scan{ending}"
  if ending == "dicom":
    save_series(path, image)
  else:
    sitk.WriteImage(image, str(path))
  volume = load_image(path)
  affine = volume.geometry.canonical_affine
  array = sitk.GetArrayFromImage(image)
  for z, y, x in np.ndindex(volume.array.shape[1:]):
    place = (affine @ (z, y, x, 1))[:3]
    index = image.TransformPhysicalPointToIndex((place * (-1, -1, 1)).tolist())
    np.testing.assert_allclose(world_of(image, index), place, atol=1e-3)
    assert volume.array[0, z, y, x] == array[index[::-1]]
  native = volume.geometry.to_native(volume.array[0])
  np.testing.assert_array_equal(native, array.T)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_components_and_a_fourth_axis_are_channels(tmp_path, ending):
  parts = [oblique(0), oblique(0) * 2]
  sitk.WriteImage(sitk.Compose(parts), str(tmp_path / f"components{ending}"))
  sitk.WriteImage(sitk.JoinSeries(parts), str(tmp_path / f"axis{ending}"))
  first = load_image(tmp_path / f"components{ending}", 2)
  second = load_image(tmp_path / f"axis{ending}", 2)
  assert first.array.shape[0] == 2 and (first.array[1] == 2 * first.array[0]).all()
  np.testing.assert_array_equal(first.array, second.array)
  np.testing.assert_allclose(first.geometry.affine, second.geometry.affine)


@pytest.mark.parametrize("ending", [".nii.gz", ".seg.nrrd"])
@pytest.mark.parametrize("source", [".nrrd", ".nii.gz", "dicom"])
def test_label_maps_lie_where_simpleitk_sees_their_image(tmp_path, source, ending):
  image = oblique(4)
  path = tmp_path / f"scan{source}"
  save_series(path, image) if source == "dicom" else sitk.WriteImage(image, str(path))
  volume = load_image(path)
  labels = (volume.array[0] > 200).astype(np.uint8) * 4
  write_segmentation(tmp_path / f"out{ending}", labels, volume.geometry, NAMES)
  written = sitk.ReadImage(str(tmp_path / f"out{ending}"))
  assert written.GetSize() == image.GetSize()
  np.testing.assert_array_equal(
    sitk.GetArrayFromImage(written), (sitk.GetArrayFromImage(image) > 200) * 4
  )
  for corner in np.ndindex(2, 2, 2):
    index = np.array(corner) * (np.array(image.GetSize()) - 1)
    np.testing.assert_allclose(world_of(written, index), world_of(image, index), atol=1e-3)
  again = load_label_map(tmp_path / f"out{ending}", volume.geometry)
  np.testing.assert_array_equal(again, labels)


def test_a_segmentation_of_a_volume_in_micrometres_is_in_millimetres(tmp_path):
  image = nib.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.diag([500.0, 600, 700, 1]))
  image.header.set_xyzt_units("micron")
  nib.save(image, tmp_path / "scan.nii.gz")
  volume = load_image(tmp_path / "scan.nii.gz")
  write_segmentation(tmp_path / "a.seg.nrrd", volume.array[0].astype(np.uint8), volume.geometry, {})
  np.testing.assert_allclose(sitk.ReadImage(str(tmp_path / "a.seg.nrrd")).GetSpacing(),
                             (0.5, 0.6, 0.7), rtol=1e-6)


def test_slicers_fields_are_read_by_pynrrd(tmp_path):
  sitk.WriteImage(oblique(), str(tmp_path / "scan.nrrd"))
  volume = load_image(tmp_path / "scan.nrrd")
  native = np.zeros(volume.geometry.shape, np.uint8)
  native[2:5, 1:3, 4] = 4
  labels = volume.geometry.to_canonical(native)
  path = tmp_path / "scan.seg.nrrd"
  write_segmentation(path, labels, volume.geometry, NAMES)
  array, header = nrrd.read(str(path))
  np.testing.assert_array_equal(array, native)
  assert header["space"] == "left-posterior-superior" and header["encoding"] == "gzip"
  np.testing.assert_allclose(
    np.column_stack([header["space directions"].T, header["space origin"]]),
    volume.geometry.affine[:3] * [[-1], [-1], [1]], rtol=1e-6,
  )
  assert header["Segmentation_SourceRepresentation"] == "Binary labelmap"
  assert [header[f"Segment{n}_Name"] for n in (0, 1)] == ["liver", "left kidney"]
  assert [header[f"Segment{n}_LabelValue"] for n in (0, 1)] == ["1", "4"]
  assert [header[f"Segment{n}_Extent"] for n in (0, 1)] == ["0 -1 0 -1 0 -1", "2 4 1 2 4 4"]
  assert header["Segment0_ID"] != header["Segment1_ID"]
  shown = np.array(header["Segment1_Color"].split(), float) * 255
  np.testing.assert_allclose(shown, colour(1), atol=0.01)
  before = path.read_bytes()
  write_segmentation(path, labels, volume.geometry, NAMES)
  assert path.read_bytes() == before


def test_itksnap_label_descriptions_have_its_eight_columns(tmp_path):
  write_itksnap_labels(tmp_path / "labels.txt", {1: "liver", 300: 'a "b"'})
  rows = [line.split(maxsplit=7) for line in (tmp_path / "labels.txt").read_text().splitlines()]
  assert [row[0] for row in rows] == ["0", "1", "300"]
  assert [row[7] for row in rows] == ['"Clear Label"', '"liver"', '"a \'b\'"']
  assert tuple(map(int, rows[2][1:4])) == colour(1)


def test_neighbouring_colours_differ():
  for i in range(60):
    for j in range(i + 1, min(i + 4, 60)):
      assert np.abs(np.subtract(colour(i), colour(j))).max() > 40, (i, j)


def test_folders_of_mixed_formats_are_cases(tmp_path):
  sitk.WriteImage(oblique(), str(tmp_path / "a.nrrd"))
  sitk.WriteImage(oblique(), str(tmp_path / "b.mha"))
  save_series(tmp_path / "c", oblique())
  (tmp_path / "notes").mkdir()
  assert [case.identifier for case in find_inputs([tmp_path])] == ["a", "b", "c"]
  assert [case.identifier for case in find_inputs([tmp_path / "c"])] == ["c"]
  for name in ("d_0000", "d_0001"):
    save_series(tmp_path / name, oblique())
  (case,) = find_inputs([tmp_path / "d_0000"], 2)
  assert case.identifier == "d" and len(case.images) == 2


def _bad_series(tmp_path, what):
  folder = tmp_path / "series"
  if what == "two":
    save_series(folder, oblique(), series="1.2.4")
  if what == "same":
    save_series(folder, oblique(), shift=0)
    for file in sorted(folder.iterdir())[:2]:
      other = pydicom.dcmread(file)
      other.SOPInstanceUID += ".7"
      other.save_as(file.with_name("b" + file.name))
    return folder
  return save_series(
    folder, oblique(size=(7, 6, 1)) if what == "one" else oblique(),
    skip=(2,) if what == "gap" else (), shift=0.4 if what == "tilt" else 0.0,
  )


@pytest.mark.parametrize(("what", "says"), [
  ("two", "has 2 series"), ("gap", "mm apart, others"), ("tilt", "gantry tilt"),
  ("one", "is a single slice"), ("same", "has the same position"),
])
def test_series_that_are_no_volume_are_refused(tmp_path, what, says):
  folder = _bad_series(tmp_path, what)
  with pytest.raises(UserError, match=says) as error:
    load_image(folder)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_files_are_an_error(tmp_path, ending, compressed):
  path = tmp_path / f"scan{ending}"
  sitk.WriteImage(oblique(size=(30, 30, 30)), str(path), useCompression=compressed)
  path.write_bytes(path.read_bytes()[:-400])
  with pytest.raises(UserError, match="truncated") as error:
    load_image(path)
  assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_header_that_claims_terabytes_is_not_believed(tmp_path):
  path = tmp_path / "scan.nrrd"
  sitk.WriteImage(oblique(), str(path))
  path.write_bytes(path.read_bytes().replace(b"sizes: 7 6 5", b"sizes: 70000 60000 500"))
  with pytest.raises(UserError, match="claims 70000x60000x500"):
    load_image(path)


def test_complex_voxels_and_two_axes_are_refused(tmp_path):
  sitk.WriteImage(sitk.Cast(oblique(), sitk.sitkComplexFloat32), str(tmp_path / "c.mha"))
  sitk.WriteImage(oblique()[:, :, 2], str(tmp_path / "flat.mha"))
  for name, says in (("c", "complex"), ("flat", "three axes")):
    with pytest.raises(UserError, match=says):
      load_image(tmp_path / f"{name}.mha")


def test_without_simpleitk_the_line_names_the_extra(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
  with pytest.raises(UserError, match=r"scan.mha: needs SimpleITK.*rfmedsam2-jax\[dicom\]"):
    itk.simpleitk("scan.mha")
