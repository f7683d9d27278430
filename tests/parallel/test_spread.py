"""Prediction of one volume on all devices of a host."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).parent / "spread_worker.py"


@pytest.mark.slow
def test_a_volume_is_segmented_alike_on_one_device_and_on_three(tiny_run, phantoms, tmp_path):
  unseen = sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0]
  found = {}
  for devices in ("1", "3"):
    out = tmp_path / f"{devices}.npz"
    command = [sys.executable, str(WORKER), str(tiny_run), str(unseen), str(out)]
    environment = os.environ | {
      "PYTHONPATH": str(WORKER.parents[2]),
      "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
      f"--xla_force_host_platform_device_count={devices}",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found[devices] = np.load(out)
  one, three = found["1"], found["3"]
  np.testing.assert_array_equal(one["used"], [1] * 4)
  np.testing.assert_array_equal(three["used"], [3] * 4)
  assert len(one["cells1"]), "the tiny run must find something"
  for name in set(one.files) - {"used"}:
    # What is handed from stage to stage is float16; batches of another size round otherwise.
    scale = max(np.abs(one[name][np.abs(one[name]) < 1000]).max(), 1)
    assert np.abs(one[name].astype(float) - three[name]).max() < 2e-3 * scale, name
