"""Numbers for reports: what CASE.json and numbers.csv say of structures, and what is left out."""

import csv
import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from scipy import ndimage
from tests_data import save_series

import rfmedsam2_jax
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.files import load_json
from rfmedsam2_jax.data.volumes import load_image, load_label_map
from rfmedsam2_jax.report.predictions import CaseFile
from rfmedsam2_jax.segmentation.chosen import Choice, Removed, with_structures, without_small
from rfmedsam2_jax.segmentation.measured import numbers_of, write_table

NESTED = Labels((Structure("whole", (1, 2)), Structure("core", (2,))), True, (1, 2))


@pytest.fixture(scope="module")
def scans(phantoms) -> Path:
  return phantoms / "imagesTs"


def predict(*arguments) -> None:
  assert main(["predict", *map(str, arguments)]) == 0


def voxels(path: Path) -> np.ndarray:
  return np.asarray(nib.load(path).dataobj)


def details_of(folder: Path) -> dict[str, dict]:
  return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}


def table_of(folder: Path) -> list[dict[str, str]]:
  with open(folder / "numbers.csv", encoding="utf-8", newline="") as file:
    return list(csv.DictReader(file))


def test_numbers_are_those_of_simpleitk_on_an_oblique_grid(tmp_path):
  """Two channels that are stored as whole numbers, axes turned, flipped and of unlike lengths."""
  rng = np.random.default_rng(5)
  turn, _ = np.linalg.qr(np.eye(3) + 0.15 * rng.normal(size=(3, 3)))
  affine = np.eye(4)
  affine[:3, :3] = (turn * [0.8, 1.7, 3.1])[:, [2, 0, 1]] * [1, -1, 1]
  field = ndimage.gaussian_filter(rng.normal(size=(14, 24, 18)), 1.2)
  labels = np.select([field > 0.08, field < -0.08], [2, 7]).astype(np.uint8)
  labels[:2], labels[:, -1] = 0, 0  # so that not every side is touched
  files = [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"]
  for file, slope in zip(files, (1.0, 0.25), strict=True):
    image = nib.Nifti1Image(rng.integers(-900, 1500, labels.shape).astype(np.int16), affine)
    image.header.set_slope_inter(slope, -3)
    nib.save(image, file)
  nib.save(nib.Nifti1Image(labels, affine), tmp_path / "labels.nii.gz")
  volume = load_image(files, 2)
  found = load_label_map(tmp_path / "labels.nii.gz", volume.geometry).astype(np.uint8)
  structures = Labels((Structure("two", (2,)), Structure("none", (5,)), Structure("seven", (7,))),
                      False, (2, 5, 7))
  numbers = numbers_of(found, structures, volume, ["MR", "MR"], [Removed()] * 3)

  truth = sitk.ReadImage(str(tmp_path / "labels.nii.gz"))
  shape = sitk.LabelShapeStatisticsImageFilter()
  shape.Execute(truth)
  upright = sitk.GetArrayFromImage(sitk.DICOMOrient(truth, "LPS"))
  for value, mine in ((2, numbers[0]), (7, numbers[2])):
    count = int((upright == value).sum())
    assert count * volume.geometry.voxel_ml == pytest.approx(
      shape.GetPhysicalSize(value) / 1000, rel=1e-5)
    pieces = sitk.ConnectedComponentImageFilter()
    pieces.FullyConnectedOn()
    pieces.Execute(truth == value)
    assert mine.pieces == pieces.GetObjectCount() > 1
    faces = [(name, plane) for axis, names in enumerate((
      ("inferior", "superior"), ("anterior", "posterior"), ("right", "left")))
      for name, plane in zip(names, np.moveaxis(upright, axis, 0)[[0, -1]], strict=True)]
    assert list(mine.touches) == [name for name, plane in faces if (plane == value).any()]
    assert 0 < len(mine.touches) < 6
    for file, said in zip(files, (mine.intensities["MR_0"], mine.intensities["MR_1"]), strict=True):
      image = sitk.ReadImage(str(file), sitk.sitkFloat64)
      intensity = sitk.LabelIntensityStatisticsImageFilter()
      intensity.Execute(truth, image)
      assert said.mean == pytest.approx(intensity.GetMean(value), rel=1e-6)
      whole = intensity.GetStandardDeviation(value) * np.sqrt((count - 1) / count)
      assert said.std == pytest.approx(whole, rel=1e-6)
      inside = np.sort(sitk.GetArrayFromImage(image)[sitk.GetArrayFromImage(truth) == value])
      for share, percentile in ((0.05, said.p5), (0.95, said.p95)):
        at = share * (count - 1)
        assert inside[int(at)] <= percentile <= inside[int(np.ceil(at))]
  assert (numbers[1].pieces, numbers[1].touches) == (0, ())
  assert set(vars(numbers[1].intensities["MR_1"]).values()) == {None}


def test_pieces_of_regions_that_are_too_small_leave_what_is_around_them():
  """Pieces touch at a corner; a core goes back to its region, a region goes with its core."""
  found = np.zeros((1, 5, 9), np.uint8)
  found[0, 0:3, 0:3] = 1
  found[0, 3, 3] = 1  # by its corner a part of the nine
  found[0, 1, 1] = 2  # a core of one voxel
  found[0, 0:2, 5] = 1, 2  # a region of two, one of them core
  found[0, 4, 6:9] = 2  # core alone, three voxels
  kept, removed = without_small(found, NESTED, Choice(min_volume=0.3), 0.1)
  expected = found.copy()
  expected[0, 1, 1] = 1
  expected[0, 0:2, 5] = 0
  np.testing.assert_array_equal(kept, expected)
  assert removed == [Removed(1, 2), Removed(2, 2)]
  only, whole = Choice((0,)), found.copy()
  whole[found == 2] = 1
  np.testing.assert_array_equal(with_structures(found, NESTED, only), whole)
  # Without its region a core that is too small leaves background.
  core = with_structures(found, NESTED, Choice((1,)))
  np.testing.assert_array_equal(core, np.where(found == 2, 2, 0))
  kept, removed = without_small(core, NESTED, Choice((1,), 0.3), 0.1)
  assert kept[0, 1, 1] == 0 and removed == [Removed(), Removed(2, 2)]


def test_a_table_keeps_names_with_commas_and_bytes_that_are_no_text(tmp_path):
  numbers = {"pieces": 0, "removed_pieces": 0, "removed_ml": 0.0, "touches": [],
             "intensities": {"CT": {"mean": None}}}
  structures = {'vein, "left"': {"label": 3, "volume_ml": 0.0, "numbers": numbers}}
  for case in ("scan\udcff", "before"):
    content = json.dumps({"case": case, "structures": structures})
    (tmp_path / f"{len(case)}.json").write_text(content)
  (tmp_path / "other.json").write_text('{"mean": 1}')
  write_table(tmp_path)
  row, before = table_of(tmp_path)
  assert before["case"] == "before"
  assert row["structure"] == 'vein, "left"' and row["case"].startswith("scan")
  assert (row["volume_ml"], row["touches"], row["CT_mean"]) == ("0.0", "", "")


def test_chosen_structures_are_as_in_the_whole_and_small_pieces_are_counted(
  tiny_run, scans, tmp_path
):
  predict(tiny_run, scans, "--out", tmp_path / "all")
  whole = details_of(tmp_path / "all")
  assert [(row["case"], row["structure"]) for row in table_of(tmp_path / "all")] == [
    (case, name) for case, said in whole.items() for name in said["structures"]]
  names, least = ["spleen", "liver"], 0.7
  predict(tiny_run, scans, "--out", tmp_path / "some", "--structures", "spleen, liver",
          "--min-volume", least, "--save-stages", "--probabilities")
  rows, went = table_of(tmp_path / "some"), 0
  for case, said in details_of(tmp_path / "some").items():
    assert sorted(said["structures"]) == sorted(names) == sorted(said["files"]["probabilities"])
    assert said["min_volume_ml"] == least and not said["fast"]
    before, after = (voxels(tmp_path / f / f"{case}.nii.gz") for f in ("all", "some"))
    image = nib.load(scans / f"{case}_0000.nii.gz")
    voxel = abs(np.linalg.det(image.affine)) / 1000
    stage = voxels(tmp_path / "some" / "stage2" / f"{case}.nii.gz")
    expected = np.zeros_like(after)
    for name, found in said["structures"].items():
      mask = before == found["label"]
      np.testing.assert_array_equal(stage == found["label"], mask)
      pieces, count = ndimage.label(mask, np.ones((3, 3, 3)))
      sizes = np.bincount(pieces.ravel(), minlength=count + 1) * voxel
      large = [n for n in range(1, count + 1) if sizes[n] >= least]
      kept = np.isin(pieces, large)
      expected[kept] = found["label"]
      numbers, went = found["numbers"], went + count - len(large)
      assert numbers["pieces"] == len(large)
      assert numbers["removed_pieces"] == count - len(large)
      assert numbers["removed_ml"] == pytest.approx((mask & ~kept).sum() * voxel, rel=1e-4)
      assert found["volume_ml"] == pytest.approx(kept.sum() * voxel, rel=1e-4)
      assert found["stages"][-1]["volume_ml"] == whole[case]["structures"][name]["volume_ml"]
      (row,) = [r for r in rows if (r["case"], r["structure"]) == (case, name)]
      assert float(row["volume_ml"]) == found["volume_ml"]
      assert int(row["removed_pieces"]) == numbers["removed_pieces"]
      mean = numbers["intensities"]["CT"]["mean"]
      assert row["CT_mean"] == ("" if mean is None else str(mean))
      if kept.any():
        assert mean == pytest.approx(image.get_fdata()[kept].mean(), rel=1e-4)
    np.testing.assert_array_equal(after, expected)
  assert went and expected.any(), "nothing was removed, or all"
  python = rfmedsam2_jax.segment_file(
    rfmedsam2_jax.load(tiny_run), scans / f"{case}_0000.nii.gz", None, names, least)
  np.testing.assert_array_equal(python, after)


def test_a_report_reads_numbers_and_files_from_before_them(tmp_path):
  said = {"label": 1, "volume_ml": 2.0, "presence": None, "predicted_iou": None, "boxes": [],
          "probability": None, "stages": []}
  numbers = {"pieces": 1, "removed_pieces": 2, "removed_ml": 0.5, "touches": ["left"],
             "intensities": {"CT": {"mean": 3.5, "std": 0.5, "p5": 3.0, "p95": 4.0}}}
  content = {"shape": [1, 1, 1], "slice_axis": 0, "warnings": [],
             "structures": {"old": said, "new": said | {"numbers": numbers}}}
  (tmp_path / "scan.json").write_text(json.dumps(content))
  found = load_json(tmp_path / "scan.json", CaseFile).structures
  assert found["old"].numbers is None
  assert json.loads(json.dumps(dataclasses.asdict(found["new"])))["numbers"] == numbers


def test_other_formats_name_chosen_structures_alone(tiny_run, scans, tmp_path):
  image = sitk.ReadImage(str(sorted(scans.glob("*.nii.gz"))[0]))
  save_series(tmp_path / "ct", image)
  predict(tiny_run, tmp_path / "ct", "--out", tmp_path / "all")
  volumes = {name: said["volume_ml"]
             for name, said in details_of(tmp_path / "all")["ct"]["structures"].items()}
  largest = max(volumes, key=volumes.__getitem__)
  for form, *more in (("nrrd",), ("dicom-rtstruct",), ("dicom-seg", "--fast")):
    predict(tiny_run, tmp_path / "ct", "--out", tmp_path / form, "--format", form, "--structures",
            largest, "--min-volume", "0.1", *more)
  reader = sitk.ImageFileReader()
  reader.SetFileName(str(tmp_path / "nrrd" / "ct.seg.nrrd"))
  reader.ReadImageInformation()
  assert [reader.GetMetaData(key) for key in reader.GetMetaDataKeys()
          if key.startswith("Segment") and key.endswith("_Name")] == [largest]
  seg = pydicom.dcmread(tmp_path / "dicom-seg" / "ct.seg.dcm")
  assert [segment.SegmentLabel for segment in seg.SegmentSequence] == [largest]
  (how,) = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
  assert how.AlgorithmParameters == "runs=tiny,slices=half"
  outlines = pydicom.dcmread(tmp_path / "dicom-rtstruct" / "ct.rtstruct.dcm")
  assert [roi.ROIName for roi in outlines.StructureSetROISequence] == [largest]
  tables = [table_of(tmp_path / form) for form in ("nrrd", "dicom-rtstruct")]
  assert tables[0] == tables[1] and int(tables[0][0]["pieces"]) > 0


def test_fast_is_half_of_the_slices_and_says_so(tiny_run, scans):
  model = rfmedsam2_jax.load(tiny_run)
  scan = sorted(scans.glob("*.nii.gz"))[0]
  slow, fast = (rfmedsam2_jax.segment_details(model, scan, fast=fast) for fast in (False, True))
  assert (slow.as_dict()["fast"], fast.as_dict()["fast"]) == (False, True)
  before, after = (found.segmentations[0].prepared.image.shape for found in (slow, fast))
  assert abs(after[1] - before[1] / 2) <= 0.51 and after[2:] == before[2:]
  size = np.array(slow.geometry.shape) * slow.as_dict()["spacing_mm"]
  for found in (slow, fast):
    shape = found.segmentations[0].prepared.image.shape[1:]
    grid = size / found.as_dict()["grid_mm"]  # voxels of the grid along the file's axes
    np.testing.assert_allclose(sorted(grid), sorted(shape), rtol=1e-4)
  assert fast.labels.shape == slow.labels.shape == nib.load(scan).shape and fast.labels.any()
