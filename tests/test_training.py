"""Training: what is trained, how a run goes on where it stopped, and what it refuses."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import optax
import pytest
from flax import traverse_util

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.config.training import OptimizerConfig
from rfmedsam2_jax.data.phantom import PhantomConfig, write_phantom
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.data.splits import load_split
from rfmedsam2_jax.evaluation.metrics import Score
from rfmedsam2_jax.evaluation.scores import Scores
from rfmedsam2_jax.model import load
from rfmedsam2_jax.nn import init_params
from rfmedsam2_jax.nn.sam2 import BUFFERS
from rfmedsam2_jax.training import train_networks as networks
from rfmedsam2_jax.training.checkpoints import Checkpoints, latest_checkpoint
from rfmedsam2_jax.training.lock import open_run
from rfmedsam2_jax.training.state import (
  init_state,
  learning_rate,
  make_optimizer,
  merge,
  partition,
  silenced_decoder,
)
from rfmedsam2_jax.training.step import Loss, make_step
from rfmedsam2_jax.training.telemetry import Telemetry
from rfmedsam2_jax.training.validation import Ranking
from rfmedsam2_jax.weights.checkpoint import load_checkpoint

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def paths(tree) -> set[str]:
  return set(traverse_util.flatten_dict(tree, sep="/"))


@pytest.fixture(scope="module")
def sam2_params(tiny_config):
  return init_params(load_config(tiny_config).sam2, jax.random.key(0))


def test_only_what_matches_is_trained_and_has_optimizer_state():
  params = {
    "block": {"adapter": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)},
              "dense": {"kernel": jnp.ones((3, 3))}},
    "head": {"kernel": jnp.ones((3, 1))},
  }
  optimizer = make_optimizer(OptimizerConfig(), 10)
  state = init_state(params, ("*adapter*",), optimizer, jax.random.key(0))
  assert paths(state.trained) == {"block/adapter/kernel", "block/adapter/bias"}
  assert paths(state.frozen) == {"block/dense/kernel", "head/kernel"}
  assert paths(merge(state.trained, state.frozen)) == paths(params)
  moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
  assert len(moments) == 2 * 2  # AdamW: two moments of each

  def sums(params, batch, keys):
    return sum(jnp.sum((x - batch) ** 2) for x in jax.tree.leaves(params))

  loss = Loss(sums, lambda found: (found, {}))
  new, _ = make_step(loss, optimizer, OptimizerConfig())(state, jnp.array([3.0]))
  for before, after in zip(jax.tree.leaves(state.frozen), jax.tree.leaves(new.frozen), strict=True):
    assert before is after
  moved = [not np.array_equal(a, b) for a, b in
           zip(jax.tree.leaves(state.trained), jax.tree.leaves(new.trained), strict=True)]
  assert all(moved)


def test_buffers_are_never_trained_and_a_pattern_without_match_is_an_error(sam2_params):
  trained, frozen = partition(sam2_params, ("*",))
  assert paths(frozen) == set(BUFFERS) and paths(trained) == paths(sam2_params) - set(BUFFERS)
  with pytest.raises(UserError, match="no_such_layer"):
    partition(sam2_params, ("*adapter*", "*no_such_layer*"))


@pytest.mark.parametrize("schedule", ["cosine", "poly"])
def test_learning_rate_rises_then_falls_to_zero(schedule):
  rate = learning_rate(OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=10), 100)
  rates = np.array([rate(step) for step in range(101)])
  assert np.all(np.diff(rates[:11]) > 0) and rates[10] == pytest.approx(1.0)
  assert np.all(np.diff(rates[10:]) < 0) and rates[100] == pytest.approx(0.0, abs=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
  config = OptimizerConfig(name="sgd", learning_rate=1.0, clip_norm=0.5, warmup_steps=0)
  optimizer = make_optimizer(config, 10)
  params = {"a": jnp.zeros(4)}
  updates, _ = optimizer.update({"a": jnp.full(4, 100.0)}, optimizer.init(params), params)
  # Nesterov momentum gives 1.99 times the first gradient.
  assert optax.tree.norm(updates) == pytest.approx(0.5 * 1.99, rel=1e-5)


def final_params(run: Path) -> list[np.ndarray]:
  segmenter = load(run)
  return [np.asarray(x) for x in jax.tree.leaves([segmenter.generator, segmenter.refiner])]


class _Killed(Exception):
  pass


@pytest.mark.slow
def test_a_run_that_broke_off_resumes_to_the_same_parameters_bit_for_bit(
  tiny_run, tiny_config, tmp_path, monkeypatch, capsys
):
  """It breaks off in the generator, right after a save, and is terminated in the refiner."""
  save, before = Checkpoints.save, Telemetry.before

  def save_then_die(self, step, state, score=None):
    save(self, step, state, score)
    if step == 4 and self._folder.parent.name == "generator":
      raise _Killed

  def be_terminated(self, done):
    before(self, done)
    if done == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  run = tmp_path / "run"
  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "save", save_then_die)
    with pytest.raises(_Killed):
      main(["train", str(tiny_config), "--out", str(run)])
  with monkeypatch.context() as patch:
    patch.setattr(Telemetry, "before", be_terminated)
    assert main(["train", str(tiny_config), "--out", str(run), "--resume"]) == 75
  assert "the refiner is saved at step 3 of 6, resume it" in capsys.readouterr().err
  assert main(["train", str(tiny_config), "--out", str(run), "--resume"]) == 0
  for one, other in zip(final_params(tiny_run), final_params(run), strict=True):
    np.testing.assert_array_equal(one, other)
  for name in ("splits.json", "fingerprint.json", "plan.json", "validation.json"):
    assert (tiny_run / name).read_bytes() == (run / name).read_bytes()
  steps = [(line["phase"], line["step"]) for line in map(json.loads, (run / "log.jsonl").open())]
  assert steps == [(p, s) for p in ("generator", "refiner") for s in (2, 4, 6)]


@pytest.mark.full
def test_the_demos_run_killed_by_sigkill_in_each_phase_resumes_to_the_same_bits(tmp_path):
  """The quickstart's own config and phantoms; only the numbers of steps are cut."""
  data = write_phantom(tmp_path / "phantoms", PhantomConfig(cases=8, test_cases=0))
  loop = "loop={steps: 12, log_every: 2, checkpoint_every: 4}"
  arguments = [str(CONFIG), f"data.dataset={data}", f"generator.{loop}", f"refiner.{loop}"]
  command = [sys.executable, "-m", "rfmedsam2_jax", "train", *arguments, "--out"]
  subprocess.run([*command, str(tmp_path / "calm")], check=True, stdout=subprocess.DEVNULL)
  disturbed = [*command, str(tmp_path / "killed")]
  for after in ("generator: step 6/", "refiner: step 6/"):
    resume = [] if after.startswith("generator") else ["--resume"]
    with subprocess.Popen([*disturbed, *resume], stderr=subprocess.PIPE, text=True) as process:
      assert process.stderr is not None
      for line in process.stderr:
        if after in line:
          process.send_signal(signal.SIGKILL)
          break
    assert process.wait() == -signal.SIGKILL
  subprocess.run([*disturbed, "--resume"], check=True, stdout=subprocess.DEVNULL)
  pairs = zip(final_params(tmp_path / "calm"), final_params(tmp_path / "killed"), strict=True)
  for one, other in pairs:
    np.testing.assert_array_equal(one, other)


def test_cases_held_back_go_to_the_refiner_alone(tiny_config, tmp_path, monkeypatch):
  seen = {}

  def untrained(training, phase, segmenter, cases, state):
    seen[phase.name] = set(cases)
    return state

  monkeypatch.setattr(networks, "train_phase", untrained)
  run = tmp_path / "run"
  assert main(["train", str(tiny_config), "--out", str(run), "refiner.held_back=0.34",
               "generator.loop.steps=1", "refiner.loop.steps=1"]) == 0
  assert len(seen["generator"]) == 2 and len(seen["refiner"]) == 1
  assert seen["generator"] | seen["refiner"] == set(load_split(run / "splits.json").train)
  # Only what the refiner learns from needs the generator's masks.
  assert {path.stem for path in (run / "prompts").glob("*.npy")} == seen["refiner"]


def test_cases_that_a_file_of_splits_leaves_out_are_said(
  tiny_config, phantoms, tmp_path, monkeypatch, capsys
):
  def enough(*_):
    raise UserError("enough")

  monkeypatch.setattr("rfmedsam2_jax.training.own_data.plan_of", enough)
  names = sorted(path.name.removesuffix(".nii.gz") for path in (phantoms / "labelsTr").iterdir())
  path = tmp_path / "splits_final.json"
  for train, said in ((names[1:], False), (names[2:], True)):
    path.write_text(json.dumps([{"train": train, "val": names[:1]}]))
    assert main(["train", str(tiny_config), "--out", str(tmp_path / "run"), "--overwrite",
                 f"data.split.file={path}"]) == 2
    line = f"{path}: 1 of 4 cases neither train nor validate: {names[1]}"
    assert (line in capsys.readouterr().err) == said


@pytest.mark.slow
def test_the_mask_adapter_is_trained_first_and_alone(tiny_config, tmp_path, monkeypatch, capsys):
  """Terminated on the way, with the same result; the refiner, without a step, is left with it."""
  before = Telemetry.before

  def be_terminated(self, done):
    before(self, done)
    if done == 1:  # the generator has one step, done == 0
      os.kill(os.getpid(), signal.SIGTERM)

  run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
  settings = ["sam2.adapters.mask=true", "generator.loop.steps=1",
              "refiner.mask_adapter.loop.steps=3", "refiner.loop.steps=0"]
  command = ["train", str(tiny_config), "--out", str(run), *settings]
  assert main(["train", str(tiny_config), "--out", str(undisturbed), *settings]) == 0
  with monkeypatch.context() as patch:
    patch.setattr(Telemetry, "before", be_terminated)
    assert main(command) == 75
  assert "the mask_adapter is saved at step 2 of 3" in capsys.readouterr().err
  assert main([*command, "--resume"]) == 0
  config = load_config(run / "config.yaml")
  init_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
  flat = functools.partial(traverse_util.flatten_dict, sep="/")
  start = flat(silenced_decoder(init_params(config.sam2, init_key)))
  first, last, whole = (
    flat(load_checkpoint(folder / "params").params)
    for folder in (run / "mask_adapter", run / "refiner", undisturbed / "mask_adapter"))
  changed = {name for name, x in start.items() if not np.allclose(x, first[name], atol=1e-6)}
  assert changed == {name for name in first if name.startswith("sam_mask_decoder/adapter/")}
  for name, value in first.items():
    np.testing.assert_array_equal(value, last[name])
    np.testing.assert_array_equal(value, whole[name])


@pytest.mark.parametrize("settings, says", [
  (["refiner.mask_adapter.loop.steps=3"], "but sam2.adapters.mask is false"),
  (["refiner.mask_adapter.loop.steps=3", "sam2.adapters.mask=true",
    "refinement.stages=[{residual: true}, {}]"], "but a stage is not residual"),
  (["refiner.held_back=0.9"], "0.9 of 3 training cases leaves the generator none"),
  (["refinement.background=rest", "refinement.threshold=0.4"], "no option any more and always 0.5"),
])
def test_settings_that_do_not_fit_together_are_refused_before_anything_is_done(
  tiny_config, tmp_path, capsys, settings, says
):
  assert main(["train", str(tiny_config), "--out", str(tmp_path / "run"), *settings]) == 2
  error = capsys.readouterr().err
  assert says in error and error.count("\n") == 1
  assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path, capsys):
  arguments = ["train", str(tiny_config), "--out", str(tmp_path / "run"),
               "generator.optimizer.learning_rate=1e12", "generator.optimizer.warmup_steps=0"]
  assert main(arguments) == 2
  error = capsys.readouterr().err
  # The first step moves the weights, the second one notices; each case of its batch is named.
  assert "the generator's loss is not finite at step 2 (cases phantom_" in error
  assert "last good checkpoint: none" in error
  assert latest_checkpoint(tmp_path / "run" / "generator" / "checkpoints") is None


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
  optimizer = make_optimizer(OptimizerConfig(), 10)
  state = init_state({"kernel": jnp.ones((2, 2))}, ("*",), optimizer, jax.random.key(0))
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, keep_best=1)
  for step, score in enumerate([0.3, None, 0.8, None, 0.5, None, None], 1):
    checkpoints.save(step, state, score)
  checkpoints.close()
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "6", "7"]
  # Opened again, with the scores that the log has.
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, keep_best=1)
  checkpoints.scores |= {3: 0.8, 5: 0.5}
  checkpoints.save(8, state, 0.7)
  checkpoints.save(9, state, None)
  checkpoints.close()
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "8", "9"]


def test_a_run_goes_on_to_rank_by_the_mean_that_it_began_with(tmp_path):
  def case(**dice):
    return {name: Score(x, x, 1.0, 1.0, 1.0) for name, x in dice.items()}

  nan = float("nan")
  scores = Scores(("a", "b"), 1.0, {"1": case(a=1.0, b=0.0), "2": case(a=0.5, b=nan)})
  run = RunFolder(tmp_path)
  of_structures = (0.75 + 0.0) / 2
  assert Ranking(run, "refiner", 5).dice(scores) == of_structures
  dice = {"validation/stage0 Dice": 0.3, "validation/stage1 Dice": 0.4}
  run.log("generator", 5, dice)  # by a version that knew the other mean only
  run.log("refiner", 5, dice | Ranking(run, "refiner", 5).note)
  assert Ranking(run, "refiner", 5).dice(scores) == of_structures
  before = Ranking(run, "generator", 5)
  assert before.known == {5: 0.4} and before.note == {}
  assert before.dice(scores) == (1.0 + 0.0 + 0.5) / 3


def test_a_run_folder_is_refused_unless_told(tiny_run, tiny_config, tmp_path, capsys):
  run = shutil.copytree(tiny_run, tmp_path / "run")  # others read the one that is shared
  before = (run / "log.jsonl").read_text("utf-8")
  assert main(["train", str(tiny_config), "--out", str(run)]) == 2
  assert "holds a run; resume it or overwrite it" in capsys.readouterr().err
  # Another config does not resume it either.
  assert main(["train", str(tiny_config), "--out", str(run), "--resume", "seed=9"]) == 2
  assert "seed=0, not 9" in capsys.readouterr().err
  # Where and how it is computed may change.
  assert main(["train", str(tiny_config), "--out", str(run), "--resume", "sam2.remat=block",
               "generator.remat=dots", "mesh.data=1"]) == 0
  assert (run / "log.jsonl").read_text("utf-8") == before


class _WentOn(Exception):
  pass


def went_on(*_):
  raise _WentOn


def one_more(path):
  """The first voxel of a label map becomes another structure's."""
  image = nib.load(path)
  voxels = np.asarray(image.dataobj).copy()
  voxels.flat[0] = (voxels.flat[0] + 1) % 3
  nib.save(nib.Nifti1Image(voxels, image.affine, image.header), path)


@pytest.mark.parametrize(("change", "says"), [
  (lambda data, cases: None, ""),
  (lambda data, cases: one_more(data / "labelsTr" / f"{cases[0]}.nii.gz"),
   "case {0} holds something else than when the run was made"),
  (lambda data, cases: shutil.copy(data / "imagesTr" / f"{cases[0]}_0000.nii.gz",
                                   data / "imagesTr" / f"{cases[1]}_0000.nii.gz"),
   "case {1} holds something else"),
  (lambda data, cases: rewrite(data, '"liver": 1', '"liver": 2', '"spleen": 2', '"spleen": 1'),
   "dataset.json: has label liver: 2, the run was made with 1"),
  (lambda data, cases: rewrite(data, '"0": "CT"', '"0": "MRI"'),
   "dataset.json: has the channels MRI, the run was made with CT"),
])
@pytest.mark.parametrize("older", [False, True])
def test_a_run_goes_on_with_the_data_that_it_began_with_wherever_it_lies(
  tiny_run, tiny_config, phantoms, tmp_path, monkeypatch, capsys, change, says, older
):
  monkeypatch.setattr("rfmedsam2_jax.training.own_data.plan_of", went_on)
  run, data = shutil.copytree(tiny_run, tmp_path / "run"), tmp_path / "moved"
  shutil.copytree(phantoms, data)
  cases = load_split(run / "splits.json")
  change(data, [*cases.validation, *cases.train])
  if older:
    (run / "cases.json").unlink()
  command = ["train", str(tiny_config), "--out", str(run), "--resume", f"data.dataset={data}"]
  if not says or (older and "case" in says):  # an older run does not know what its cases held
    with pytest.raises(_WentOn):
      main(command)
    assert (run / "cases.json").is_file()
    return
  assert main(command) == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert says.format(*cases.validation, *cases.train) in error and str(data) in error


def rewrite(folder, *changes):
  text = (folder / "dataset.json").read_text("utf-8")
  for old, new in zip(changes[::2], changes[1::2], strict=True):
    assert old in text
    text = text.replace(old, new)
  (folder / "dataset.json").write_text(text)


def test_what_is_no_case_of_a_data_set_is_said(
  tiny_config, phantoms, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr("rfmedsam2_jax.training.own_data.plan_of", went_on)
  data = shutil.copytree(phantoms, tmp_path / "data")
  (data / "imagesTr" / "._x_0000.nii.gz").write_bytes(b"")
  with pytest.raises(_WentOn):
    main(["train", str(tiny_config), "--out", str(tmp_path / "run"), "--quiet",
          f"data.dataset={data}"])
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("rfmedsam2: warning: ") and "left out 1: ._x_0000.nii.gz (hidden)" in line


def test_a_run_is_loaded_without_what_only_training_needs(tiny_run):
  code = (
    f"import sys, rfmedsam2_jax; rfmedsam2_jax.load({str(tiny_run)!r})\n"
    "print([m for m in ('tensorboardX', 'matplotlib', 'grain', 'optax') if m in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  assert done.stdout == "[]\n"


def test_what_was_typed_is_checked_before_training_is_loaded(tiny_config, tmp_path):
  mistakes = {
    "no_such.yaml --out run": "no_such.yaml: No such file",
    "tiny.yaml --out run data.dataset=nowhere": "nowhere: is not a folder",
    "no_such.yaml --out thesis": "thesis: is not empty",
    "no_such.yaml --out nothing --resume": "nothing: holds no run to resume",
    "no_such.yaml --out run --resume --overwrite": "--resume and --overwrite exclude",
  }
  shutil.copy(tiny_config, tmp_path / "tiny.yaml")
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
  code = (
    f"import sys; from rfmedsam2_jax.cli import main\nfor line in {list(mistakes)!r}:\n"
    "  print(main(['train', *line.split()]), 'rfmedsam2_jax.training.run' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
  )
  assert done.stdout.splitlines() == ["2 False"] * len(mistakes)
  for line, says in zip(done.stderr.splitlines(), mistakes.values(), strict=True):
    assert says in line
  assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis", "tiny.yaml"]


def test_a_run_in_use_is_refused_and_a_dead_owner_leaves_no_lock(tmp_path):
  run = tmp_path / "run"
  hold = (
    "import sys, time; from rfmedsam2_jax.training.lock import open_run\n"
    f"with open_run({str(run)!r}, False, False) as r:\n"
    "  r.write('config.yaml', ''); print('held', flush=True); time.sleep(60)"
  )
  with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as owner:
    assert owner.stdout is not None and owner.stdout.readline() == "held\n"
    for options in [(False, False), (True, False), (False, True)]:
      with pytest.raises(UserError, match="in use by another process"), open_run(run, *options):
        pass
    owner.kill()
  time.sleep(0.1)
  with open_run(run, True, False):
    pass


def test_overwrite_spares_folders_that_are_no_runs(tmp_path):
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(UserError, match="is not a run"), open_run(tmp_path, False, True):
    pass
  assert (tmp_path / "thesis.txt").exists()
