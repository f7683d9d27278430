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
from rfmedsam2_jax.data.splits import load_split
from rfmedsam2_jax.evaluation.scores import Scores, as_dict, evaluate_arrays
from rfmedsam2_jax.model import load
from rfmedsam2_jax.refinement.first_prompts import shadows, truth_boxes, with_oracle
from rfmedsam2_jax.segmentation.segmenter import (
  Segmentation,
  first_prompts,
  label_maps,
  prepare,
  refine,
  run_generator,
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
  labels = segmenter.plan.labels
  dataset = read_dataset(config.data.dataset, config.data.structures)
  held_out = load_split(options.run / "splits.json").validation[: options.cases]
  cases = [case for case in dataset.cases if case.identifier in held_out]
  found: list[dict] = [{} for _ in range(segmenter.stages)]
  seconds = []
  for number, case in enumerate(cases):
    volume, atoms = read_case(case, len(dataset.channels), labels)
    began = time.monotonic()
    prepared, seen = prepare(volume, segmenter.plan)
    log_odds = run_generator(segmenter, prepared, seen=seen)
    if options.corrupt:
      if log_odds.shape[1:] != prepared.image.shape[1:]:
        raise SystemExit("--corrupt: is for a generator whose grid is that of the slices")
      rng = np.random.default_rng(number)
      log_odds = np.stack([corrupted(odds, options.corrupt, rng) for odds in log_odds])
    truth = shown = None
    if options.prompts == "oracle":
      truth = prepare_atoms(atoms, segmenter.plan, prepared.restore)
      shown = shadows(truth, labels)
    made = first_prompts(segmenter, prepared, log_odds.astype(np.float16), shown)
    prompts, side = made.prompts, segmenter.sam2.config.image_size
    if truth is not None:
      prompts = with_oracle(prompts, *truth_boxes(truth, labels, made.cuts, side), side)
    results = refine(segmenter, prepared, made.cuts, prompts)
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
