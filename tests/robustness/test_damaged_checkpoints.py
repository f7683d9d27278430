"""A damaged checkpoint is one line, whatever threads of Orbax and TensorStore have to say."""

import subprocess
import sys

READ_DAMAGED = """
import shutil, sys
from pathlib import Path
import numpy as np
from rfmedsam2_jax.base import command
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.weights.orbax import load_params, save_params

command.begin()
params = {f"m{i}": {"kernel": np.full((16, 16), i, np.float32)} for i in range(30)}
good, bad = Path("good"), Path("bad")
save_params(good, params, {})
for number in range(150):
  shutil.copytree(good, bad)
  files = sorted(path for path in bad.rglob("*") if path.is_file())
  path = files[number % len(files)]
  content = bytearray(path.read_bytes())
  content[number % len(content)] ^= 1 << number % 8
  path.write_bytes(content)
  try:
    load_params(bad, params)
  except UserError:
    pass
  shutil.rmtree(bad)
"""


def test_nothing_but_the_error_is_said_of_damaged_files(tmp_path):
  """One reading in sixteen printed tracebacks of threads that nobody waited for."""
  ran = subprocess.run(
    [sys.executable, "-c", READ_DAMAGED], cwd=tmp_path, capture_output=True, text=True, timeout=300
  )
  assert (ran.returncode, ran.stderr) == (0, "")
