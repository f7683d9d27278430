"""What a prediction says of itself: CASE.json, warnings, and that it is the same every time."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from tests_data import reoriented

import rfmedsam2_jax
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.files import load_json
from rfmedsam2_jax.data.fingerprint import Fingerprint
from rfmedsam2_jax.data.preprocessing import Restore, preprocess
from rfmedsam2_jax.data.volumes import load_image
from rfmedsam2_jax.refinement import Fused, StageResult
from rfmedsam2_jax.segmentation.config import WarningConfig
from rfmedsam2_jax.segmentation.notices import input_notices, stage_notices
from rfmedsam2_jax.segmentation.structures import StageDetails, StructureDetails, structure_details


@pytest.fixture(scope="module")
def unseen(phantoms) -> Path:
  return sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0]


def predict(*arguments) -> None:
  assert main(["predict", *map(str, arguments)]) == 0


def details_of(path: Path) -> dict:
  def refuse(constant: str):
    raise AssertionError(f"{constant} is no JSON")

  return json.loads(path.read_text("utf-8"), parse_constant=refuse)


def voxels(path: Path) -> np.ndarray:
  return np.asarray(nib.load(path).dataobj)


def dice(a: np.ndarray, b: np.ndarray) -> float | None:
  total = a.sum() + b.sum()
  return 2 * (a & b).sum() / total if total else None


def close(a: float | None, b: float | None) -> bool:
  """Both without a statement, or equal to the digits that are written."""
  return a == b or (None not in (a, b) and bool(np.isclose(a, b, rtol=1e-4)))


def test_details_say_what_the_label_maps_say(tiny_run, unseen, tmp_path):
  predict(tiny_run, unseen, "--out", tmp_path, "--save-stages")
  name = unseen.name.replace("_0000.nii.gz", "")
  found, image = details_of(tmp_path / f"{name}.json"), nib.load(unseen)
  assert (found["case"], found["inputs"], found["runs"]) == (name, [unseen.name], ["tiny"])
  assert found["shape"] == list(image.shape) and found["stages"] == 3
  np.testing.assert_allclose(found["spacing_mm"], image.header.get_zooms(), rtol=1e-5)
  maps = [voxels(tmp_path / path) for path in found["files"]["stages"]]
  last = voxels(tmp_path / found["files"]["labels"])
  np.testing.assert_array_equal(maps[-1], last)
  ml = np.prod(image.header.get_zooms()) / 1000
  assert any(s["volume_ml"] for s in found["structures"].values()), "nothing was segmented"
  for structure in found["structures"].values():
    mine = last == structure["label"]
    assert structure["volume_ml"] == pytest.approx(mine.sum() * ml, rel=1e-4)
    assert (structure["probability"] is None) == (not mine.any())
    for stage, before in zip(structure["stages"], maps, strict=True):
      here = before == structure["label"]
      assert stage["volume_ml"] == pytest.approx(here.sum() * ml, rel=1e-4)
      assert close(stage["dice_with_last"], dice(here, mine))
    assert structure["predicted_iou"] == structure["stages"][-1]["predicted_iou"]


@pytest.mark.parametrize("orientation", [((0, 1, 2), (1, 1, 1)), ((2, 0, 1), (-1, 1, -1))])
def test_boxes_lie_where_the_prompts_were(tiny_run, phantoms, unseen, tmp_path, orientation):
  """Oracle boxes, read from the details of a turned file, are the truth's on that file's slices."""
  name = unseen.name.replace("_0000.nii.gz", "")
  (tmp_path / "labels").mkdir()
  truth = reoriented(nib.load(phantoms / "labelsTs" / f"{name}.nii.gz"), orientation)
  nib.save(truth, tmp_path / "labels" / f"{name}.nii.gz")
  nib.save(reoriented(nib.load(unseen), orientation), tmp_path / unseen.name)
  predict(tiny_run, tmp_path / unseen.name, "--out", tmp_path / "out", "--prompts", "oracle",
          "--labels", tmp_path / "labels")
  found = details_of(tmp_path / "out" / f"{name}.json")
  liver = found["structures"]["liver"]
  mine = np.moveaxis(np.asarray(truth.dataobj) == liver["label"], found["slice_axis"], 0)
  there = np.flatnonzero(mine.any(axis=(1, 2)))
  assert {box["slice"] for box in liver["boxes"]} >= set(there[1:-1].tolist())
  for box in liver["boxes"]:
    if mine[box["slice"]].any():
      places = np.argwhere(mine[box["slice"]])
      expected = [*places.min(axis=0), *places.max(axis=0)]
      np.testing.assert_allclose(box["box"], expected, atol=1.5)
    assert 0 <= box["presence"] <= 1


def test_probabilities_are_what_the_label_map_was_made_from(tiny_run, unseen, tmp_path):
  predict(tiny_run, unseen, "--out", tmp_path, "--probabilities")
  name = unseen.name.replace("_0000.nii.gz", "")
  found = details_of(tmp_path / f"{name}.json")
  files = [tmp_path / path for path in found["files"]["probabilities"].values()]
  labels = voxels(tmp_path / f"{name}.nii.gz")
  assert labels.any() and len(files) == len(found["structures"])
  shares = np.stack([nib.load(file).get_fdata() for file in files])
  values = np.array([s["label"] for s in found["structures"].values()])
  winner = np.choose(np.searchsorted(values, labels).clip(0, len(values) - 1), shares)
  assert (winner[labels > 0] > 0.5).all() and (shares[:, labels == 0] <= 0.5).all()
  assert (winner == shares.max(axis=0))[labels > 0].all()
  exact = rfmedsam2_jax.segment_details(rfmedsam2_jax.load(tiny_run), unseen)
  for share, structure in zip(shares, found["structures"], strict=True):
    np.testing.assert_allclose(share, exact.probability(structure), atol=0.51 / 255)
  np.testing.assert_array_equal(nib.load(files[0]).affine, nib.load(unseen).affine)
  assert sitk.GetArrayFromImage(sitk.ReadImage(str(files[0]))).max() <= 1.001
  assert nib.load(files[0]).get_data_dtype() == np.uint8


def test_two_predictions_are_the_same_bytes(tiny_run, unseen, tmp_path):
  for out in ("one", "two"):
    predict(tiny_run, unseen, "--out", tmp_path / out, "--save-stages", "--probabilities")
  files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
  # Label maps of four kinds, details, probabilities, numbers, names.
  assert len(files) == 5 + 5 + 2
  for file in files:
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.parametrize(
  "kind, says",
  [
    ("spacing", "voxel size along head-foot"),
    ("extent", "field of view along"),
    ("intensities", "intensities of CT are"),
    ("file", "its qform and sform contradict each other by up to 100 mm"),
  ],
)
def test_an_input_that_is_unusual_is_named(
  tiny_run, unseen, tmp_path, capsys, kind, says
):
  image = nib.load(unseen)
  axial = int(np.flatnonzero(nib.io_orientation(image.affine)[:, 0] == 2)[0])
  scale = np.ones(4)
  scale[axial] = 4.0 if kind == "spacing" else 1.0
  data = np.asarray(image.dataobj)
  if kind == "extent":
    data = np.take(data, range(data.shape[axial] // 3), axis=axial)
  if kind == "intensities":  # stored from 0, its rescale intercept forgotten
    data = data + 1024
  image = nib.Nifti1Image(data, image.affine @ np.diag(scale))
  if kind == "file":
    image.set_qform(image.affine, 1)
    image.affine[2, 3] += 100
    image.set_sform(image.affine, 2)
  nib.save(image, tmp_path / "scan.nii.gz")
  predict(tiny_run, tmp_path / "scan.nii.gz", "--out", tmp_path / "out", "--quiet")
  found = details_of(tmp_path / "out" / "scan.json")["warnings"]
  (notice,) = [n["message"] for n in found if n["kind"] == kind]
  assert says in notice and (kind == "file") == ("training cases" not in notice)
  assert f"warning: scan: {notice}" in capsys.readouterr().err


def test_runs_of_older_versions_say_what_they_can(tiny_run, unseen, tmp_path):
  """Their fingerprint has no quantiles, or is not there at all."""
  model = rfmedsam2_jax.load(tiny_run)
  volume = load_image(unseen)
  shifted = volume.array + 1024
  restore = dataclasses.replace(preprocess(volume, model.plan).restore, native_spacing=(99, 5, 5))
  kinds = lambda m: {n.kind for n in input_notices(m, restore, shifted)}  # noqa: E731
  assert kinds(model) == {"spacing", "extent", "intensities"}
  content = json.loads((tiny_run / "fingerprint.json").read_text("utf-8"))
  for case in content["cases"]:
    del case["quantiles"]
  (tmp_path / "old.json").write_text(json.dumps(content))
  old = dataclasses.replace(model, fingerprint=load_json(tmp_path / "old.json", Fingerprint))
  assert kinds(old) == {"spacing", "extent"}
  assert kinds(dataclasses.replace(model, fingerprint=None)) == set()


def test_slices_count_by_the_area_of_their_masks_and_regions_by_their_values():
  """Two regions, `whole` of the labels 1 and 2 and `core` of 2; four voxels of 2 ml."""
  labels = Labels((Structure("whole", (1, 2)), Structure("core", (2,))), True, (1, 2))
  logits = np.full((3, 2, 2), -9, np.float16)
  logits[0, 0, 0] = logits[1, :, 0] = logits[1, 0, 1] = 9
  cells = np.array([[0, 0], [0, 1], [1, 0]])
  said = np.array([0.4, 0.8, 0.9], np.float32), np.array([0.6, 1.0, 0.3], np.float32)
  result = StageResult(cells, logits, *said, np.zeros((3, 4), np.float32), np.zeros(3, bool),
                       np.ones(3, np.int32))
  prepared = SimpleNamespace(restore=Restore((1, 2, 2), (1.0, 1.0, 1.0), (0, 0, 0), (1, 2, 2),
                                             (0, 1, 2), (1, 2, 2)))
  plan = SimpleNamespace(labels=labels, slice_axis=0)
  found = SimpleNamespace(segmenter=SimpleNamespace(plan=plan), prepared=prepared, results=[result],
                          generated=SimpleNamespace(cuts=[None, None]))
  before, after = (np.array(x, np.uint8).reshape(1, 2, 2) for x in ([1, 1, 1, 0], [1, 2, 0, 0]))
  geometry = SimpleNamespace(spacing=(2.0, 10.0, 100.0), voxel_ml=2.0, axes=(0, 1, 2))
  winning = np.array([0.5, 0.9, 0.0, 0.0], np.float32).reshape(1, 2, 2)
  details = structure_details([found], [before, after], Fused(after, winning), geometry)
  whole, core = details["whole"], details["core"]
  assert (whole.volume_ml, core.volume_ml) == (4.0, 2.0)
  assert (whole.stages[0].volume_ml, whole.stages[0].dice_with_last) == (6.0, 0.8)
  assert core.stages[0].dice_with_last == 0.0 and whole.probability == pytest.approx(0.7)
  assert whole.predicted_iou == pytest.approx(0.7) and whole.presence == pytest.approx(0.9)
  assert core.predicted_iou is None and core.presence == pytest.approx(0.3)


def structure(*dices: float | None) -> StructureDetails:
  stages = tuple(StageDetails(i, 1234.0, None, None, d) for i, d in enumerate(dices))
  return StructureDetails(1, 12.0, None, None, None, stages, ())


def test_stages_that_disagree_are_named_once_and_others_not():
  found = {"liver": structure(0.95, 0.97, 1.0), "spleen": structure(0.6, 0.5, 1.0),
           "aorta": structure(None, None, None), "kidney": structure(0.0, 1.0)}
  notices = list(stage_notices(found, WarningConfig(stage_dice=0.8)))
  assert [n.kind for n in notices] == ["stages"] * 2
  assert notices[0].message.startswith("spleen: stage 1 found 1230 ml")
  assert notices[1].message.startswith("kidney: the generator found 1230 ml and the last")
  # A coarse generator is meant to be corrected, but not to be contradicted.
  found = {"liver": structure(0.6, 0.97, 1.0), "spleen": structure(0.6, 0.5, 1.0),
           "kidney": structure(0.0, 1.0)}
  said = [n.message.split(":")[0] for n in stage_notices(found, WarningConfig(), coarse=True)]
  assert said == ["spleen", "kidney"]


def test_python_gives_the_same_details_and_probabilities(tiny_run, unseen):
  model = rfmedsam2_jax.load(tiny_run)
  image = nib.as_closest_canonical(nib.load(unseen))
  # RAS (x, y, z) to LPS (z, y, x)
  array = np.asarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0)
  spacing = tuple(float(s) for s in image.header.get_zooms()[::-1])
  of_array = rfmedsam2_jax.segment_details(model, array, spacing)
  of_file = rfmedsam2_jax.segment_details(model, unseen)
  np.testing.assert_array_equal(of_array.labels, rfmedsam2_jax.segment(model, array, spacing))
  np.testing.assert_array_equal(of_file.labels, rfmedsam2_jax.segment_file(model, unseen))
  with pytest.raises(rfmedsam2_jax.UserError, match="hart: is no structure .* liver"):
    of_array.probability("hart")
  assert of_array.slice_axis == 0 and of_array.labels.shape == array.shape
  names = list(of_array.structures)
  for found in (of_array, of_file):
    shares = np.stack([found.probability(name) for name in names])
    values = np.array([s.label for s in found.structures.values()])
    expected = np.where(shares.max(axis=0) > 0.5, values[shares.argmax(axis=0)], 0)
    np.testing.assert_array_equal(found.labels, expected)
  for name in names:
    a, b = of_array.structures[name], of_file.structures[name]
    assert close(a.volume_ml, b.volume_ml) and close(a.predicted_iou, b.predicted_iou)
