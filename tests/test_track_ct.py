"""An organ of a real CT, followed by a network that came as an official checkpoint."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch_sam2
from torch_sam2 import torch

from convert.__main__ import main as convert
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.evaluation.metrics import dice
from rfmedsam2_jax.nn import PRESETS

SCAN = Path(__file__).resolve().parents[2] / "shared" / "data" / "ct_abdomen_512"
SPLEEN = 1


@pytest.mark.slow
@pytest.mark.skipif(not SCAN.is_dir(), reason="../shared/data is absent")
def test_a_prompted_organ_is_tracked_from_an_official_checkpoint(tmp_path):
  """The weights are random: only the prompted slices can be right, all others just have to run."""
  model = torch_sam2.official(PRESETS["sam2.1_hiera_tiny"])
  torch.save({"model": model.state_dict()}, tmp_path / "sam2.1_hiera_tiny.pt")
  assert convert([str(tmp_path / "sam2.1_hiera_tiny.pt"), str(tmp_path / "ckpt")]) == 0

  image = nib.load(SCAN / "ct.nii.gz")
  labels = nib.as_closest_canonical(nib.load(SCAN / "labels.nii.gz"))
  spleen = np.asarray(labels.dataobj) == SPLEEN
  middle = int(spleen.sum(axis=(0, 1)).argmax())
  sparse = np.zeros(spleen.shape, np.uint8)
  for z in (middle, middle + 3):
    sparse[..., z] = spleen[..., z]
  nib.save(nib.Nifti1Image(sparse, labels.affine), tmp_path / "prompts.nii.gz")
  # Sides of SAM 2's square at which the whole takes less than a minute.
  arguments = [
    "track", SCAN / "ct.nii.gz", "--checkpoint", tmp_path / "ckpt", "--masks",
    tmp_path / "prompts.nii.gz", "--image-size", "256", "--window", "soft-tissue", "--out",
    tmp_path / "out",
  ]
  assert main([str(a) for a in arguments]) == 0

  found = nib.load(tmp_path / "out" / "ct.nii.gz")
  assert found.shape == image.shape
  np.testing.assert_array_equal(found.affine, image.affine)
  organ = np.asarray(nib.as_closest_canonical(found).dataobj) == SPLEEN
  for z in (middle, middle + 3):
    assert dice(organ[..., z], spleen[..., z]) > 0.9
  assert (tmp_path / "out" / "ct.png").stat().st_size > 10_000
