"""Signals at any moment: one line, exit status 130, nothing half-written, and it works again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINE = "rfmedsam2: interrupted; what was finished is kept\n"


def started(*arguments, script: str = "") -> subprocess.Popen:
  how = ["-c", script] if script else ["-m", "rfmedsam2_jax"]
  return subprocess.Popen(
    [sys.executable, *how, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True, cwd=ROOT,
  )


@pytest.mark.parametrize(
  "number, after", [(signal.SIGINT, 0.4), (signal.SIGTERM, 0.8), (signal.SIGHUP, 1.3)]
)
def test_importing_jax_is_no_bad_moment(tmp_path, number, after):
  process = started("train", ROOT / "configs" / "hippocampus.yaml", "--out", tmp_path / "run")
  time.sleep(after)
  process.send_signal(number)
  out, error = process.communicate(timeout=20)
  assert (process.returncode, out) == (130, "")
  assert error in (LINE, "interrupted\n")  # the second before its options are read
  assert not list(tmp_path.iterdir())


def test_what_python_cannot_interrupt_ends_too():
  process = started(script="""
import hashlib
from rfmedsam2_jax.base import interruption
interruption.install()
print("now", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without a line of Python
""")
  assert process.stdout.readline() == "now\n"
  process.send_signal(signal.SIGINT)
  began = time.monotonic()
  _, error = process.communicate(timeout=20)
  assert (process.returncode, error) == (130, "interrupted\n") and time.monotonic() - began < 5


def test_a_file_that_is_being_written_goes_and_the_old_one_stays(tmp_path):
  (tmp_path / "result").write_text("old")
  process = started(tmp_path / "result", script="""
import os, signal, sys
from rfmedsam2_jax.base import interruption
from rfmedsam2_jax.data.files import replacing
interruption.install()
with replacing(sys.argv[1]) as temporary:
  temporary.write_text("half")
  assert len(os.listdir(temporary.parent)) == 2
  os.kill(os.getpid(), signal.SIGTERM)
""")
  _, error = process.communicate(timeout=60)
  assert process.returncode == 130, error
  assert os.listdir(tmp_path) == ["result"] and (tmp_path / "result").read_text("utf-8") == "old"


def test_ignored_signals_stay_ignored():
  """As nohup and a shell's background jobs want it."""
  process = started(script="""
import os, signal
from rfmedsam2_jax.base import interruption
signal.signal(signal.SIGHUP, signal.SIG_IGN)
interruption.install()
os.kill(os.getpid(), signal.SIGHUP)
print("went on")
""")
  assert process.communicate(timeout=20)[0] == "went on\n"


@pytest.mark.slow
def test_predict_works_again_after_every_interruption(tiny_run, phantoms, tmp_path):
  scans = phantoms / "imagesTs"
  arguments = ["predict", tiny_run, scans, "--out", tmp_path / "out", "--overwrite"]
  for said in ("starting", "compiling the generator", "2/2"):
    process = started(*arguments, "--json")
    for line in process.stdout:
      if said in line or said == "starting":
        break
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert rest[0].splitlines()[-1].startswith('{"error": "interrupted') and not rest[1]
    assert not [path for path in (tmp_path / "out").rglob(".*")]
  process = started(*arguments, "--quiet")
  out, error = process.communicate(timeout=300)
  assert process.returncode == 0 and out.startswith("2 label maps"), error
