"""Validation while a network is trained: the scores of `evaluate`, named, outside of the rate."""

import types

import jax
import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure

from rfmedsam2_jax.config.training import LoopConfig
from rfmedsam2_jax.data.datasets import Case, Labels, Structure
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.data.volumes import load_label_map
from rfmedsam2_jax.evaluation.scores import evaluate_folders
from rfmedsam2_jax.parallel.mesh import MeshConfig, make_mesh
from rfmedsam2_jax.parallel.rules import place, whole
from rfmedsam2_jax.report import contact_sheet
from rfmedsam2_jax.training import loop, time_spent, validation
from rfmedsam2_jax.training.compiled import products_of
from rfmedsam2_jax.training.time_spent import TimeSpent

LABELS = Labels((Structure("left", (1,)), Structure("right", (2,))), False, (1, 2), ignore=9)
AFFINE = np.diag([-2.0, 1.5, 3.0, 1.0])
SEGMENTER = types.SimpleNamespace(
  plan=types.SimpleNamespace(labels=LABELS, channels=("CT",), slice_axis=0), stages=2)


def write(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  nib.save(nib.Nifti1Image(array.astype(np.uint8), AFFINE), path)


@pytest.fixture
def cases(tmp_path, monkeypatch):
  """One with ignored voxels, one that lacks a structure, one that has none; stages err apart."""
  truth = {name: np.zeros((10, 9, 8)) for name in ("ignored", "one", "none")}
  truth["ignored"][2:5, 2:7, 2:6], truth["ignored"][5:8, 2:7, 2:6] = 1, 2
  truth["one"][3:6, 3:6, 3:6] = 1
  for name, labels in truth.items():
    for stage in range(2):
      write(tmp_path / f"stage{stage}" / f"{name}.nii.gz", np.roll(labels, 1 + stage, axis=1))
  truth["ignored"][:, 5:] = 9
  for name, labels in truth.items():
    write(tmp_path / "images" / f"{name}.nii.gz", 10 * labels)
    write(tmp_path / "labels" / f"{name}.nii.gz", labels)
  monkeypatch.setattr(validation, "segment_volume", lambda _, volume, progress: volume)
  monkeypatch.setattr(validation, "label_maps", lambda found: [
    load_label_map(tmp_path / f"stage{stage}" / found[0].geometry.path.name, found[0].geometry)
    for stage in range(2)])
  return [Case(name, (tmp_path / "images" / f"{name}.nii.gz",),
               tmp_path / "labels" / f"{name}.nii.gz") for name in truth]


def log_of(tmp_path, held_out, told, began=0.0):
  run = RunFolder(tmp_path / "run")
  run.path.mkdir()
  training = loop.Training(run, None, 0, held_out, {}, told.append, False)
  settings = types.SimpleNamespace(loop=LoopConfig(steps=40))
  phase = types.SimpleNamespace(name="refiner", samples={"slices": 8}, settings=settings)
  ranking, spent = validation.Ranking(run, "refiner", 0), TimeSpent(began - 40.0, began)
  return loop._Log(training, phase, 0, 1e12, ranking, spent), run


def test_scores_are_those_of_evaluate_and_the_one_that_ranks_is_named(cases, tmp_path):
  told = []
  log, run = log_of(tmp_path, cases, told)
  score = log.validation(10, SEGMENTER)
  means = [
    evaluate_folders(tmp_path / f"stage{stage}", tmp_path / "labels", LABELS).mean.dice
    for stage in range(2)]
  (line,) = run.logged()
  assert [line[f"validation/stage{stage} Dice"] for stage in range(2)] == means
  assert line[line["ranked_by"]] == score == means[1] < means[0]
  assert f"stage1 Dice {means[1]:.4f}; stage1 Dice ranks checkpoints" in told[-1]
  assert validation.Ranking(run, "refiner", 10).known == {10: means[1]}
  assert len(list((run / "pictures").iterdir())) == 1


def test_cases_without_structures_rank_nothing(cases, tmp_path):
  told = []
  log, run = log_of(tmp_path, cases[2:], told)
  assert log.validation(10, SEGMENTER) is None
  assert run.logged()[0]["validation/stage1 Dice"] is None
  assert "stage1 Dice -; " in told[-1]
  assert validation.Ranking(run, "refiner", 10).known == {}


def test_older_logs_name_no_score_and_are_ranked_by_the_last(tmp_path):
  run = RunFolder(tmp_path)
  dice = {"validation/stage0 Dice": 0.3, "validation/stage1 Dice": 0.4}
  run.log("refiner", 5, dice)
  run.log("refiner", 6, dice | {"validation/stage1 Dice": float("nan")})
  assert validation.Ranking(run, "refiner", 9).known == {5: 0.4}


def test_pictures_leave_ignored_voxels_out_of_their_dice():
  truth, guess = np.zeros((8, 8), int), np.zeros((8, 8), int)
  truth[2:4, 2:6] = guess[2:6, 2:6] = 1
  truth[4:, :] = 9
  row = {"image": np.zeros((8, 8)), "maps": {"reference": truth, "stage 0": guess}, "aspect": 1.0,
         "window": (0.0, 1.0), "ignore": None}
  for ignore, dice in ((None, "0.667"), (9, "1.000")):
    axes = Figure().subplots()
    named = [(LABELS.structures[0], "red")]
    contact_sheet._panel(axes, row | {"ignore": ignore}, "stage 0", named)
    assert [text.get_text() for text in axes.texts] == [dice]


def test_validation_is_no_time_of_training(tmp_path, monkeypatch):
  now = [0.0]
  for module in (loop, time_spent):
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
  told = []
  log, run = log_of(tmp_path, [], told)
  log._kept.append({"loss": np.float32(1)})
  now[0] += 10
  with log._spent.on("validation"):
    now[0] += 30
  log._line(20)
  (line,) = run.logged()
  assert line["steps_per_second"] == 2 and line["slices_per_second"] == 16
  assert line["tflops_per_device"] == 2 and line["goodput"] == 10 / 80  # compiled for 40 s
  assert "0:40 left" in told[-1]  # 20 steps more, and as much validation


def test_the_arithmetic_of_a_step_counts_loops_as_often_as_they_run_or_is_not_known():
  step = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda _, y: y @ y, x))
  assert products_of(step.lower(np.ones((8, 8), np.float32)).compile()) == 5 * 2 * 8**3
  assert products_of(types.SimpleNamespace(as_text=lambda: "ENTRY of another kind")) == 0


def test_gathering_a_state_is_compiled_once(caplog):
  mesh = make_mesh(MeshConfig())
  tree = place({"kernel": np.ones((3, 5), np.float32)}, mesh)
  with jax.log_compiles():
    for _ in range(3):
      np.testing.assert_array_equal(whole(tree, mesh)["kernel"], np.ones((3, 5)))
  assert sum("Finished XLA compilation" in r.getMessage() for r in caplog.records) <= 1
