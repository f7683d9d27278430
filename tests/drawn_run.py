"""A run's folder with networks as they are drawn: everything that a finished one has."""

import json
from pathlib import Path

import jax
from tiny_config import TINY

from rfmedsam2_jax.config import parse_config
from rfmedsam2_jax.config.reading import config_yaml
from rfmedsam2_jax.data.datasets import read_dataset
from rfmedsam2_jax.data.files import save_json
from rfmedsam2_jax.data.fingerprint import make_fingerprint
from rfmedsam2_jax.data.plan import make_plan, save_plan
from rfmedsam2_jax.model import untrained
from rfmedsam2_jax.nn import init_params
from rfmedsam2_jax.nn.initialisation import init_generator
from rfmedsam2_jax.weights.checkpoint import save_checkpoint
from rfmedsam2_jax.weights.orbax import save_params


def write_drawn_run(folder: Path, phantoms: Path) -> Path:
  tree = TINY | {"data": TINY["data"] | {"dataset": str(phantoms)},
                 "refiner": TINY["refiner"] | {"init_from": "/home/somebody/ckpt/tiny"}}
  config = parse_config(tree)
  fingerprint = make_fingerprint(read_dataset(phantoms))
  plan = make_plan(fingerprint, config.plan)
  segmenter = untrained(config, plan)
  folder.mkdir()
  (folder / "config.yaml").write_text(config_yaml(config))
  save_plan(folder / "plan.json", plan)
  save_json(folder / "fingerprint.json", fingerprint)
  (folder / "versions.json").write_text(json.dumps({"jax": "1.2.3"}))
  (folder / "splits.json").write_text(json.dumps({"train": ["a", "b"], "validation": ["c"]}))
  about = {"source": {"name": "/home/somebody/ckpt/tiny.pt", "sha256": {"tiny.pt": "abc"}}}
  (folder / "init_from.json").write_text(json.dumps(about))
  key = jax.random.key(0)
  generator = jax.jit(lambda key: init_generator(segmenter.unet, 1, key))(key)
  save_params(folder / "generator" / "params", generator, {"config": tree})
  save_checkpoint(folder / "refiner" / "params", config.sam2, init_params(config.sam2, key), about)
  return folder
