import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.evaluation.scores import (
  as_dict,
  evaluate_folders,
  from_dict,
  save_scores,
  table,
)

AFFINE = np.array([[-2.0, 0, 0, 40], [0, 1.5, 0, -10], [0, 0, 3, 5], [0, 0, 0, 1]])
LABELS = Labels((Structure("left", (1,)), Structure("whole", (1, 2))), True, (1, 2), ignore=9)


def write(path, array, affine=AFFINE):
  path.parent.mkdir(parents=True, exist_ok=True)
  nib.save(nib.Nifti1Image(array.astype(np.uint8), affine), path)


def turned(array, affine):
  """The same in world space, stored with another axis order and flips."""
  orientation = np.array([[2, -1], [0, 1], [1, -1]])
  inverse = nib.orientations.inv_ornt_aff(orientation, array.shape)
  return nib.orientations.apply_orientation(array, orientation), affine @ inverse


@pytest.fixture
def folders(tmp_path):
  rng = np.random.default_rng(0)
  for case in ("a", "b"):
    reference = np.zeros((12, 10, 8), int)
    reference[2:6, 2:8, 2:6], reference[6:9, 2:8, 2:6] = 1, 2
    prediction = np.roll(reference, int(rng.integers(1, 3)), axis=1)
    write(tmp_path / "ref" / f"{case}.nii.gz", reference)
    write(tmp_path / "pred" / f"{case}.nii.gz", *turned(prediction, AFFINE))
  return tmp_path


def test_predictions_are_compared_in_world_space(folders):
  scores = evaluate_folders(folders / "pred", folders / "ref", LABELS, tolerance=1.6)
  for case in ("a", "b"):
    # By hand: both maps on nibabel's canonical grid.
    maps = [
      np.asarray(nib.as_closest_canonical(nib.load(folders / side / f"{case}.nii.gz")).dataobj)
      for side in ("pred", "ref")
    ]
    for name, values in (("left", [1]), ("whole", [1, 2])):
      p, r = (np.isin(m, values) for m in maps)
      assert scores.cases[case][name].dice == pytest.approx(2 * (p & r).sum() / (p.sum() + r.sum()))
      assert scores.cases[case][name].reference_volume == pytest.approx(r.sum() * 0.009)
  both = [scores.of_structure(name).dice for name in ("left", "whole")]
  assert 0 < scores.mean.dice < 1
  assert scores.mean.dice == pytest.approx(np.mean(both))
  # One voxel along the second axis is 1.5 mm: hd95 knows which axis that is.
  shifts = {1.5, 3.0}
  assert {case["left"].hd95 for case in scores.cases.values()} <= shifts


def test_a_surface_the_tolerance_away_is_within_it(tmp_path):
  cube = np.zeros((16, 12, 12))
  cube[4:9, 4:9, 4:9] = 1
  for folder, array in (("ref", cube), ("pred", np.roll(cube, 3, 0))):
    write(tmp_path / folder / "s.nii.gz", array, np.diag([0.1, 0.1, 0.1, 1]))
  command = ["evaluate", str(tmp_path / "pred"), str(tmp_path / "ref"), "--tolerance"]
  for tolerance, expected in (("0.3", lambda x: x == 1), ("0.299", lambda x: x < 1)):
    assert main([*command, tolerance]) == 0
    scores = json.loads((tmp_path / "pred" / "scores.json").read_text("utf-8"))
    assert expected(scores["mean"]["surface_dice"])


def test_distances_on_a_sheared_grid_are_those_of_world_space(tmp_path):
  affine = np.array([[2.0, 0.7, 0, -20], [0, 1.5, -1.1, 7], [0.4, 0, 3, 5], [0, 0, 0, 1]])
  noise = np.random.default_rng(2).random((2, 9, 9, 9)) < [[[[0.06]]], [[[0.07]]]]
  points = []
  for folder, mask in zip(("ref", "pred"), noise, strict=True):
    write(tmp_path / folder / "s.nii.gz", *turned(mask.astype(int), affine))
    around = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (2, 2, 2))
    there = np.argwhere(around.any((3, 4, 5)) & ~around.all((3, 4, 5)))
    points.append(nib.affines.apply_affine(affine, there - 0.5))
  between = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
  greatest = max(between.min(0).max(), between.min(1).max())
  for tolerance, all_within in ((greatest, True), (greatest * 0.999, False)):
    scores = evaluate_folders(tmp_path / "pred", tmp_path / "ref", tolerance=tolerance)
    assert (scores.mean.surface_dice == 1) == all_within
  ml = noise[1].sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
  assert scores.mean.volume == pytest.approx(ml, rel=1e-5)


def test_what_a_missed_structure_costs_is_asked_for_and_written_down(folders, capsys):
  reference = np.asarray(nib.load(folders / "ref" / "a.nii.gz").dataobj)
  write(folders / "ref" / "c.nii.gz", reference)
  write(folders / "pred" / "c.nii.gz", np.where(reference == 1, 0, reference))
  both = [str(folders / "pred"), str(folders / "ref")]
  known = evaluate_folders(*both).of_structure("1").hd95  # of two cases
  diagonal = np.linalg.norm([12 * 2, 10 * 1.5, 8 * 3])
  for missing, cost in (("nan", None), ("worst", diagonal), ("40", 40.0)):
    assert main(["evaluate", *both, "--missing", missing, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["result"]
    scores = json.loads((folders / "pred" / "scores.json").read_text("utf-8"))
    assert result == scores
    found = scores["cases"]["c"]["1"]
    assert found["hd95"] == (None if cost is None else pytest.approx(cost))
    assert (found["dice"], found["surface_dice"]) == (0, 0)
    mean = known if cost is None else (2 * known + cost) / 3
    assert scores["structures"]["1"]["hd95"] == pytest.approx(mean)
    unmatched = [scores["structures"][name]["unmatched"] for name in ("1", "2")]
    assert unmatched == [1, 0] and scores["mean"]["unmatched"] == 1
    said = scores["conventions"]
    assert float(said["missing"]) == cost if cost == 40 else said["missing"] == missing
    again = from_dict(scores)
    assert again.unmatched("1") == 1 and as_dict(again) == scores
  assert main(["evaluate", *both, "--missing", "40"]) == 0
  out = capsys.readouterr().out
  assert "HD95 mm, missed 40" in out and out.splitlines()[2].split()[-3] == "1"
  for wrong in ("-1", "inf", "none"):
    assert main(["evaluate", *both, "--missing", wrong]) == 2
    error = capsys.readouterr().err
    assert f"missing {wrong}" in error and "give" in error and error.count("\n") == 1


def test_scores_of_before_the_conventions_are_read(folders):
  content = as_dict(evaluate_folders(folders / "pred", folders / "ref"))
  del content["conventions"]
  assert np.isnan(from_dict(content).missing)


def test_structure_that_a_case_lacks_is_left_out_of_the_mean_and_json_is_strict(folders, tmp_path):
  empty = np.zeros((12, 10, 8), int)
  write(folders / "ref" / "c.nii.gz", empty)
  write(folders / "pred" / "c.nii.gz", empty)
  with_empty = evaluate_folders(folders / "pred", folders / "ref", None)
  without = evaluate_folders(folders / "pred" / "a.nii.gz", folders / "ref" / "a.nii.gz", None)
  assert with_empty.structures == without.structures == ("1", "2")
  assert np.isnan(with_empty.cases["c"]["1"].dice)
  assert with_empty.of_structure("1").dice > 0
  save_scores(tmp_path / "scores.json", with_empty)
  content = json.loads((tmp_path / "scores.json").read_text("utf-8"))
  assert content["cases"]["c"]["1"]["dice"] is None
  assert content["mean"]["dice"] == with_empty.mean.dice
  assert "mean of 3 cases" in table(with_empty)


def test_ignored_voxels_are_not_scored(folders):
  path = folders / "ref" / "a.nii.gz"
  reference = np.asarray(nib.load(path).dataobj).copy()
  prediction = np.asarray(
    nib.as_closest_canonical(nib.load(folders / "pred" / "a.nii.gz")).dataobj
  )[::-1]  # canonical is RAS, the reference LAS
  reference[prediction != reference] = 9
  write(path, reference)
  scores = evaluate_folders(folders / "pred", folders / "ref", LABELS)
  assert scores.cases["a"]["left"].dice == scores.cases["a"]["whole"].dice == 1
  assert scores.cases["b"]["left"].dice < 1


def test_a_mistake_is_said_before_a_volume_is_read(folders, monkeypatch, capsys):
  monkeypatch.setattr("rfmedsam2_jax.evaluation.scores.load_grid", lambda path: 1 / 0)
  both = [str(folders / "pred"), str(folders / "ref")]
  for given, said in (
    ([both[0], str(folders / "no")], "no: no such file or folder"),
    ([*both, "--labels", str(folders / "no")], "no: no such file or folder"),
    ([*both, "--scores", str(folders)], "is a folder; name a file"),
  ):
    assert main(["evaluate", *given]) == 2
    assert said in capsys.readouterr().err


def test_missing_cases_and_other_grids_are_one_clear_line(folders):
  moved = AFFINE.copy()
  moved[0, 3] += 2
  write(folders / "ref" / "c.nii.gz", np.zeros((12, 10, 8)))
  with pytest.raises(UserError, match="no prediction of c, .*partial"):
    evaluate_folders(folders / "pred", folders / "ref")
  assert len(evaluate_folders(folders / "pred", folders / "ref", partial=True).cases) == 2
  write(folders / "pred" / "c.nii.gz", np.zeros((12, 10, 8)), moved)
  with pytest.raises(UserError, match="pred/c.nii.gz: .*different space"):
    evaluate_folders(folders / "pred", folders / "ref")
  write(folders / "pred" / "d.nii.gz", np.zeros((12, 10, 8)))
  with pytest.raises(UserError, match="d.nii.gz: has no reference"):
    evaluate_folders(folders / "pred", folders / "ref")


def test_values_that_no_structure_has_are_said_once_per_file(folders, capsys):
  path = folders / "pred" / "a.nii.gz"
  image = nib.load(path)
  voxels = np.asarray(image.dataobj).copy()
  voxels.flat[:3] = 7, 9, 200
  nib.save(nib.Nifti1Image(voxels, image.affine), path)
  lines = []
  evaluate_folders(folders / "pred", folders / "ref", LABELS, warn=lines.append)
  # 9 is the ignore label.
  assert lines == [f"{path}: holds values that no structure has (7, 200); they are not scored"]
  scores = evaluate_folders(folders / "pred", folders / "ref", warn=lines.append)
  assert {"7", "200"} <= set(scores.structures) and len(lines) == 1


def test_structures_that_one_side_lacks_are_counted_in_the_scores_file(folders, capsys):
  empty = np.zeros((12, 10, 8))
  write(folders / "pred" / "b.nii.gz", empty)
  status = main(["evaluate", str(folders / "pred"), str(folders / "ref"), "--quiet"])
  assert status == 0
  content = json.loads((folders / "pred" / "scores.json").read_text("utf-8"))
  assert {name: found["unmatched"] for name, found in content["structures"].items()} == {
    "1": 1, "2": 1}
  assert content["mean"]["unmatched"] == 2
  scores = from_dict(content)
  assert scores.unmatched("1") == 1 and as_dict(scores) == content


def test_what_lies_beside_label_maps_is_said_but_for_what_predict_writes(folders, capsys):
  for name in ("a.json", "itksnap_labels.txt", "numbers.csv", "scores.json", "a.png", "._a.nii.gz",
               "b.tif"):
    (folders / "pred" / name).write_bytes(b"")
  (folders / "pred" / "stage0").mkdir()
  (folders / "ref" / "a.nii.gz").rename(folders / "ref" / "a.NII.GZ")
  assert main(["evaluate", str(folders / "pred"), str(folders / "ref"), "--quiet"]) == 0
  (line,) = capsys.readouterr().err.splitlines()
  assert line == (f"rfmedsam2: warning: {folders / 'pred'}: left out 2: ._a.nii.gz (hidden); b.tif "
                  "(no volume by its name)")


def with_names(path, array, names):
  """As 3D Slicer writes it, by SimpleITK."""
  image = sitk.GetImageFromArray(array.astype(np.uint8).T)
  image.SetSpacing((2.0, 1.5, 3.0))
  for number, (value, name) in enumerate(names.items()):
    for key, text in (("Name", name), ("LabelValue", value), ("Layer", 0)):
      image.SetMetaData(f"Segment{number}_{key}", str(text))
  path.parent.mkdir(exist_ok=True)
  sitk.WriteImage(image, str(path), useCompression=True)


def test_values_count_by_their_names_on_both_sides(tmp_path):
  array = np.random.default_rng(0).integers(0, 3, (6, 5, 4))
  swapped = np.array([0, 2, 1])[array]
  with_names(tmp_path / "ref" / "a.seg.nrrd", array, {1: "left", 2: "right"})
  with_names(tmp_path / "pred" / "a.seg.nrrd", swapped, {2: "Left", 1: "right"})
  labels = Labels((Structure("right", (1,)), Structure("left", (2,))), False, (1, 2))
  lines = []
  for known, names in ((labels, ("right", "left")), (None, ("1", "2"))):
    scores = evaluate_folders(tmp_path / "pred", tmp_path / "ref", known, warn=lines.append)
    assert scores.structures == names and scores.mean.dice == 1.0 and not lines
  (tmp_path / "plain").mkdir()
  sitk.WriteImage(sitk.ReadImage(str(tmp_path / "ref" / "a.seg.nrrd")),
                  str(tmp_path / "plain" / "a.nii.gz"))
  scores = evaluate_folders(tmp_path / "pred", tmp_path / "plain", warn=lines.append)
  (line,) = lines
  assert scores.mean.dice < 1 and "names its values and the file beside it does not" in line
  with_names(tmp_path / "pred" / "a.seg.nrrd", swapped, {2: "heart", 1: "right"})
  with pytest.raises(UserError, match="calls value 2 'heart', and in the data set it is 'left'"):
    evaluate_folders(tmp_path / "pred", tmp_path / "ref", labels)
