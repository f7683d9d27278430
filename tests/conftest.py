"""Shared by the tests: a tiny run, trained once for a few steps on small phantoms.

Its place also makes the helpers beside it (torch_sam2) importable from every test.
"""

from pathlib import Path

import jax
import pytest
import yaml

from rfmedsam2_jax.data.phantom import PhantomConfig, write_phantom

TINY = {
  "data": {"split": {"fraction": 0.25}},
  "plan": {"patch_size": [16, 32, 32], "poolings": 1},
  "generator": {
    "features": [8, 16],
    "convs_per_stage": 1,
    "batch_size": 2,
    "loop": {"steps": 6, "log_every": 2, "checkpoint_every": 2},
    "optimizer": {"warmup_steps": 2},
  },
  "sam2": {
    "preset": "nano",
    "image_size": 64,
    "embed_dim": 8,
    "stages": [1, 1, 1, 1],
    "global_att_blocks": [2],
    "window_spec": [4, 4, 4, 2],
    "d_model": 32,
    "mem_dim": 8,
    "decoder_depth": 1,
    "memory_mask_channels": [4, 4, 8, 16],
  },
  "refiner": {
    "trainable": ["*"],
    "slices": 4,
    "structures": 2,
    "loop": {"steps": 6, "log_every": 2, "checkpoint_every": 2},
    "optimizer": {"warmup_steps": 2},
  },
  "refinement": {
    "cells_per_batch": 16,
    "stages": [{"residual": True}, {"residual": True, "pointers": True}],
  },
}


@pytest.fixture(autouse=True, scope="session")
def quick_compilation():
  """Networks of tests are so small that compiling them takes longer than running them.

  tests/nn switches it off: what is compared with the original there is compiled as users have it.
  """
  jax.config.update("jax_disable_most_optimizations", True)


def write_tiny_config(folder: Path, dataset: Path) -> Path:
  tree = TINY | {"data": TINY["data"] | {"dataset": str(dataset)}}
  path = folder / "tiny.yaml"
  path.write_text(yaml.safe_dump(tree))
  return path


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
  """A data set of four small labelled phantoms and two unseen ones."""
  folder = tmp_path_factory.mktemp("data") / "phantoms"
  config = PhantomConfig(
    cases=4, test_cases=2, slice_spacing=(9.0, 10.0), pixel_spacing=(5.0, 6.0), seed=3
  )
  return write_phantom(folder, config)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, phantoms) -> Path:
  return write_tiny_config(tmp_path_factory.mktemp("config"), phantoms)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_config) -> Path:
  """A finished run of the tiny config; its networks know nothing, but everything is there."""
  from rfmedsam2_jax.cli import main

  run = tmp_path_factory.mktemp("runs") / "tiny"
  assert main(["train", str(tiny_config), "--out", str(run)]) == 0
  return run
