"""Training that starts from a checkpoint of SAM 2: `refiner.init_from`."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.model import load
from rfmedsam2_jax.nn import AdapterConfig, init_params
from rfmedsam2_jax.weights.checkpoint import (
  check_starting_point,
  load_checkpoint,
  save_checkpoint,
  starting_params,
  with_adapters,
)
from rfmedsam2_jax.weights.orbax import read_about, save_params

NONE = AdapterConfig(dwconv=False, cnn=False)


@pytest.fixture(scope="module")
def converted(tiny_config, tmp_path_factory):
  """A checkpoint of the tiny network at another side, without adapters."""
  config = dataclasses.replace(load_config(tiny_config).sam2, image_size=96, adapters=NONE)
  folder = tmp_path_factory.mktemp("converted") / "ckpt"
  save_checkpoint(folder, config, init_params(config, jax.random.key(9)), {"source": "a test"})
  return folder


def train(config, out, *options):
  return main(["train", str(config), "--out", str(out), "refiner.trainable=['*adapter*']",
               "refinement.stages=[{residual: true}]", *map(str, options)])


@pytest.fixture(scope="module")
def trained(converted, tiny_config, tmp_path_factory):
  """A run of residual stages that started from it, on a copy that is gone since."""
  folder = tmp_path_factory.mktemp("run")
  shutil.copytree(converted, folder / "ckpt")
  assert train(tiny_config, folder / "run", f"refiner.init_from={folder / 'ckpt'}") == 0
  (folder / "ckpt").rename(folder / "gone")
  return folder / "run"


@pytest.mark.slow
def test_frozen_parameters_are_the_checkpoints_and_adapters_are_trained(trained, converted):
  start = flatten_dict(load_checkpoint(converted).params)
  config, params, _ = load_checkpoint(trained / "refiner" / "params")
  found = flatten_dict(params)
  assert config.image_size == 64 and config.adapters == AdapterConfig()
  # The residual stages' decoder too: only one from scratch is silenced.
  for path, x in start.items():
    np.testing.assert_array_equal(found[path], x, err_msg=str(path))
  adapters = {path: x for path, x in found.items() if path not in start}
  assert all("adapter" in path for path in adapters)
  assert any(np.any(x) for path, x in adapters.items() if "up" in path)


def test_a_run_remembers_where_it_started(trained):
  about = json.loads((trained / "init_from.json").read_text("utf-8"))
  assert about["source"] == "a test" and about["sam2"]["image_size"] == 96


def test_a_resumed_run_does_not_need_its_starting_point(trained, tiny_config, tmp_path):
  """Once the refiner has a checkpoint; the result is that of the run which was not killed."""
  shutil.copytree(trained, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "refiner" / "params")
  shutil.rmtree(tmp_path / "run" / "refiner" / "checkpoints" / "6")
  source = json.dumps(str(trained.parent / "ckpt"))
  assert train(tiny_config, tmp_path / "run", f"refiner.init_from={source}", "--resume") == 0
  a, b = (load_checkpoint(run / "refiner" / "params").params for run in (trained, tmp_path / "run"))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_that_was_killed_before_the_refiner_does_need_it(trained, tiny_config, tmp_path,
                                                               capsys):
  shutil.copytree(trained, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "refiner")
  (tmp_path / "run" / "refiner" / "checkpoints").mkdir(parents=True)
  assert train(tiny_config, tmp_path / "run", f"refiner.init_from={trained.parent / 'ckpt'}",
               "--resume") == 2
  assert "no such checkpoint" in capsys.readouterr().err


def test_a_run_is_a_starting_point_with_its_adapters(trained, tiny_config):
  config = load_config(tiny_config).sam2
  source = trained / "refiner" / "params"
  params = starting_params(source, dataclasses.replace(config, image_size=96), jax.random.key(1))
  jax.tree.map(np.testing.assert_array_equal, params, load_checkpoint(source).params)
  for adapters, says in (
    (NONE, "set sam2.adapters.dwconv=true"), (AdapterConfig(width=8), "sam2.adapters.width=16")
  ):
    with pytest.raises(UserError, match=says):
      starting_params(source, dataclasses.replace(config, adapters=adapters), jax.random.key(1))


def test_a_mask_adapter_of_another_width_is_refused(converted, tmp_path):
  config, params, _ = load_checkpoint(converted)
  theirs = dataclasses.replace(config, adapters=AdapterConfig(mask=True, mask_width=8))
  save_checkpoint(tmp_path / "ckpt", theirs, with_adapters(params, theirs, jax.random.key(0)), {})
  check_starting_point(tmp_path / "ckpt", theirs)
  for ours in (AdapterConfig(mask_width=8), AdapterConfig(mask=True)):
    with pytest.raises(UserError, match="mask=true and .*mask_width=8"):
      check_starting_point(tmp_path / "ckpt", dataclasses.replace(config, adapters=ours))


@pytest.mark.parametrize("option, says", [
  ("sam2.decoder_depth=3", "its network has decoder_depth=1, the config has sam2.decoder_depth=3"),
  ("sam2.memory_layers=3", "memory_layers=1"),
  ("sam2.absent_embedding=false", "absent_embedding=True"),
])
def test_another_network_is_refused_before_anything_is_done(
  converted, tiny_config, tmp_path, capsys, option, says
):
  run = tmp_path / "run"
  assert train(tiny_config, run, f"refiner.init_from={converted}", option) == 2
  error = capsys.readouterr().err
  assert says in error and str(converted) in error and error.count("\n") == 1
  assert not run.exists()


@pytest.mark.parametrize("network", ["refiner", "generator"])
def test_a_start_that_is_not_finite_is_refused_before_anything_is_trained(
  tiny_run, tiny_config, tmp_path, capsys, network
):
  source = tmp_path / "source"
  segmenter = load(tiny_run)
  params = jax.tree.map(np.array, getattr(segmenter, network))
  name, first = next(iter(flatten_dict(params, sep="/").items()))
  first.flat[0] = np.nan
  about = read_about(tiny_run / network / "params")
  save_params(source, params, {key: x for key, x in about.items() if key != "checksum"})
  assert train(tiny_config, tmp_path / "run", f"{network}.init_from={source}") == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert f"{source}: {name} has 1 of" in error and "NaN or infinite" in error
  assert not (tmp_path / "run" / "preprocessed").exists()
  # As the network of a run it is refused, too.
  run = shutil.copytree(tiny_run, tmp_path / "copy")
  shutil.rmtree(run / network / "params")
  shutil.copytree(source, run / network / "params")
  with pytest.raises(UserError, match=f"{name} has 1 of"):
    load(run)


@pytest.mark.parametrize("kind, says", [
  ("nothing", "no such checkpoint"), ("a file", "is no checkpoint"),
  ("a generator", "not of SAM 2"), ("inside", "lies in the run that is to be written"),
])
def test_what_is_no_starting_point_is_refused(
  converted, tiny_run, tiny_config, tmp_path, capsys, kind, says
):
  source = tmp_path / "source"
  if kind == "a file":
    source.touch()
  elif kind == "a generator":
    source = tiny_run / "generator" / "params"
  elif kind == "inside":
    source = tmp_path / "run" / "ckpt"
    shutil.copytree(converted, source)
    (tmp_path / "run" / "config.yaml").touch()
  assert train(tiny_config, tmp_path / "run", f"refiner.init_from={source}", "--overwrite") == 2
  error = capsys.readouterr().err
  assert says in error and error.count("\n") == 1
  assert kind != "inside" or source.is_dir()
