"""Scores a finished run on its validation cases in another way than it was trained for.

python benchmarks/accuracy/score_run.py RUN --out FILE.json [--prompts oracle]
    [--corrupt erosion|dilation|gaps|islands] [--cases N] [refinement.key=value ...]

--corrupt puts mistakes into the generator's masks before the stages see them: what does each stage
recover? Overrides are of `refinement` and `inference` only, as in refinement.generator_weight=0.
The file also has seconds per volume (the first one, which compiles, left out), peak memory, and
what RUN.json beside the run, if ours.py wrote it there, says of its training.
"""

import argparse
import dataclasses
import functools
import json
import resource
import time
from pathlib import Path

import numpy as np
from results import save
from scipy import ndimage

from rfmedsam2_jax.base.constants import LOGIT_LIMIT
from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.data.datasets import IGNORED, read_case, read_dataset
from rfmedsam2_jax.data.preprocessing import prepare_atoms
from rfmedsam2_jax.data.sam_slices import resize_linear
from rfmedsam2_jax.data.splits import load_split
from rfmedsam2_jax.evaluation.scores import Scores, as_dict, evaluate_arrays
from rfmedsam2_jax.model import load
from rfmedsam2_jax.refinement import refine_volume
from rfmedsam2_jax.refinement.first_prompts import generated, with_oracle
from rfmedsam2_jax.segmentation.segmenter import (
  Generated,
  Segmentation,
  Segmenter,
  label_maps,
  prepare,
  run_generator,
  sam_slices,
  truth_boxes,
)

CORRUPTIONS = ("erosion", "dilation", "gaps", "islands")


def corrupted(log_odds: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
  """Mistakes in a structure's log-odds [D, H, W].

  erosion, dilation: by one voxel along every axis. gaps: a third of the slices with the structure
  are lost. islands: three false balls of 3 voxels radius.
  """
  odds = log_odds.astype(np.float32)
  if kind == "erosion":
    return ndimage.minimum_filter(odds, size=3, mode="nearest")
  if kind == "dilation":
    return ndimage.maximum_filter(odds, size=3, mode="nearest")
  if kind == "gaps":
    there = np.flatnonzero((odds > 0).any(axis=(1, 2)))
    odds[there[rng.random(len(there)) < 1 / 3]] = -LOGIT_LIMIT
    return odds
  grid = np.ogrid[tuple(slice(n) for n in odds.shape)]
  for _ in range(3):
    centre = rng.uniform(0, odds.shape)
    distance = np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)))
    odds = np.maximum(odds, np.clip(4 * (3 - distance), -LOGIT_LIMIT, 8))
  return odds


def corrupted_generator(
  made: Generated, kind: str, seed: int, segmenter: Segmenter
) -> Generated:
  """The generator's result with mistakes, as `run_generator` would have given it."""
  rng = np.random.default_rng(seed)
  odds = np.stack([corrupted(organ, kind, rng) for organ in made.log_odds])
  if odds.shape[1] != made.prompts.logits.shape[1]:
    raise SystemExit("--corrupt: is for a generator whose slices are those of the stages")
  side, margin = segmenter.sam2.config.image_size, segmenter.refinement.box_margin
  logits = np.clip(resize_linear(odds, side // 4), -LOGIT_LIMIT, LOGIT_LIMIT)
  return Generated(odds.astype(np.float16), generated(logits.astype(np.float16), side, margin))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("run", type=Path)
  parser.add_argument("overrides", nargs="*")
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--prompts", choices=("generated", "oracle"), default="generated")
  parser.add_argument("--corrupt", choices=CORRUPTIONS)
  parser.add_argument("--cases", type=int, help="the first ones only")
  options = parser.parse_intermixed_args()
  config = load_config(options.run / "config.yaml", options.overrides)
  segmenter = dataclasses.replace(
    load(options.run), refinement=config.refinement, inference=config.inference
  )
  labels, sam2 = segmenter.plan.labels, segmenter.sam2
  dataset = read_dataset(config.data.dataset, config.data.structures)
  held_out = load_split(options.run / "splits.json").validation[: options.cases]
  cases = [case for case in dataset.cases if case.identifier in held_out]
  found: list[dict] = [{} for _ in range(segmenter.stages)]
  seconds = []
  for number, case in enumerate(cases):
    volume, atoms = read_case(case, len(dataset.channels), labels)
    began = time.monotonic()
    prepared, seen = prepare(volume, segmenter.plan)
    made = run_generator(segmenter, prepared, seen=seen)
    if options.corrupt:
      made = corrupted_generator(made, options.corrupt, number, segmenter)
    prompts = made.prompts
    if options.prompts == "oracle":
      truth = truth_boxes(prepare_atoms(atoms, segmenter.plan, prepared.restore), segmenter)
      prompts = with_oracle(prompts, *truth, sam2.config.image_size)
    results = refine_volume(
      sam2, segmenter.refiner, segmenter.refinement,
      functools.partial(sam_slices, segmenter, prepared), prompts,
    )
    maps = label_maps([Segmentation(segmenter, prepared, made, results)])
    seconds.append(time.monotonic() - began)
    reference = np.array(labels.atom_values)[np.where(atoms == IGNORED, 0, atoms)]
    for stage, guess in enumerate(maps):
      found[stage][case.identifier] = evaluate_arrays(
        guess, reference, volume.geometry.voxel_steps, labels.structures
      )
    print(f"{number + 1}/{len(cases)} {case.identifier}", flush=True)
  trained = options.run.with_suffix(".json")
  training = json.loads(trained.read_text("utf-8")) if trained.exists() else {}
  about = {
    "what": "rfmedsam2_jax, scored",
    "training": {name: training[name] for name in ("config", "overrides", "from", "seconds")
                 if name in training},
    "run": str(options.run), "overrides": options.overrides,
    "prompts": options.prompts, "corrupt": options.corrupt,
    "seconds": {"per volume": round(float(np.median(seconds[1:] or seconds)), 2)},
    "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    "versions": json.loads((options.run / "versions.json").read_text("utf-8")),
  }
  stages = {f"stage{n}": as_dict(Scores(labels.names, 1.0, s)) for n, s in enumerate(found)}
  save(options.out, about, stages)


if __name__ == "__main__":
  main()
