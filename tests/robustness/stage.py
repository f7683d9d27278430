"""What the cases damage: a tiny run, checkpoints, a scan. Made once per campaign."""

import dataclasses
import json
import shutil
import sys
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # helpers of the tests
sys.path.insert(0, str(Path(__file__).parents[2]))  # convert/, which is not installed

SHAPE = (20, 18, 12)  # voxels of the scan, x y z
SPACING = (6.0, 6.0, 9.5)  # mm, near those that the run was trained on


@dataclasses.dataclass(frozen=True)
class Stage:
  """Folders below `place`, read only for cases."""

  place: Path

  @property
  def run(self) -> Path:
    return self.place / "run"

  @property
  def dataset(self) -> Path:
    return self.place / "phantoms"

  @property
  def config(self) -> Path:
    return self.place / "tiny.yaml"

  @property
  def checkpoint(self) -> Path:
    return self.place / "checkpoint"

  @property
  def scan(self) -> Path:
    return self.place / "scan.nii.gz"

  @property
  def labels(self) -> Path:
    return self.place / "labels" / "scan.nii.gz"

  @property
  def model(self):
    return _model(self.run)

  def voxels(self) -> np.ndarray:
    """int16 [x, y, z]."""
    return np.asarray(nib.load(self.scan).dataobj)


def write_foreign(place: Path) -> None:
  """An official checkpoint of a tiny SAM 2 with a config that names it, and an nnU-Net."""
  import torch
  import torch_sam2
  import yaml
  from nnunet_model import ISOTROPIC, write_model

  state = torch_sam2.official(torch_sam2.TINY).state_dict()
  torch.save({"model": state}, place / "official.pt")
  sam2 = json.loads(json.dumps(dataclasses.asdict(torch_sam2.TINY)))
  (place / "sam2.yaml").write_text(yaml.safe_dump({"sam2": sam2}))
  write_model(place / "nnunet", ISOTROPIC, 1)


@cache
def _model(run: Path):
  from rfmedsam2_jax.model import load

  return load(run)


def affine() -> np.ndarray:
  """RAS+, axes along the patient's, an origin."""
  result = np.diag([*SPACING, 1.0])
  result[:3, 3] = -50, 20, 310
  return result


def build(place: Path, run: Path | None = None, dataset: Path | None = None) -> Stage:
  """Makes everything.

  Args:
    run, dataset: to be copied instead of made, which takes half a minute.
  """
  from small_sam2 import SMALL, drawn
  from tiny_config import PHANTOMS, write_tiny_config

  from rfmedsam2_jax.cli import main
  from rfmedsam2_jax.data.phantom import write_phantom
  from rfmedsam2_jax.weights.checkpoint import save_checkpoint

  stage = Stage(place)
  if dataset is None:
    write_phantom(stage.dataset, PHANTOMS)
  else:
    shutil.copytree(dataset, stage.dataset)
  write_tiny_config(place, stage.dataset)
  if run is None:
    assert main(["train", str(stage.config), "--out", str(stage.run), "--quiet"]) == 0
  else:
    shutil.copytree(run, stage.run)
  write_scan(stage)
  save_checkpoint(stage.checkpoint, SMALL, drawn(), {"source": "drawn"})
  write_foreign(place)
  (place / "prompts.json").write_text(json.dumps(PROMPTS))
  (place / "given.json").write_text(json.dumps(GIVEN))
  return stage


PROMPTS = [
  {"label": 1, "box": [[4, 5, 6], [11, 12, 6]]},
  {"label": 2, "points": [[14, 8, 4, 1], [2, 2, 4, 0]], "round": 0},
  {"label": 1, "points": [[6, 7, 8, 1]], "round": 1},
]
GIVEN = {"scan": [
  {"structure": "liver", "box": [[4, 5, 6], [11, 12, 6]]},
  {"structure": "spleen", "points": [[14, 8, 4, 1], [2, 2, 4, 0]]},
]}


def write_scan(stage: Stage) -> None:
  """A scan with two bright blocks in noise, and its label map."""
  rng = np.random.default_rng(0)
  labels = np.zeros(SHAPE, np.uint8)
  labels[3:11, 4:12, 3:9] = 1
  labels[12:17, 5:11, 2:7] = 2
  voxels = rng.normal(0, 30, SHAPE) + np.array([0, 100, 160])[labels]
  stage.labels.parent.mkdir()
  for path, array in ((stage.scan, voxels.astype(np.int16)), (stage.labels, labels)):
    image = nib.Nifti1Image(array, affine())
    image.header.set_xyzt_units("mm")
    image.set_qform(affine(), code=1)
    image.set_sform(affine(), code=1)
    nib.save(image, path)


if __name__ == "__main__":
  import jax

  jax.config.update("jax_disable_most_optimizations", True)
  build(Path(sys.argv[1]))
