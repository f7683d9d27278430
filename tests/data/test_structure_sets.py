"""Structure sets of DICOM: outlines against matplotlib's paths, files against pydicom."""

import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Outline
from scipy import ndimage
from test_dicom import _store_otherwise, save, slices
from test_formats import oblique
from tests_data import save_series

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data import contours
from rfmedsam2_jax.data.colours import colour
from rfmedsam2_jax.data.contours import filled, outlines
from rfmedsam2_jax.data.derived import Making
from rfmedsam2_jax.data.segmentations import write_segmentation
from rfmedsam2_jax.data.segments import load_by_name, load_masks, segments_of
from rfmedsam2_jax.data.volumes import load_image

NAMES = {2: "liver", 5: "right lung", 7: "tumour", 8: "nothing of it"}


def masks(count: int):
  rng = np.random.default_rng(0)
  for smooth in np.linspace(0, 2.5, count):
    yield ndimage.gaussian_filter(rng.normal(size=(31, 26)), smooth) > 0


def even_odd(polygons, shape) -> np.ndarray:
  """By matplotlib: pixels whose centres lie in an odd number of polygons."""
  rows, columns = np.indices(shape)
  places = np.column_stack([columns.ravel(), rows.ravel()])
  found = np.zeros(len(places), bool)
  for polygon in polygons:
    found ^= Outline(np.concatenate([polygon, polygon[:1]])).contains_points(places)
  return found.reshape(shape)


def test_outlines_hold_their_mask_to_the_pixel_as_matplotlib_sees_them():
  for mask in masks(8):
    rings = outlines(mask)
    np.testing.assert_array_equal(even_odd(rings, mask.shape), mask)
    np.testing.assert_array_equal(filled(rings, mask.shape), mask)
    # Every part of it is one polygon, whatever its holes: no polygon lies in another's hole alone.
    parts = ndimage.label(mask, np.ones((3, 3)))[1], ndimage.label(mask)[1]
    assert parts[0] <= len(rings) <= parts[1]
  assert outlines(np.zeros((4, 5), bool)) == []


def test_polygons_of_any_shape_are_filled_as_matplotlib_fills_them(monkeypatch):
  monkeypatch.setattr(contours, "_ON_EDGE", 0.0)
  rng = np.random.default_rng(1)
  for _ in range(30):
    polygons = [rng.uniform(-8, 38, (rng.integers(3, 9), 2)) for _ in range(2)]
    np.testing.assert_array_equal(filled(polygons, (31, 26)), even_odd(polygons, (31, 26)))


def test_an_outline_through_the_centres_of_pixels_holds_them():
  """As programs draw that follow the outermost pixels of a mask; a hole is such an outline, too."""
  ring = np.array([[2, 2], [8, 2], [8, 9], [2, 9.0]])
  hole = np.array([[4, 4], [6, 4], [6, 7], [4, 7.0]])
  expected = np.zeros((12, 12), bool)
  expected[2:10, 2:9] = True
  np.testing.assert_array_equal(filled([ring], expected.shape), expected)
  expected[5:7, 5:6] = False
  np.testing.assert_array_equal(filled([ring, hole], expected.shape), expected)


def labels_of(volume) -> np.ndarray:
  rng = np.random.default_rng(3)
  blurred = ndimage.gaussian_filter(rng.normal(size=volume.array.shape[1:]), (0, 1, 1))
  labels = np.select([blurred > 0.2, blurred > 0, blurred < -0.4], [2, 5, 7], 0)
  return labels.astype(np.uint8)


@pytest.mark.parametrize("flips", [(1, 1, 1), (1, -1, 1), (-1, 1, -1)])
def test_a_structure_set_is_read_again(tmp_path, flips):
  image = oblique(4, (22, 17, 5))
  image.SetDirection((np.reshape(image.GetDirection(), (3, 3)) * flips).ravel().tolist())
  volume = load_image(save_series(tmp_path / "series", image))
  labels = labels_of(volume)
  write_segmentation(tmp_path / "a.rtstruct.dcm", labels, volume.geometry, NAMES)
  np.testing.assert_array_equal(
    load_by_name(tmp_path / "a.rtstruct.dcm", volume.geometry, {}), labels)
  assert {s.value: s.name for s in segments_of(tmp_path / "a.rtstruct.dcm")} == NAMES


def test_outlines_lie_on_their_own_slices_as_pydicom_has_them(tmp_path):
  """Positions that are not quite even, and a slice that is stored otherwise than most."""
  rng = np.random.default_rng(0)
  datasets = slices(rng.integers(-900, 900, (6, 24, 30)))
  for z, one in enumerate(datasets):
    one.ImagePositionPatient[2] = f"{40 + 5 * z + 0.1 * (z % 2):.3f}"
    if z == 2:
      pixels = np.frombuffer(one.PixelData, "<u2").astype(int).reshape(24, 30)
      _store_otherwise(one, pixels, True, (1, -1))
  volume = load_image(save(datasets, tmp_path / "series"))
  labels = labels_of(volume)
  write_segmentation(tmp_path / "a.rtstruct.dcm", labels, volume.geometry, NAMES, Making(True))
  written = pydicom.dcmread(tmp_path / "a.rtstruct.dcm")
  by_uid = {one.SOPInstanceUID: one for one in datasets}
  for place, (roi, (value, _)) in enumerate(
      zip(written.ROIContourSequence, NAMES.items(), strict=True)):
    assert roi.ReferencedROINumber == value and tuple(roi.ROIDisplayColor) == colour(place)
    by_slice = {}
    for contour in roi.get("ContourSequence", ()):
      uid = contour.ContourImageSequence[0].ReferencedSOPInstanceUID
      points = np.reshape(np.array(contour.ContourData, float), (-1, 3))
      assert contour.NumberOfContourPoints == len(points)
      np.testing.assert_allclose(points[:, 2], float(by_uid[uid].ImagePositionPatient[2]),
                                 atol=1e-4)
      by_slice.setdefault(uid, []).append((points[:, :2] - (-7, 11)) / (3, 2))
    for z, one in enumerate(datasets):
      found = even_odd(by_slice.get(one.SOPInstanceUID, ()), labels.shape[1:])
      np.testing.assert_array_equal(found, labels[z] == value)
  assert written.ROIContourSequence[3].get("ContourSequence") is None


def test_a_structure_set_says_what_each_structure_is_and_of_which_images(tmp_path):
  datasets = slices()
  volume = load_image(save(datasets, tmp_path / "series"))
  write_segmentation(tmp_path / "a.rtstruct.dcm", labels_of(volume), volume.geometry, NAMES,
                     Making(True, {}, {"runs": "btcv"}))
  written = pydicom.dcmread(tmp_path / "a.rtstruct.dcm")
  (frame,) = written.ReferencedFrameOfReferenceSequence
  (series,) = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
  assert frame.FrameOfReferenceUID == "1.2.8" and series.SeriesInstanceUID == "1.2.3"
  assert [i.ReferencedSOPInstanceUID for i in series.ContourImageSequence] == [
    one.SOPInstanceUID for one in datasets]
  said = [item.RTROIIdentificationCodeSequence[0] for item in written.RTROIObservationsSequence]
  assert [one.CodeValue for one in said] == ["10200004", "39607008", "108369006", "111099"]
  assert [item.RTROIInterpretedType for item in written.RTROIObservationsSequence] == [
    "ORGAN", "ORGAN", "", ""]
  for roi in written.StructureSetROISequence:
    assert roi.ROIGenerationAlgorithm == "AUTOMATIC"
    assert roi.ROIDerivationAlgorithmIdentificationSequence[0].AlgorithmName == "rfmedsam2_jax"
  assert (written.PatientID, written.StudyInstanceUID) == ("P", "1.2")


def drawn(rois, frame="1.2.8"):
  """By pydicom alone: name, geometric type and points of every contour."""
  one = slices()[0]
  one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = pydicom.uid.RTStructureSetStorage
  del one.PixelData, one.Rows, one.Columns, one.FrameOfReferenceUID
  one.Modality, one.StructureSetROISequence, one.ROIContourSequence = "RTSTRUCT", [], []
  for number, (name, drawings) in enumerate(rois.items()):
    roi, item = pydicom.Dataset(), pydicom.Dataset()
    item.ROINumber, item.ROIName, item.ReferencedFrameOfReferenceUID = number, name, frame
    roi.ReferencedROINumber, roi.ContourSequence = number, []
    for kind, points in drawings:
      contour = pydicom.Dataset()
      contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
      contour.ContourData = np.ravel(points).tolist()
      roi.ContourSequence.append(contour)
    one.StructureSetROISequence.append(item)
    one.ROIContourSequence.append(roi)
  return one


def box(low, high, z, kind="CLOSED_PLANAR"):
  """Between pixels (column, row) on slice z of `slices`, through the middle between centres."""
  (a, b), (c, d) = (np.array([-7, 11]) + (np.array(p) - 0.5) * (3, 2) for p in (low, high))
  height = 40 + 5 * z
  return kind, [[a, b, height], [c, b, height], [c, d, height], [a, d, height]]


@pytest.fixture
def volume(tmp_path):
  return load_image(save(slices(), tmp_path / "series"))


@pytest.mark.parametrize("kind", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR"])
def test_a_ring_of_two_outlines_has_a_hole_and_points_are_no_structure(tmp_path, volume, kind):
  drawn({
    "BODY": [box((0, 0), (12, 8), z) for z in range(6)],
    "Isocentre": [("POINT", [[0, 20, 45]])],
    "Liver": [box((1, 1), (9, 7), 2, kind), box((3, 3), (5, 5), 2, kind), box((2, 2), (4, 4), 3)],
  }).save_as(tmp_path / "a.dcm", enforce_file_format=True)
  expected = np.zeros(volume.array.shape[1:], int)
  expected[2, 1:7, 1:9], expected[3, 2:4, 2:4] = 3, 3
  expected[2, 3:5, 3:5] = 0
  found = load_by_name(tmp_path / "a.dcm", volume.geometry, {"liver": 3}, of_data_set=True)
  np.testing.assert_array_equal(found, expected)
  masks = {name: (value, mask) for value, name, mask in load_masks(tmp_path / "a.dcm",
                                                                   volume.geometry)}
  assert set(masks) == {"BODY", "Liver"} and masks["BODY"][1].all()
  assert masks["BODY"][0] == 3 and masks["Liver"][0] == 2  # a number 0 is the background's


@pytest.mark.parametrize(("contours", "frame", "says"), [
  ([box((1, 1), (5, 5), 2.4)], "1.2.8", "has an outline that lies on no slice of"),
  ([box((1, 1), (5, 5), 9)], "1.2.8", "'Liver' has an outline outside of"),
  ([("CLOSED_PLANAR", [[0, 15, 45], [9, 15, 50], [9, 21, 50]])], "1.2.8", "lies on no slice"),
  ([box((1, 1), (5, 5), 2)], "1.2.99", "has another frame of reference"),
])
def test_outlines_that_are_on_no_slice_of_the_image_are_refused(
    tmp_path, volume, contours, frame, says):
  drawn({"none": [], "Liver": contours}, frame).save_as(tmp_path / "a.dcm",
                                                        enforce_file_format=True)
  with pytest.raises(UserError, match=says) as error:
    load_by_name(tmp_path / "a.dcm", volume.geometry, {})
  assert str(error.value).startswith(f"{tmp_path / 'a.dcm'}: ") and "\n" not in str(error.value)
