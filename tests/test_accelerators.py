"""libtpu, TPU's compiler and driver in one, changes no command where there is no TPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rfmedsam2_jax.base import accelerators
from rfmedsam2_jax.base.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def unsaid(monkeypatch):
  """An environment that says nothing about devices."""
  for name in (*accelerators._SAID, "TPU_LIBRARY_PATH"):
    monkeypatch.delenv(name, raising=False)


def card(root, vendor, device):
  folder = root / "sys/bus/pci/devices" / f"{vendor}:{device}"
  folder.mkdir(parents=True)
  (folder / "vendor").write_text(f"{vendor}\n")
  (folder / "device").write_text(f"{device}\n")


def test_a_tpu_is_seen_by_its_card_its_driver_or_what_a_launcher_says(
  unsaid, tmp_path, monkeypatch
):
  assert not accelerators.tpu_possible(tmp_path)
  card(tmp_path, "0x1ae0", "0x0042")  # Google's network card
  card(tmp_path, "0x10de", "0x2330")  # an H100
  assert not accelerators.tpu_possible(tmp_path)
  card(tmp_path / "one", "0x1ae0", "0x0063")  # v5e
  assert accelerators.tpu_possible(tmp_path / "one")
  for name in ("dev/accel0", "dev/vfio/0"):
    path = tmp_path / name.replace("/", "-") / name
    path.parent.mkdir(parents=True)
    path.touch()
    assert accelerators.tpu_possible(tmp_path / name.replace("/", "-"))
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
  assert accelerators.tpu_possible(tmp_path)


# A command, and then whatever looks at JAX's devices.
COMMAND = """
from rfmedsam2_jax.cli.entry import main
main(["evaluate", "none", "none"])
import jax
print(jax.devices()[0].platform)
"""
STAND_IN = """
import os
os.environ.setdefault("TPU_LIBRARY_PATH", __file__)
print("libtpu is asked")
def get_library_path():
  return "libtpu.so"
"""


def said(tmp_path, **variables):
  folder = tmp_path / "libtpu"
  folder.mkdir(exist_ok=True)
  (folder / "__init__.py").write_text(STAND_IN)
  done = subprocess.run(
    [sys.executable, "-c", COMMAND], capture_output=True, text=True,
    env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"} | variables)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


@pytest.mark.skipif(accelerators.tpu_possible(), reason="this machine may have a TPU")
def test_commands_do_not_ask_libtpu_on_a_machine_without_a_tpu(unsaid, tmp_path):
  # As a program leaves it to those that it starts, if it has imported libtpu.
  library = str(tmp_path / "libtpu" / "__init__.py")
  assert said(tmp_path, TPU_LIBRARY_PATH=library) == ["cpu"]


def test_commands_leave_libtpu_alone_where_there_may_be_a_tpu(unsaid, tmp_path):
  assert said(tmp_path, TPU_NAME="pod", JAX_PLATFORMS="cpu") == ["libtpu is asked", "cpu"]


def test_the_compiler_is_found_again_or_asked_for(unsaid, tmp_path, monkeypatch):
  for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
    monkeypatch.setenv(name, "")  # so that what is set is taken back
  monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD")
  monkeypatch.setenv("TPU_LOG_DIR", "logs")
  monkeypatch.setitem(sys.modules, "libtpu", None)
  monkeypatch.setattr(sys, "path", [str(tmp_path)])
  with pytest.raises(UserError, match=r"rfmedsam2-jax\[tpu-compile\]"):
    accelerators.prepare_tpu_compiler()
  (tmp_path / "libtpu.py").touch()
  accelerators.prepare_tpu_compiler()
  assert os.environ["TPU_SKIP_MDS_QUERY"] == os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
  assert os.environ["TPU_LOG_DIR"] == "logs"  # what a user has said stays
