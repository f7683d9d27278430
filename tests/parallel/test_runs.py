"""Whole runs that are stopped: a process of two is killed, hardware changes, SIGKILL at any moment.

Minutes each: `make test-full`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from tiny_config import TINY

from rfmedsam2_jax.model import load

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
# Not Adam, and no warm-up from rounding: see mesh_worker.
SGD = {"name": "sgd", "learning_rate": 1e-2, "warmup_steps": 1, "clip_norm": 0.1}
LOOP = {"steps": 12, "log_every": 1, "checkpoint_every": 3}


@pytest.fixture
def config(tmp_path, phantoms):
  """Batches for 8 devices, networks wide enough that most parameters are spread over `fsdp`."""
  phase = {"optimizer": SGD, "loop": LOOP, "batch_size": 8}
  tree = TINY | {
    "data": TINY["data"] | {"dataset": str(phantoms)},
    "generator": TINY["generator"] | phase | {"features": [16, 32]},
    "refiner": TINY["refiner"] | phase | {"slices": 2, "structures": 1},
  }
  path = tmp_path / "tiny.yaml"
  path.write_text(yaml.safe_dump(tree))
  return path


def start(config, run, devices, *options):
  environment = os.environ | {
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
    f"--xla_force_host_platform_device_count={devices}",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": str(ROOT),
  }
  command = [sys.executable, "-m", "rfmedsam2_jax", "train", str(config), "--out", str(run)]
  return subprocess.Popen(
    [*command, *options], env=environment, text=True, stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def ended(process, status):
  out, _ = process.communicate(timeout=900)
  assert process.returncode == status, out[-3000:]
  return out


def wait_for_step(run, phase, step):
  """Until a step is in the log; the run is long enough not to end before that is seen."""
  for _ in range(3000):
    if (run / "log.jsonl").exists():
      lines = (run / "log.jsonl").read_text("utf-8").splitlines()
      found = [json.loads(line) for line in lines if line.endswith("}")]
      if any(line["phase"] == phase and line["step"] >= step for line in found):
        return
    time.sleep(0.1)
  raise AssertionError(f"{phase} never came to step {step}")


def assert_same_parameters(run, other):
  a, b = load(run), load(other)
  for phase in ("generator", "refiner"):
    pairs = zip(
      jax.tree.leaves(getattr(a, phase)), jax.tree.leaves(getattr(b, phase)), strict=True
    )
    for x, y in pairs:
      # Float32 sums in another order, over twelve steps with momentum. Arrays that start at zero
      # are still below 1e-4 then: what they got are sums of larger terms, so 1e-7 is their limit.
      np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(float(np.abs(y).max()), 1e-2))


@pytest.mark.parametrize("phase", ["generator", "refiner"])
def test_a_run_goes_on_with_other_meshes(config, tmp_path, phase):
  """Stopped on 4x2 as a preemption does it, a run ends on 1x1 and on 8x1 as it would have."""
  undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
  ended(start(config, undisturbed, 8, "mesh.data=4", "mesh.fsdp=2"), 0)
  process = start(config, stopped, 8, "mesh.data=4", "mesh.fsdp=2")
  wait_for_step(stopped, phase, 2)
  process.send_signal(signal.SIGTERM)
  assert "resume it" in ended(process, 75)
  for mesh in (("mesh.data=1",), ("mesh.data=8",)):
    resumed = tmp_path / mesh[0]
    shutil.copytree(stopped, resumed)
    ended(start(config, resumed, 8, "--resume", *mesh), 0)
    assert_same_parameters(resumed, undisturbed)


def start_two(config, run, *options):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  return [
    start(config, run, 2, "mesh.data=2", "mesh.fsdp=2", *options, "--distributed",
          f"{address},2,{index}")
    for index in range(2)
  ]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_and_both_resume(config, tmp_path, killed):
  undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
  ended(start(config, undisturbed, 4, "mesh.data=2", "mesh.fsdp=2"), 0)
  two = start_two(config, run)
  wait_for_step(run, "generator", 5)
  two[killed].kill()
  two[killed].communicate()
  last = ended(two[1 - killed], 75).strip().splitlines()[-1]
  assert last.startswith(f"rfmedsam2: process {killed} ") and last.endswith("to resume the run")
  for process in start_two(config, run, "--resume"):
    ended(process, 0)
  assert_same_parameters(run, undisturbed)


def test_twenty_sigkills_at_random_moments_change_nothing(tmp_path):
  command = [sys.executable, str(ROOT / "tests" / "parallel" / "sigkill_campaign.py"),
             "--kills", "20", "--folder", str(tmp_path)]
  done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  assert done.returncode == 0, done.stdout
  assert "20 kills" in done.stdout and "bit for bit" in done.stdout
