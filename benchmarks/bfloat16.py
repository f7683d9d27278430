"""Training in bfloat16 beside training in float32: loss curves and final Dice on phantoms.

python benchmarks/bfloat16.py [--steps 200] [--out FOLDER] [--whole] [key.path=value ...]

Both networks of configs/quickstart.yaml are trained twice, from the same weights on the same
batches; the second refiner gets the first generator's prompts, or its batches would be others.
Printed are the relative differences of the losses, smoothed over ten steps, and the Dice of every
stage on phantoms that were held out. The exit status is 1 where these leave the band: 10 % at any
step, 2 % in the mean, and 0.01 of Dice.

A CPU only emulates bfloat16, so everything is smaller than in the config unless --whole is given.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rfmedsam2_jax.config import Config, config_yaml, load_config
from rfmedsam2_jax.data.phantom import PhantomConfig, write_phantom
from rfmedsam2_jax.experiment import train

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SMALLER = (
  "plan={spacing: [7.2, 6.6, 6.6], patch_size: [24, 32, 32], poolings: 2}",
  "generator.features=[8, 16, 32]",
  "sam2.image_size=96",
  "refiner.slices=4",
  "refiner.structures=2",
)
HALF = ("generator.dtype=bfloat16", "sam2.dtype=bfloat16")
SMOOTHED = 10  # steps
LARGEST, MEAN, DICE = 0.10, 0.02, 0.01  # what may differ


def settings(dataset: Path, steps: int, overrides: list[str]) -> Config:
  loops = [
    f"{phase}.loop={{steps: {steps}, log_every: 1, checkpoint_every: {steps}}}"
    for phase in ("generator", "refiner")
  ]
  held_out = "data.split={fraction: 0.34}"
  return load_config(QUICKSTART, [f"data.dataset={dataset}", held_out, *loops, *overrides])


def run(config: Config, out: Path, like: Path | None = None) -> float:
  """Trains and scores; returns seconds. With `like`, cases and prompts are those of that run."""
  began = time.monotonic()
  quiet = lambda line: None  # noqa: E731
  if like is None:
    train(config, out, report=quiet)
  else:
    out.mkdir()
    (out / "config.yaml").write_text(config_yaml(config))
    for name in ("splits.json", "plan.json"):
      shutil.copy(like / name, out)
    for name in ("preprocessed", "prompts"):
      shutil.copytree(like / name, out / name)
    train(config, out, resume=True, report=quiet)
  return time.monotonic() - began


def losses(out: Path, phase: str) -> np.ndarray:
  """The smoothed curve of a phase: means over a moving window."""
  lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
  values = [line["loss"] for line in lines if line["phase"] == phase and "loss" in line]
  window = min(SMOOTHED, len(values))
  return np.convolve(values, np.full(window, 1 / window), "valid")


def dices(out: Path) -> dict[str, float]:
  found = json.loads((out / "validation.json").read_text())
  return {stage: scores["mean"]["dice"] for stage, scores in found.items()}


def compare(folder: Path, steps: int, cases: int, overrides: list[str]) -> bool:
  """Trains in both precisions and prints; True if all differences are within the band."""
  dataset = write_phantom(folder / "phantoms", PhantomConfig(cases=cases, test_cases=0))
  full, half = folder / "float32", folder / "bfloat16"
  seconds = run(settings(dataset, steps, overrides), full)
  print(f"float32: {seconds:.0f} s", flush=True)
  seconds = run(settings(dataset, steps, [*overrides, *HALF]), half, full)
  print(f"bfloat16: {seconds:.0f} s", flush=True)
  within = True
  for phase in ("generator", "refiner"):
    a, b = losses(full, phase), losses(half, phase)
    apart = np.abs(b - a) / np.abs(a)
    within &= bool(apart.max() <= LARGEST and apart.mean() <= MEAN)
    print(f"{phase}: loss {a[0]:.3f} to {a[-1]:.4f} (bfloat16 {b[-1]:.4f}); relative difference "
          f"largest {apart.max():.2%} (step {apart.argmax() + 1}), mean {apart.mean():.2%}")
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
  parser.add_argument("--out", type=Path, help="keep both runs here; must not exist")
  parser.add_argument("--whole", action="store_true", help="the quickstart's own sizes")
  parser.add_argument("overrides", nargs="*")
  options = parser.parse_args()
  overrides = [*(() if options.whole else SMALLER), *options.overrides]
  with tempfile.TemporaryDirectory() as temporary:
    folder = options.out or Path(temporary)
    within = compare(folder, options.steps, options.cases, overrides)
  print("within the band" if within else
        f"outside the band ({LARGEST:.0%} at any step, {MEAN:.0%} in the mean, {DICE} of Dice)")
  return 0 if within else 1


if __name__ == "__main__":
  sys.exit(main())
