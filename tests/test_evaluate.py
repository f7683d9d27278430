import json

import nibabel as nib
import numpy as np
import pytest

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.evaluation.scores import evaluate_folders, save_scores, table

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
