"""Stand-ins for what the documents' commands name: small, of the right kind, made when needed."""

import dataclasses
import fnmatch
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import yaml
from doc_lines import ROOT
from tests_data import save_series
from tiny_config import TINY


def _write_ct(path: Path) -> None:
  """Large enough for the boxes that the documents draw: x to 340, y to 340, 58 slices."""
  voxels = np.random.default_rng(0).normal(40, 20, (340, 340, 58)).astype(np.int16)
  voxels[120:300, 200:330, 30:58] += 100
  nib.save(nib.Nifti1Image(voxels, np.diag([0.8, 0.8, 2.5, 1.0])), path)


class Places:
  """Makes what a pattern of STAND_INS stands for.

  Args:
    phantoms, run: the data set and the run that all tests share.
    kept: a folder for what is made once.
  """

  def __init__(self, phantoms: Path, run: Path, kept: Path):
    self._phantoms, self._run, self._kept = phantoms, run, kept

  def provide(self, words: Iterable[str], folder: Path) -> None:
    """Puts a stand-in under every path among `words` that has one and does not exist yet."""
    for word in words:
      path = word.rpartition("=")[2].rstrip("/")
      for pattern, make in STAND_INS.items():
        if path and fnmatch.fnmatchcase(path, pattern) and not (folder / path).exists():
          (folder / path).parent.mkdir(parents=True, exist_ok=True)
          make(self, folder / path)
          break

  def dataset(self, path: Path) -> None:
    shutil.copytree(self._phantoms, path)

  def scans(self, path: Path) -> None:
    shutil.copytree(self._phantoms / "imagesTs", path)

  def references(self, path: Path) -> None:
    shutil.copytree(self._phantoms / "labelsTs", path)

  def run(self, path: Path) -> None:
    shutil.copytree(self._run, path)

  def ct(self, path: Path) -> None:
    made = self._once("ct.nii.gz", _write_ct)
    path.symlink_to(made)

  def scan(self, path: Path) -> None:
    image = sitk.ReadImage(str(sorted((self._phantoms / "imagesTs").iterdir())[0]))
    if path.suffix:
      sitk.WriteImage(image, str(path))
    else:
      save_series(path, image)

  def study(self, path: Path) -> None:
    """A folder or archive with a CT and a series of another modality."""
    image = sitk.ReadImage(str(sorted((self._phantoms / "imagesTs").iterdir())[0]))
    folder = path.with_suffix("") if path.suffix else path
    folder.mkdir()
    save_series(folder / "ct", image)
    save_series(folder / "scout", image[:, :, :3], series="1.2.4")
    for file in (folder / "scout").iterdir():
      one = pydicom.dcmread(file)
      one.Modality = "DX"
      one.save_as(file)
    if path.suffix:
      shutil.make_archive(str(folder), "zip", folder)
      shutil.rmtree(folder)

  def predictions(self, path: Path) -> None:
    def predict(made: Path) -> None:
      from rfmedsam2_jax.cli import main

      inputs = str(self._phantoms / "imagesTs")
      assert main(["predict", str(self._run), inputs, "--out", str(made), "--save-stages"]) == 0

    shutil.copytree(self._once("predictions", predict), path)

  def config(self, path: Path) -> None:
    path.write_text(yaml.safe_dump({"data": {"dataset": str(self._phantoms)}}))

  def given(self, path: Path) -> None:
    """A person's box, as docs/tracking.md writes it."""
    path.write_text(json.dumps([{"label": 1, "box": [[120, 200, 40], [310, 330, 40]]}]))

  def official(self, path: Path) -> None:
    """Random weights as the official program saves them, of a network with few channels."""
    def write(made: Path) -> None:
      torch_sam2 = pytest.importorskip("torch_sam2")
      torch_sam2.torch.save({"model": torch_sam2.official(torch_sam2.TINY).state_dict()}, made)

    path.symlink_to(self._once("official.pt", write))

  def checkpoint(self, path: Path) -> None:
    def convert(made: Path) -> None:
      from convert.__main__ import main

      self.official(made.parent / "of_checkpoint.pt")
      assert main([str(made.parent / "of_checkpoint.pt"), str(made), "--config",
                   str(self.network(made.parent))]) == 0

    shutil.copytree(self._once("checkpoint", convert), path)

  def nnunet(self, path: Path) -> None:
    model = pytest.importorskip("nnunet_model")
    labels = json.loads((self._phantoms / "dataset.json").read_text("utf-8"))["labels"]
    model.write_model(path, model.ISOTROPIC, 1, labels)

  def key(self, path: Path) -> None:
    path.write_text("0123456789abcdef" * 2 + "\n")

  def server(self, folder: Path):
    """A context: the address of a server of the documented CT, see api_server."""
    pytest.importorskip("fastapi")
    from api_server import documented

    served = folder.resolve() / "served"
    served.mkdir()
    shutil.copy(self._once("ct.nii.gz", _write_ct), served)  # links out of it are refused
    return documented(served, self._run)

  def network(self, folder: Path) -> Path:
    """The YAML file that describes `official`: no size that convert recognises is small enough."""
    path = folder / "tiny_network.yaml"
    path.write_text(yaml.safe_dump({"sam2": tiny_network()}))
    return path

  def _once(self, name: str, make: Callable[[Path], None]) -> Path:
    path = self._kept / name
    if not path.exists():
      make(path)
    return path


# What a path that a command reads stands for, first match first. Paths lie below the folder that
# the command runs in; /data and the like are moved there.
STAND_INS: dict[str, Callable[[Places, Path], None]] = {
  "runs/tracker/tracker/params": Places.checkpoint,
  "runs/*": Places.run,
  "*Task04_Hippocampus": Places.dataset,
  "*nnUNet_raw/Dataset*": Places.dataset,
  "*data/[A-Z]*": Places.dataset,
  "phantoms": Places.dataset,
  "phantoms/imagesTs": Places.scans,
  "phantoms/labelsTs": Places.references,
  "nnUNetTrainer__*": Places.nnunet,
  "sam2*.pt": Places.official,
  "sam2.1_hiera_tiny": Places.checkpoint,
  "ckpt/*": Places.checkpoint,
  "checkpoint": Places.checkpoint,
  "config.yaml": Places.config,
  "new_scans": Places.scans,
  "scans": Places.scans,
  "references": Places.references,
  "labels": Places.predictions,
  "predictions": Places.predictions,
  "ct.nii.gz": Places.ct,
  "scan.*": Places.scan,
  "dicom/*": Places.scan,
  "studies/*": Places.study,
  "prompts.json": Places.given,
  "key.txt": Places.key,
}


def tiny_network() -> dict:
  """`sam2` of a config: the smallest network of which the official classes have all parts."""
  torch_sam2 = pytest.importorskip("torch_sam2")
  tree = json.loads(json.dumps(dataclasses.asdict(torch_sam2.TINY)))
  return {key: value for key, value in tree.items() if key != "adapters"}


def small(words: list[str]) -> list[str]:
  """A documented training command with sizes and steps that take seconds.

  Values of the config file that other tests have no compiled program for are emptied before the
  line's own overrides are read, and TINY's follow them. What a converted nnU-Net brings (plan and
  generator) stays, but for a spacing at which phantoms are small.
  """
  tree = dict(TINY)
  if any(word.startswith("refiner.init_from=") for word in words):
    tree["sam2"] = {"preset": "nano"} | tiny_network()
  nnunet = any(re.search("nnunet.*yaml$", word) for word in words)
  if nnunet:
    del tree["generator"]
    tree |= {"plan": {"spacing": [10, 6, 6]}, "inference": {"mirror_axes": []}}
  if any(word.endswith("tracker.yaml") for word in words):
    loop = {"steps": 2, "log_every": 1, "checkpoint_every": 2}
    sizes = {"slices": 3, "objects": 2, "corrections": 1}
    tree = {"sam2": TINY["sam2"], "tracker": sizes | {"loop": loop}}
  before = [f"{key}={{}}" for key in tree if key != "data" and not (nnunet and key == "plan")]
  first = 2 if words[0] == "train" else 1  # behind the config
  return [*words[:first], *before, *words[first:], *_leaves(tree)]


def _leaves(tree: dict, where: str = "") -> Iterable[str]:
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, f"{where}{key}.")
    else:
      yield f"{where}{key}={json.dumps(value)}"


def prepare(folder: Path) -> Path:
  """A working directory with the clone's configs; one level down, for paths that begin with .."""
  here = folder / "here"
  here.mkdir()
  for name in ("configs", "benchmarks", "tests"):
    (here / name).symlink_to(ROOT / name)
  return here
