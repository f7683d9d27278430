"""The smallest config that has every part: what the tests train, predict and damage."""

from pathlib import Path
from typing import Any

import yaml

from rfmedsam2_jax.data.phantom import PhantomConfig

PHANTOMS = PhantomConfig(
  cases=4, test_cases=2, slice_spacing=(9.0, 10.0), pixel_spacing=(5.0, 6.0), seed=3
)

TINY: dict[str, Any] = {
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


def write_tiny_config(folder: Path, dataset: Path) -> Path:
  tree = TINY | {"data": TINY["data"] | {"dataset": str(dataset)}}
  path = folder / "tiny.yaml"
  path.write_text(yaml.safe_dump(tree))
  return path
