"""CT: a scan whose label map is stored flipped, as a training case and with true boxes."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from tiny_config import TINY

from rfmedsam2_jax.cli import main
from rfmedsam2_jax.data.plan import load_plan
from rfmedsam2_jax.data.preprocessing import load_case

SCAN = Path(__file__).resolve().parents[2] / "shared" / "data" / "ct_abdomen_512"
ORGANS = {"spleen": 1, "liver": 5, "aorta": 52}
pytestmark = [
  pytest.mark.slow, pytest.mark.skipif(not SCAN.is_dir(), reason="../shared/data is absent")
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
  """The scan as a data set of one case, in nnU-Net's layout."""
  folder = tmp_path_factory.mktemp("ct")
  for part, source, name in [
    ("imagesTr", "ct.nii.gz", "scan_0000.nii.gz"), ("labelsTr", "labels.nii.gz", "scan.nii.gz")
  ]:
    (folder / part).mkdir()
    shutil.copy(SCAN / source, folder / part / name)
  values = np.unique(np.asarray(nib.load(SCAN / "labels.nii.gz").dataobj)).astype(int)
  names = {value: name for name, value in ORGANS.items()}
  labels = {names.get(v, f"label {v}" if v else "background"): v for v in values.tolist()}
  description = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1,
                 "file_ending": ".nii.gz"}
  (folder / "dataset.json").write_text(json.dumps(description))
  return folder


@pytest.fixture(scope="module")
def ct_run(dataset, tmp_path_factory) -> Path:
  tree = TINY | {  # how well it learns is asked by nobody
    name: TINY[name] | {"loop": {"steps": 2, "log_every": 2, "checkpoint_every": 2}}
    for name in ("generator", "refiner")
  } | {
    "data": {"dataset": str(dataset), "structures": list(ORGANS), "split": {"fraction": 0}},
    "plan": {"spacing": [4.0, 6.0, 6.0], "patch_size": [8, 32, 32], "poolings": 1},
  }
  folder = tmp_path_factory.mktemp("runs")
  (folder / "ct.yaml").write_text(yaml.safe_dump(tree))
  assert main(["train", str(folder / "ct.yaml"), "--out", str(folder / "ct")]) == 0
  return folder / "ct"


def test_a_label_map_that_is_stored_flipped_lies_on_its_organs(ct_run):
  """In world space the liver is soft tissue; paired by array index it would be -75 HU."""
  case = load_case(ct_run / "preprocessed", "scan")
  plan = load_plan(ct_run / "plan.json")
  (rule,) = plan.channels
  assert rule.kind == "ct" and case.atoms is not None
  hounsfield = np.asarray(case.image[0]) * rule.std + rule.mean
  liver = hounsfield[case.atoms == plan.labels.atom_values.index(ORGANS["liver"])]
  assert liver.size > 500 and 60 < np.median(liver) < 180


def test_true_boxes_are_refined_and_scored_for_the_runs_structures(
  ct_run, dataset, tmp_path, capsys
):
  scan = dataset / "imagesTr" / "scan_0000.nii.gz"
  arguments = ["predict", ct_run, scan, "--out", tmp_path / "out", "--prompts", "oracle",
               "--labels", dataset / "labelsTr"]
  assert main([str(a) for a in arguments]) == 0
  found = nib.load(tmp_path / "out" / "scan.nii.gz")
  image = nib.load(scan)
  assert found.shape == image.shape
  np.testing.assert_array_equal(found.affine, image.affine)
  assert set(np.unique(np.asarray(found.dataobj))) <= {0, *ORGANS.values()}
  capsys.readouterr()
  assert main(["evaluate", str(tmp_path / "out"), str(dataset / "labelsTr"), "--labels",
               str(ct_run)]) == 0
  table = capsys.readouterr().out
  assert all(name in table for name in ORGANS) and "label 2" not in table
