"""Programs that are given away: they compute what the package computes, without it."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import program_worker
import pytest
from drawn_run import write_drawn_run
from small_sam2 import SIDE, SMALL, drawn, images, relative

from rfmedsam2_jax import tracking
from rfmedsam2_jax.archive import run_programs
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.model import load
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.weights.checkpoint import save_checkpoint

DEPTH, PROMPTED = 5, 2
PROMPTS = {
  "box": tracking.SlicePrompt(0, PROMPTED, box=(10, 12, 40, 37)),
  "point": tracking.SlicePrompt(
    0, PROMPTED, np.array([[25, 24]], np.float32), np.ones(1, np.int32)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, phantoms):
  folder = write_drawn_run(tmp_path_factory.mktemp("runs") / "drawn", phantoms)
  save_checkpoint(folder / "tracker" / "params", SMALL, drawn(), {})
  return folder


@pytest.fixture(scope="module")
def unpacked(run, tmp_path_factory):
  """The folder of an archive with programs, unpacked as anybody would."""
  folder = tmp_path_factory.mktemp("programs")
  archive = folder / "model.zip"
  assert main(["export", str(run), str(archive), "--licence", "CC0-1.0", "--programs"]) == 0
  with zipfile.ZipFile(archive) as opened:
    opened.extractall(folder / "model")
  return folder / "model"


@pytest.fixture(scope="module")
def manifest(unpacked):
  return json.loads((unpacked / "programs" / "programs.json").read_text())


def tokens(prompt):
  """A prompt as programs.json says."""
  box = () if prompt.box is None else np.reshape(prompt.box, (2, 2))
  where = np.concatenate([np.reshape(box, (-1, 2)), prompt.points])
  labels = [*((2, 3) if len(box) else ()), *prompt.labels, -1]
  return (np.pad(where, ((0, 8 - len(where)), (0, 0)))[None].astype(np.float32),
          np.array([labels + [-2] * (8 - len(labels))], np.int32))


def test_a_process_without_the_package_computes_what_the_package_does(run, unpacked, tmp_path):
  slices = images(DEPTH)
  model = load(run)
  patches = np.random.default_rng(0).normal(size=(2, *model.plan.patch_size, 1))
  given = {"images": slices, "prompted": PROMPTED, "patches": patches.astype(np.float32)}
  for name, prompt in PROMPTS.items():
    given[f"{name}_points"], given[f"{name}_labels"] = tokens(prompt)
  np.savez(tmp_path / "in.npz", **given)
  worker = [sys.executable, program_worker.__file__, unpacked / "programs", tmp_path / "in.npz",
            tmp_path / "out.npz"]
  done = subprocess.run(worker, cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  theirs = np.load(tmp_path / "out.npz")

  sam2, params = SAM2(SMALL), drawn()
  follower = tracking.VolumeTracker(
    sam2, params, tracking.TrackingConfig(cache="float32"), lambda z: slices[z], DEPTH)
  for name, prompt in PROMPTS.items():
    cells = follower.track([prompt]).cells
    assert (cells.presence[0] > 0).any()
    for field in ("logits", "presence"):
      assert relative(theirs[f"{name}_{field}"], getattr(cells, field)[0]) < 2e-5, (name, field)
  ours = jax.jit(tracking.encode_images, static_argnums=0)(sam2, params, slices[:1])
  assert relative(theirs["embedding"], ours.embedding) < 2e-6
  logits = jax.jit(model.unet.apply)({"params": model.generator}, given["patches"])
  assert relative(theirs["voxel_logits"], logits) < 2e-6
