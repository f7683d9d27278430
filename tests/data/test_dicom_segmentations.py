"""Segmentations of DICOM, written and read, against dcmqi, highdicom, pydicom and SimpleITK."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.sr._concepts_dict import concepts
from test_dicom import _store_otherwise, save, slices
from test_formats import oblique
from tests_data import save_series

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data import terms
from rfmedsam2_jax.data.colours import colour
from rfmedsam2_jax.data.derived import Making
from rfmedsam2_jax.data.segmentations import write_segmentation
from rfmedsam2_jax.data.segments import load_by_name, load_masks, segments_of
from rfmedsam2_jax.data.volumes import load_image, load_label_map

NAMES = {1: "liver", 4: "Left kidney", 9: "something odd"}
KINDS = (".seg.dcm", ".labelmap.dcm")
HOW = Making(True, {}, {"runs": "btcv"})


def labels_of(volume) -> np.ndarray:
  """Two structures of scattered voxels, and slices without any."""
  found = ((volume.array[0] > 300) * 4 + (volume.array[0] < -500)).astype(np.uint8)
  native = volume.geometry.to_native(found).copy()
  native[:, :, [0, 2]] = 0
  return volume.geometry.to_canonical(native)


def dcmqi(tool: str, *arguments) -> None:
  done = subprocess.run([Path(sys.executable).with_name(tool), *map(str, arguments)],
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


def as_dcmqi_reads(path: Path, folder: Path) -> tuple[dict[int, set], list[dict]]:
  """The places, LPS in micrometres, of each segment's voxels; and what is said of them."""
  folder.mkdir()
  dcmqi("segimage2itkimage", "--inputDICOM", path, "--outputDirectory", folder)
  places = {}
  for file in folder.glob("*.nrrd"):
    image = sitk.ReadImage(str(file))
    array = sitk.GetArrayFromImage(image)
    places[int(file.stem)] = places_of(image, array != 0)
  return places, sum(json.loads((folder / "meta.json").read_text())["segmentAttributes"], [])


def places_of(image: sitk.Image, mask: np.ndarray) -> set:
  return {tuple(np.rint(1e2 * np.array(image.TransformIndexToPhysicalPoint(
    [int(i) for i in index[::-1]]))).astype(int)) for index in np.argwhere(mask)}


def close(ours: set, theirs: set) -> bool:
  """Whether two sets of places are one, up to 0.03 mm of rounded headers."""
  a, b = (np.array(sorted(places)) for places in (ours, theirs))
  distance = np.abs(a[:, None] - b[None]).max(axis=2)
  return len(a) == len(b) and (distance.min(axis=1) <= 3).all()


def turned(seed: int, flips) -> sitk.Image:
  """Columns, rows or slices may run the other way."""
  image = oblique(seed, (9, 7, 6))
  direction = np.reshape(image.GetDirection(), (3, 3)) * flips
  image.SetDirection(direction.ravel().tolist())
  return image


@pytest.mark.parametrize(("seed", "flips"), [(0, (1, 1, 1)), (1, (1, -1, 1)), (2, (-1, 1, -1)),
                                             (3, (1, 1, -1))])
def test_dcmqi_sees_every_voxel_where_simpleitk_sees_it_in_the_image(tmp_path, seed, flips):
  image = turned(seed, flips)
  volume = load_image(save_series(tmp_path / "series", image))
  path = tmp_path / "a.seg.dcm"
  labels = labels_of(volume)
  write_segmentation(path, labels, volume.geometry, NAMES, HOW)
  places, said = as_dcmqi_reads(path, tmp_path / "out")
  array = sitk.GetArrayFromImage(image)
  order = np.arange(len(array))[:: 1 if np.prod(flips) > 0 else -1]  # as the stack is read
  for number, mask in ((1, array < -500), (2, array > 300)):
    mask = mask.copy()
    mask[order[[0, 2]]] = False
    assert close(places[number], places_of(image, mask))
  assert [one["SegmentLabel"] for one in said] == list(NAMES.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flips", [(1, 1, 1), (1, -1, 1), (-1, -1, -1)])
def test_what_is_written_is_read_again_onto_any_grid_of_the_image(tmp_path, kind, flips):
  image = turned(5, flips)
  volume = load_image(save_series(tmp_path / "series", image))
  labels, path = labels_of(volume), tmp_path / f"a{kind}"
  write_segmentation(path, labels, volume.geometry, NAMES)
  assert {s.value: s.name for s in segments_of(path)} == NAMES
  np.testing.assert_array_equal(load_by_name(path, volume.geometry, {}), labels)
  sitk.WriteImage(sitk.PermuteAxes(image, [2, 0, 1]), str(tmp_path / "other.nrrd"))
  other = load_image(tmp_path / "other.nrrd").geometry  # the image, converted by somebody
  np.testing.assert_array_equal(load_label_map(path, other), labels)


def test_each_structure_has_its_term_its_colour_and_the_algorithm(tmp_path):
  volume = load_image(save_series(tmp_path / "series", oblique(0)))
  codes = {"something odd": "SCT 244453006 Optic chiasm"}
  for kind in KINDS:
    write_segmentation(tmp_path / f"a{kind}", labels_of(volume), volume.geometry, NAMES, HOW)
  write_segmentation(tmp_path / "b.seg.dcm", labels_of(volume), volume.geometry, NAMES,
                     Making(codes=codes))
  _, said = as_dcmqi_reads(tmp_path / "a.seg.dcm", tmp_path / "out")
  for place, one in enumerate(said):
    assert np.abs(np.subtract(one["recommendedDisplayRGBValue"], colour(place))).max() <= 1
    assert one["SegmentAlgorithmType"] == "AUTOMATIC"
    assert one["SegmentAlgorithmName"] == "rfmedsam2_jax"
  kinds = [one["SegmentedPropertyTypeCodeSequence"] for one in said]
  assert [kind["CodeValue"] for kind in kinds] == ["10200004", "64033007", "111099"]
  side = said[1]["SegmentedPropertyTypeModifierCodeSequence"]
  assert (side["CodeMeaning"], side["CodingSchemeDesignator"]) == ("Left", "SCT")
  for kind in KINDS:
    numbers = [one.SegmentNumber for one in hd.seg.segread(tmp_path / f"a{kind}").SegmentSequence]
    assert numbers == ([1, 2, 3] if kind == ".seg.dcm" else [0, 1, 4, 9])
  odd = pydicom.dcmread(tmp_path / "b.seg.dcm").SegmentSequence[2]
  assert odd.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Optic chiasm"
  assert odd.SegmentAlgorithmType == "SEMIAUTOMATIC"
  algorithm = pydicom.dcmread(tmp_path / "a.seg.dcm").SegmentSequence[0][
    "SegmentationAlgorithmIdentificationSequence"][0]
  assert algorithm.AlgorithmVersion and algorithm.AlgorithmParameters == "runs=btcv"


def test_the_terms_of_the_table_are_those_of_the_standard():
  known = {(code, meaning) for found in concepts["SCT"].values()
           for code, (meaning, _) in found.items()}
  for term in terms._TABLE.values():
    assert (term.type.value, term.type.meaning) in known, term
  assert {(side.value, side.meaning) for side in terms.SIDES.values()} <= known
  assert terms.term_of("kidney_right").side == terms.SIDES["right"]
  assert terms.term_of("left atrium").side is None  # its code says it
  for name in ("label 3", "left", "prostate/uterus", "right left kidney", "kidney stone"):
    assert not terms.term_of(name).known, name


@pytest.mark.parametrize("kind", KINDS)
def test_frames_lie_where_their_own_slices_say_and_refer_to_them(tmp_path, kind):
  """Positions that are not quite even, and slices that are stored otherwise than most."""
  datasets = slices()
  for z, one in enumerate(datasets):
    one.PatientName, one.SpecificCharacterSet = "Müller^Jörg", "ISO_IR 100"
    one.ImagePositionPatient[2] = f"{40 + 5 * z + 0.1 * (z % 2):.3f}"
    if z in (1, 4):
      pixels = np.frombuffer(one.PixelData, "<u2").astype(int).reshape(8, 12)
      _store_otherwise(one, pixels, True, (-1, 1))
  volume = load_image(save(datasets, tmp_path / "series"))
  labels = np.full(volume.geometry.canonical_shape, 1, np.uint8)
  labels[:, 2:5, 3:6] = 4
  path = tmp_path / f"a{kind}"
  write_segmentation(path, labels, volume.geometry, NAMES)
  np.testing.assert_array_equal(load_by_name(path, volume.geometry, {}), labels)
  written = pydicom.dcmread(path)
  assert written.PatientName == "Müller^Jörg" and written.StudyInstanceUID == "1.2"
  assert written.FrameOfReferenceUID == "1.2.8" and written.Modality == "SEG"
  by_uid = {one.SOPInstanceUID: one for one in datasets}
  seen = set()
  for frame in written.PerFrameFunctionalGroupsSequence:
    (source,) = frame.DerivationImageSequence[0].SourceImageSequence
    one = by_uid[source.ReferencedSOPInstanceUID]
    otherwise = one.Rows != 8
    place = frame.PlanePositionSequence[0].ImagePositionPatient
    assert place[2] == one.ImagePositionPatient[2]
    assert list(place[:2]) == [-7, 11]
    assert source.SpatialLocationsPreserved == ("REORIENTED_ONLY" if otherwise else "YES")
    seen.add(one.SOPInstanceUID)
  assert seen == set(by_uid)


@pytest.mark.parametrize("ending", [*KINDS, ".rtstruct.dcm"])
def test_slices_whose_distances_drift_are_kept_apart(tmp_path, ending):
  datasets = slices(np.random.default_rng(0).integers(-900, 900, (30, 5, 6)))
  for z, one in enumerate(datasets):
    one.ImagePositionPatient[2] = f"{40 + 5.1 * min(z, 15) + 4.9 * max(z - 15, 0):.2f}"
  volume = load_image(save(datasets, tmp_path / "series"))
  labels = (volume.array[0] > 100).astype(np.uint8)
  write_segmentation(tmp_path / f"a{ending}", labels, volume.geometry, {1: "liver"})
  np.testing.assert_array_equal(
    load_by_name(tmp_path / f"a{ending}", volume.geometry, {}), labels)


@pytest.mark.parametrize("ending", [*KINDS, ".rtstruct.dcm"])
def test_every_value_is_one_that_pydicom_takes_when_it_is_strict(tmp_path, ending, monkeypatch):
  volume = load_image(save(slices(), tmp_path / "series"))
  labels = (volume.array[0] > 0).astype(np.uint8)
  names = {1: "a name that is much longer than the 64 characters that DICOM has for it, \\ é 肝臓"}
  write_segmentation(tmp_path / f"a{ending}", labels, volume.geometry, names)
  monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
  monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", pydicom.config.RAISE)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    written = pydicom.dcmread(tmp_path / f"a{ending}")
    for element in written.iterall():
      assert element.value is not None
    written.save_as(tmp_path / "again.dcm", enforce_file_format=True)
  assert written.SpecificCharacterSet == "ISO_IR 192"


def dcmqi_writes(path: Path, series: Path, image: sitk.Image, label: str = "liver") -> None:
  array = (sitk.GetArrayFromImage(image) > 300).astype(np.uint8)
  mask = sitk.GetImageFromArray(array)
  mask.CopyInformation(image)
  sitk.WriteImage(mask, str(path.with_suffix(".nrrd")))
  term = {"CodeValue": "10200004", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Liver"}
  about = {
    "ContentCreatorName": "Reader1", "ClinicalTrialSeriesID": "1", "ClinicalTrialTimePointID": "1",
    "SeriesDescription": "s", "SeriesNumber": "300", "InstanceNumber": "1", "BodyPartExamined": "",
    "segmentAttributes": [[{
      "labelID": 1, "SegmentDescription": label, "SegmentLabel": label,
      "SegmentAlgorithmType": "MANUAL", "SegmentedPropertyTypeCodeSequence": term,
      "SegmentedPropertyCategoryCodeSequence": {
        "CodeValue": "123037004", "CodingSchemeDesignator": "SCT",
        "CodeMeaning": "Anatomical Structure"}}]]}
  path.with_suffix(".json").write_text(json.dumps(about))
  dcmqi("itkimage2segimage", "--inputDICOMDirectory", series, "--inputImageList",
        path.with_suffix(".nrrd"), "--inputMetadata", path.with_suffix(".json"), "--outputDICOM",
        path)


@pytest.mark.parametrize("seed", range(2))
def test_what_dcmqi_writes_is_read(tmp_path, seed):
  image = turned(seed, (1, 1, 1))
  volume = load_image(save_series(tmp_path / "series", image))
  dcmqi_writes(tmp_path / "a.dcm", tmp_path / "series", image)
  found = load_by_name(tmp_path / "a.dcm", volume.geometry, {"spleen": 1, "Liver": 7})
  np.testing.assert_array_equal(found, (volume.array[0] > 300) * 7)


def _other_segmentation(volume, path, change=lambda one: None, fraction=None):
  """By highdicom: two segments that overlap."""
  native = np.zeros((*volume.geometry.shape[::-1], 2), np.uint8)
  native[:, 1:4, 1:5, 0], native[:, 2:5, 3:6, 1] = 1, 1
  sources = [pydicom.dcmread(one.path) for one in volume.geometry.series]
  for one in sources:
    one.PatientBirthDate = one.PatientSex = ""
    one.SliceThickness = 5
  algorithm = hd.AlgorithmIdentificationSequence("a", pydicom.sr.codedict.codes.DCM.
                                                 ArtificialIntelligence, "1")
  described = [hd.seg.SegmentDescription(
    n, name, pydicom.sr.coding.Code("123037004", "SCT", "Anatomical Structure"),
    pydicom.sr.codedict.codes.SCT.Liver, "AUTOMATIC", algorithm)
    for n, name in ((1, "liver"), (2, "BODY"))]
  pixels = native if fraction is None else native * fraction
  written = hd.seg.Segmentation(
    sources, pixels, "BINARY" if fraction is None else "FRACTIONAL", described, hd.UID(), 1,
    hd.UID(), 1, "m", "n", "1", "0")
  change(written)
  written.save_as(path)
  return native.transpose(2, 1, 0, 3)


@pytest.fixture
def volume(tmp_path):
  return load_image(save(slices(), tmp_path / "series"))


def test_segments_that_overlap_are_masks_and_no_label_map(tmp_path, volume):
  native = _other_segmentation(volume, tmp_path / "a.dcm")
  masks = load_masks(tmp_path / "a.dcm", volume.geometry)
  assert [(value, name) for value, name, _ in masks] == [(1, "liver"), (2, "BODY")]
  for (_, _, mask), n in zip(masks, range(2), strict=True):
    np.testing.assert_array_equal(volume.geometry.to_native(mask), native[..., n] == 1)
  with pytest.raises(UserError, match="a.dcm: 'BODY' overlaps other segments in "):
    load_by_name(tmp_path / "a.dcm", volume.geometry, {})
  with pytest.raises(UserError, match="a.dcm: has segments that overlap where a 3D label map"):
    load_label_map(tmp_path / "a.dcm", volume.geometry)


def test_what_a_data_set_does_not_name_is_left_out(tmp_path, volume, caplog):
  native = _other_segmentation(volume, tmp_path / "a.dcm")
  found = load_by_name(tmp_path / "a.dcm", volume.geometry, {"Liver": 5}, of_data_set=True)
  np.testing.assert_array_equal(volume.geometry.to_native(found), native[..., 0] * 5)
  assert "a.dcm: left out BODY, which the data set does not name" in caplog.text
  with pytest.raises(UserError, match="has the structures liver, BODY, none of which"):
    load_by_name(tmp_path / "a.dcm", volume.geometry, {"spleen": 5}, of_data_set=True)


def _by(distance):
  def change(one):
    places = [frame.PlanePositionSequence[0] for frame in one.PerFrameFunctionalGroupsSequence]
    for place in {id(place): place for place in places}.values():  # segments share them
      place.ImagePositionPatient[2] += distance
  return change


def _finer(one):
  one.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1, 1.5]


def _elsewhere(one):
  one.FrameOfReferenceUID = "1.2.99"


def _placeless(one):
  for frame in one.PerFrameFunctionalGroupsSequence:
    del frame.PlanePositionSequence


def _short(one):
  one.PixelData = one.PixelData[:20]


@pytest.mark.parametrize(("change", "fraction", "says"), [
  (_by(2), None, "has a frame that lies on no slice of"),
  (_by(5), None, "labels voxels outside of"),
  (_finer, None, "has a frame that lies on no slice of"),
  (_elsewhere, None, "has another frame of reference than"),
  (_placeless, None, "has a frame without PlanePositionSequence"),
  (_short, None, "cannot be read as DICOM"),
  (lambda one: None, 0.5, "is a fractional segmentation"),
])
def test_segmentations_that_are_not_of_the_image_are_refused(
    tmp_path, volume, change, fraction, says):
  _other_segmentation(volume, tmp_path / "a.dcm", change, fraction)
  with pytest.raises(UserError, match=says) as error:
    load_by_name(tmp_path / "a.dcm", volume.geometry, {})
  assert str(error.value).startswith(f"{tmp_path / 'a.dcm'}: ") and "\n" not in str(error.value)


def test_a_slice_is_no_label_map_and_rubbish_neither(tmp_path, volume):
  (tmp_path / "rubbish.dcm").write_bytes(b"rubbish " * 50)
  first = volume.geometry.series[0].path
  for path, says in ((first, "neither a segmentation nor a structure set"),
                     (tmp_path / "rubbish.dcm", "rubbish.dcm: "),
                     (tmp_path / "no.dcm", "no.dcm: does not exist")):
    with pytest.raises(UserError, match=says):
      load_by_name(path, volume.geometry, {})


@pytest.mark.parametrize("ending", [*KINDS, ".rtstruct.dcm"])
def test_only_dicom_becomes_dicom_and_nothing_is_left_behind(tmp_path, ending):
  nib.save(nib.Nifti1Image(np.ones((3, 4, 5), np.int16), np.eye(4)), tmp_path / "scan.nii")
  volume = load_image(tmp_path / "scan.nii")
  labels = np.ones(volume.geometry.canonical_shape, np.uint8)
  with pytest.raises(UserError, match="scan.nii: was not read from DICOM"):
    write_segmentation(tmp_path / f"a{ending}", labels, volume.geometry, {1: "liver"})
  datasets = slices()
  for one in datasets:
    del one.FrameOfReferenceUID
  volume = load_image(save(datasets, tmp_path / "series"))
  labels = np.ones(volume.geometry.canonical_shape, np.uint8)
  with pytest.raises(UserError, match="has no FrameOfReferenceUID, so DICOM cannot refer to it"):
    write_segmentation(tmp_path / f"a{ending}", labels, volume.geometry, {1: "liver"})
  assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.nii", "series"]
