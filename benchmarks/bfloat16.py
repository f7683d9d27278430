"""Training in bfloat16 beside training in float32: loss curves and final Dice on phantoms.

python benchmarks/bfloat16.py [--steps 200] [--out FOLDER] [--whole] [key.path=value ...]

Both networks of configs/quickstart.yaml are trained twice, from the same weights on the same
batches; the second refiner gets the first generator's prompts, or its batches would be others.
Printed are the relative differences of the losses, smoothed over ten steps, and the Dice of every
stage on phantoms that were held out.

The refiner is trained from scratch, one run of slices a step: whatever differs grows. A third
training shows by how much: float32, from weights that were rounded to bfloat16 once. The exit
status is 1 outside the band: the generator's loss 5 % at any step and 1 % in the mean, the
refiner's in the mean twice what rounding its first weights does, Dice 0.01.

A CPU only emulates bfloat16, so everything is smaller than in the config unless --whole is given.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.config import Config, config_yaml, load_config
from rfmedsam2_jax.data.phantom import PhantomConfig, write_phantom
from rfmedsam2_jax.nn import init_params
from rfmedsam2_jax.training.run import train
from rfmedsam2_jax.training.state import silenced_decoder
from rfmedsam2_jax.weights.checkpoint import save_checkpoint

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SMALLER = (
  "plan={spacing: [7.2, 6.6, 6.6], patch_size: [24, 32, 32], poolings: 2}",
  "generator.features=[8, 16, 32]",
  "sam2={preset: nano, image_size: 96}",
  "refiner.slices=4",
  "refiner.structures=2",
)
HALF = ("generator.dtype=bfloat16", "sam2.dtype=bfloat16")
SMOOTHED = 10  # steps
LARGEST, MEAN, TIMES, DICE = 0.05, 0.01, 2.0, 0.01  # the band


def settings(dataset: Path, steps: int, overrides: list[str]) -> Config:
  loops = [
    f"{phase}.loop={{steps: {steps}, log_every: 1, checkpoint_every: {steps}}}"
    for phase in ("generator", "refiner")
  ]
  held_out = "data.split={fraction: 0.34}"
  scratch = 'refiner.trainable=["*"]'
  return load_config(
    QUICKSTART, [f"data.dataset={dataset}", held_out, scratch, *loops, *overrides])


def starting_weights(folder: Path, config: Config) -> dict[str, str]:
  """Two checkpoints of the refiner's first weights: as drawn, and rounded to bfloat16."""
  params = silenced_decoder(init_params(config.sam2, jax.random.key(config.seed)))
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
  for name, tree in (("drawn", params), ("rounded", rounded)):
    save_checkpoint(folder / name, config.sam2, tree, {})
  return {name: f"refiner.init_from={folder / name}" for name in ("drawn", "rounded")}


def run(config: Config, out: Path, like: Path | None = None, folders: Sequence[str] = ()) -> None:
  """Trains and scores; with `like`, cases, prompts and what else is named are that run's."""
  began = time.monotonic()
  quiet = lambda line: None  # noqa: E731
  if like is None:
    train(config, out, report=quiet)
  else:
    out.mkdir()
    (out / "config.yaml").write_text(config_yaml(config))
    for name in ("splits.json", "plan.json"):
      shutil.copy(like / name, out)
    for name in ("preprocessed", "prompts", *folders):
      shutil.copytree(like / name, out / name)
    train(config, out, resume=True, report=quiet)
  print(f"{out.name}: {time.monotonic() - began:.0f} s", flush=True)


def losses(out: Path, phase: str) -> np.ndarray:
  """The smoothed curve of a phase: means over a moving window."""
  lines = map(json.loads, (out / "log.jsonl").read_text("utf-8").splitlines())
  values = [line["loss"] for line in lines if line["phase"] == phase and "loss" in line]
  window = min(SMOOTHED, len(values))
  return np.convolve(values, np.full(window, 1 / window), "valid")


def dices(out: Path) -> dict[str, float]:
  found = json.loads((out / "validation.json").read_text("utf-8"))
  return {stage: scores["mean"]["dice"] for stage, scores in found.items()}


def apart(a: Path, b: Path, phase: str) -> np.ndarray:
  """Relative difference of two runs' curves."""
  ours, theirs = losses(a, phase), losses(b, phase)
  found = np.abs(theirs - ours) / np.abs(ours)
  print(f"{phase}, {b.name}: loss {ours[-1]:.4f} and {theirs[-1]:.4f}; relative difference largest "
        f"{found.max():.2%} (step {found.argmax() + 1}), mean {found.mean():.2%}")
  return found


def compare(folder: Path, steps: int, cases: int, overrides: list[str]) -> bool:
  """Trains in both precisions and prints; True if all differences are within the band."""
  dataset = write_phantom(folder / "phantoms", PhantomConfig(cases=cases, test_cases=0))
  full, half, control = (folder / name for name in ("float32", "bfloat16", "rounded start"))
  start = starting_weights(folder, settings(dataset, steps, overrides))
  drawn = [*overrides, start["drawn"]]
  run(settings(dataset, steps, drawn), full)
  run(settings(dataset, steps, [*drawn, *HALF]), half, full)
  # Only its refiner is trained: the generator is the first run's.
  run(settings(dataset, steps, [*overrides, start["rounded"]]), control, full, ["generator"])
  generator = apart(full, half, "generator")
  refiner, by_rounding = (apart(full, other, "refiner") for other in (half, control))
  within = bool(
    generator.max() <= LARGEST and generator.mean() <= MEAN
    and refiner.mean() <= TIMES * by_rounding.mean()
  )
  for (stage, a), b in zip(dices(full).items(), dices(half).values(), strict=True):
    within &= abs(a - b) <= DICE
    print(f"{stage}: Dice {a:.4f}, bfloat16 {b:.4f}, difference {b - a:+.4f}")
  return within


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--steps", type=int, default=200, help="of each network")
  parser.add_argument("--cases", type=int, default=12, help="phantoms; a third is held out")
  parser.add_argument("--out", type=Path, help="keep the runs here; a new folder")
  parser.add_argument("--whole", action="store_true", help="the quickstart's own sizes")
  parser.add_argument("overrides", nargs="*")
  options = parser.parse_args()
  overrides = [*(() if options.whole else SMALLER), *options.overrides]
  with tempfile.TemporaryDirectory() as temporary:
    folder = (options.out or Path(temporary)).absolute()
    folder.mkdir(exist_ok=True)
    within = compare(folder, options.steps, options.cases, overrides)
  print("within the band" if within else "outside the band")
  return 0 if within else 1


if __name__ == "__main__":
  sys.exit(main())
