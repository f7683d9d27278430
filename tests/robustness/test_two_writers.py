"""Two commands that write to one folder at the same time leave whole results of one of them."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from frame import check_whole, snapshot


@pytest.mark.slow
def test_two_predictions_into_one_folder(tiny_run, phantoms, tmp_path):
  scan = sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0]

  def started(out):
    return subprocess.Popen(
      [sys.executable, "-m", "rfmedsam2_jax", "predict", str(tiny_run), str(scan), "--out",
       str(out), "--overwrite", "--probabilities", "--quiet"],
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  together = [started(tmp_path / "both") for _ in range(2)]
  alone = started(tmp_path / "one")
  for process in (*together, alone):
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "Traceback" not in error
  both, one = snapshot(tmp_path / "both"), snapshot(tmp_path / "one")
  assert both.keys() == one.keys()
  for name, content in both.items():
    check_whole(name, content)
    if name.endswith(".nii.gz"):
      np.testing.assert_array_equal(*(
        np.asarray(nib.load(tmp_path / folder / name).dataobj) for folder in ("both", "one")))
