"""Training on a mesh: the same losses and parameters, less memory, only what must be sent."""

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from platforms import free_port, open_mpi, slurm

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.config.training import OptimizerConfig
from rfmedsam2_jax.data.plan import PlanConfig
from rfmedsam2_jax.nn import PRESETS, init_params
from rfmedsam2_jax.parallel.devices import divide_cpu
from rfmedsam2_jax.parallel.mesh import MeshConfig, check_batch, make_mesh
from rfmedsam2_jax.training.shard import _plan_of_shapes, bytes_per_device
from rfmedsam2_jax.training.state import init_state, make_optimizer

WORKER = Path(__file__).parent / "mesh_worker.py"
ALL = ["8x1", "4x2", "2x4", "1x8", "2x2x2", "1x1/2", "2x2/2"]
SOME = ["4x2", "2x2x2", "1x1/2", "2x2/2", "4x2@2"]  # @2: of two slices


def start(phase, labels, **variables):
  return subprocess.Popen(
    [sys.executable, str(WORKER), phase, *labels], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True, env=os.environ | variables | {"PYTHONPATH": str(WORKER.parents[2])},
  )


def result_of(process):
  out, errors = process.communicate()
  assert process.returncode == 0, errors[-2000:]
  return json.loads(out.splitlines()[-1])


@functools.cache
def on_some_meshes():
  return on_meshes("generator", SOME)


def on_meshes(phase, labels, **variables):
  return result_of(start(phase, ["1x1", *labels], **variables))


def assert_equal_and_spread(results):
  whole = results["1x1"]
  for label, found in results.items():
    # Float32 sums in another order, over five steps: 6e-7 is what they come to.
    assert found["difference"] < 1e-5, label
    assert found["losses"] == pytest.approx(whole["losses"], rel=1e-5), label
    assert found["moved"] > 1e-3, "nothing was trained"
    fsdp = int(label.split("/")[0].split("@")[0].split("x")[1])
    assert set(found["slices"]) == {1}, "a copy of the parameters is in two slices"
    # Single biases and norms of the small networks stay whole.
    assert found["bytes"] / whole["bytes"] < 1.2 / fsdp + 0.02, label
    # Along `model` the ends of blocks are summed, activations of a device's share of the batch, and
    # XLA turns arrays between layouts its own way.
    by_width = label.count("x") == 2
    turned = ["collective-permute", "all-to-all"] if by_width else []
    for sent in found["collectives"]:
      limit = max(whole["largest_parameter"], found["local_batch"] if by_width else 0)
      assert sent["largest"] <= limit, (label, sent)
      assert sent["kind"] in ["all-gather", "all-reduce", "reduce-scatter", *turned], (label, sent)
    if fsdp > 1:
      assert {"all-gather", "reduce-scatter"} <= {c["kind"] for c in found["collectives"]}


@pytest.mark.slow
def test_the_generator_is_trained_alike_on_meshes():
  assert_equal_and_spread(on_some_meshes())


@pytest.mark.full
def test_the_generator_is_trained_alike_on_every_mesh():
  assert_equal_and_spread(on_meshes("generator", ALL))


@pytest.mark.slow
def test_two_processes_train_as_one_does():
  address = f"127.0.0.1:{free_port()}"
  two = [start("generator", ["4x2"], DISTRIBUTED=f"{address},2,{i}") for i in range(2)]
  found = [result_of(process)["4x2"] for process in two]
  alone = on_some_meshes()["4x2"]
  for process in found:
    assert process["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert process["checksum"] == pytest.approx(alone["checksum"], rel=1e-6, abs=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_processes_find_each_other_by_the_variables_of_their_launcher(launcher):
  port = 65535 - random.randrange(2**11)
  two = [
    start("generator", ["4x2"], DISTRIBUTED="auto", PROCESSES="2", **launcher(i, port))
    for i in range(2)
  ]
  found = [result_of(process)["4x2"] for process in two]
  assert found[0]["losses"] == found[1]["losses"] and found[0]["moved"] > 1e-3


@pytest.mark.slow
def test_the_refiner_is_trained_alike_on_a_mesh():
  assert_equal_and_spread(on_meshes("refiner", ["2x4"]))


@pytest.mark.slow
def test_the_tracker_is_trained_alike_on_a_mesh():
  """Prompts are drawn for tracks by their number, and so are clicks."""
  assert_equal_and_spread(on_meshes("tracker", ["2x4"]))


@pytest.mark.full
def test_the_refiner_with_two_stages_is_trained_alike_on_every_mesh():
  assert_equal_and_spread(on_meshes("refiner", ALL, STAGES="2"))


@pytest.mark.parametrize("size", ["tiny", "large"])
@pytest.mark.parametrize("fsdp", [2, 4, 8])
def test_parameters_and_optimizer_fall_with_fsdp(size, fsdp):
  """Within 5 %: small arrays stay whole."""
  optimizer = make_optimizer(OptimizerConfig(), 10)
  config = PRESETS[f"sam2.1_hiera_{size}"]
  state = jax.eval_shape(
    lambda key: init_state(init_params(config, key), ("*",), optimizer, key), jax.random.key(0)
  )
  mesh = jax.sharding.AbstractMesh((1, fsdp, 1), ("data", "fsdp", "model"))
  held = bytes_per_device((state.trained, state.optimizer), mesh)
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.trained, state.optimizer)))
  assert held == pytest.approx(whole / fsdp, rel=0.05)


@pytest.mark.parametrize("sizes, says", [
  ({"data": 3, "fsdp": 5}, "needs 15 devices, but there are"),
  ({"fsdp": 64}, "no multiple of 64"),
])
def test_a_mesh_without_its_devices_is_refused(sizes, says):
  with pytest.raises(UserError, match=says):
    make_mesh(MeshConfig(**sizes))


def test_a_batch_that_does_not_spread_is_refused():
  mesh = jax.sharding.AbstractMesh((4, 2, 1), ("data", "fsdp", "model"))
  check_batch(mesh, 16, 2, "generator")
  with pytest.raises(UserError, match="generator.batch_size is 12: .* 8 devices .* multiple of 8"):
    check_batch(mesh, 12, 1, "generator")
  with pytest.raises(UserError, match="2 microbatches; use a multiple of 16"):
    check_batch(mesh, 8, 2, "generator")


def test_a_cpu_is_divided_into_devices_that_share_the_batch(tiny_config, tmp_path):
  command = [sys.executable, "-m", "rfmedsam2_jax", "train", str(tiny_config), "--out",
             str(tmp_path / "run"), "mesh.cpu_devices=2"]
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert done.returncode == 2
  # The generator's batch of 2 spreads; what does not is said before that is trained.
  assert "refiner.batch_size is 1: cannot be spread over 2 devices" in done.stderr
  assert not (tmp_path / "run").exists()


def test_a_cpu_that_is_in_use_stays_as_it_is():
  count = jax.local_device_count()
  assert divide_cpu(count)
  assert not divide_cpu(count + 2)
  assert jax.local_device_count() == count


def test_two_rests_are_refused(tiny_config):
  with pytest.raises(UserError, match="at most once"):
    load_config(tiny_config, ["mesh.fsdp=-1"])


@pytest.mark.slow
def test_shard_reports_without_devices(tiny_config):
  """In a process of its own: it sets the number of devices."""
  command = [
    sys.executable, "-m", "rfmedsam2_jax", "shard", str(tiny_config), "--devices", "8",
    "mesh.fsdp=4", "generator.batch_size=8", "generator.features=[16,32]", "--phase",
    "generator", "--structures", "3",
  ]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "8 devices, data 2 x fsdp 4 x model 1" in done.stdout
  for said in ("fewer than 4096 elements", "optimizer", "activations", "all-gather", "TFLOP"):
    assert said in done.stdout


def test_shard_says_what_does_not_fit(tiny_config, capsys):
  assert main(["shard", str(tiny_config), "--devices", "0"]) == 2
  assert "--devices" in capsys.readouterr().err
  plan = PlanConfig(patch_size=(512, 512, 512))
  with pytest.raises(UserError, match="which is too large"):
    _plan_of_shapes(plan, 1, 2)
