"""A run in a bucket: trained, killed, resumed on two hosts, used for prediction.

Hosts are processes with a disk each. The bucket is gcs_server's; Orbax, TensorStore and gcsfs are
told of it by the variables that they have for that.
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import gcs_server
import pytest
import yaml
from tiny_config import TINY

from rfmedsam2_jax.base import storage
from rfmedsam2_jax.base.addresses import ENVIRONMENT
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.weights.checkpoint import load_checkpoint

# Every part of a run, but that only the generator is trained: compiling is what takes long.
QUICK = TINY | {
  "data": {"split": {"fraction": 0, "train_cases": 2}, "dataset": "gs://lab/phantoms"},
  "generator": TINY["generator"] | {"loop": {"steps": 6, "log_every": 1, "checkpoint_every": 3}},
  "refiner": TINY["refiner"] | {"loop": {"steps": 0}, "batch_size": 2},
  "refinement": {"cells_per_batch": 16, "stages": [{"residual": True}]},
}
WORKER = Path(__file__).with_name("bucket_worker.py")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory, phantoms):
  """A server whose bucket `lab` has the phantoms and a config that trains on them."""
  if importlib.util.find_spec("gcsfs") is None:
    pytest.skip("the extra gcs is not installed")
  with gcs_server.serving() as server, pytest.MonkeyPatch.context() as patch:
    for name, value in gcs_server.environment(server.address).items():
      patch.setenv(name, value)
    patch.setenv(ENVIRONMENT, str(tmp_path_factory.mktemp("this_host")))
    files = [path for path in phantoms.rglob("*") if path.is_file()]
    storage.put([str(path) for path in files],
                [f"gs://lab/phantoms/{path.relative_to(phantoms).as_posix()}" for path in files])
    storage.write("gs://lab/tiny.yaml", yaml.safe_dump(QUICK).encode())
    yield server


def start(disk: Path, *options: str) -> subprocess.Popen:
  command = [sys.executable, str(WORKER), "train", "gs://lab/tiny.yaml", "--out", "gs://lab/run"]
  environment = os.environ | {
    ENVIRONMENT: str(disk), "PYTHONPATH": str(WORKER.parents[1]), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen([*command, *options], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ended(process: subprocess.Popen) -> str:
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0, out[-5000:]
  return out


def wait_for(server, name: str, process: subprocess.Popen) -> None:
  for _ in range(1500):
    if name in server.names(name):
      return
    assert process.poll() is None, process.communicate()[0][-5000:]
    time.sleep(0.2)
  raise AssertionError(f"{name} never came")


@pytest.mark.slow
def test_a_run_is_killed_resumed_on_two_hosts_and_predicts(bucket, tmp_path, phantoms, capsys):
  first = start(tmp_path / "one")
  try:
    wait_for(bucket, "lab/run/generator/checkpoints/3/commit_success.txt", first)
  finally:
    first.send_signal(signal.SIGKILL)
  first.communicate()

  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    where = f"127.0.0.1:{free.getsockname()[1]}"
  two = [start(tmp_path / f"two_{index}", "--resume", "mesh.data=2", "--distributed",
               f"{where},2,{index}") for index in range(2)]
  try:
    said = ended(two[0])
    ended(two[1])
  finally:
    for process in two:
      with contextlib.suppress(ProcessLookupError):
        process.kill()
  assert "gs://lab/run: taken over from process" in said and "resumed at step" in said

  # Every step is in the log once, whoever did it.
  lines = [json.loads(line) for line in bucket.content("lab/run/log.jsonl").splitlines()]
  assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 6]
  assert json.loads(bucket.content(bucket.names("lab/run/.lease/")[-1]))["given_back"]
  # The first host had prepared the cases; the others have brought what they read.
  for host in ("two_0", "two_1"):
    arrays = list((tmp_path / host).rglob("preprocessed/*_image.npy"))
    assert any(path.stat().st_size for path in arrays), host

  # What tracking and `init_from` read.
  assert load_checkpoint("gs://lab/run/refiner/params").about["phase"] == "refiner"
  predict = ["predict", "gs://lab/run", "gs://lab/phantoms/imagesTs", "--out", "gs://lab/out"]
  assert main(predict) == 0
  written = [name for name in bucket.names("lab/out/") if name.endswith(".nii.gz")]
  assert len(written) == 2
  capsys.readouterr()
  assert main(predict) == 2
  assert capsys.readouterr().err.startswith(f"rfmedsam2: gs://{written[0]}: exists already")
  assert main(["train", "gs://lab/tiny.yaml", "--out", "gs://lab/run"]) == 2
  assert capsys.readouterr().err == (
    "rfmedsam2: gs://lab/run: holds a run; resume it or overwrite it\n")
