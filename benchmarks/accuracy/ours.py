"""Trains a config with `rfmedsam2 train`, keeps the time, and writes its scores (results.py).

python benchmarks/accuracy/ours.py CONFIG --run RUN --out FILE.json [--from RUN] [key=value ...]

The clock runs from the start of the command (imports and compilation included) to the refiner's
last step and save; scoring the validation cases comes after. Stopped with Ctrl-C, the same command
goes on, with the clock of all sittings: a step that is made again counts again.

--from RUN takes preprocessed cases, generator and prompts from a finished run whose generator was
made with the same settings, so that only the refiner is trained; the clock then has the refiner's
part alone.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from nnunet import Clock
from results import save

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.config import config_yaml, load_config

SHARED = ("splits.json", "fingerprint.json", "plan.json", "versions.json", "preprocessed",
          "generator")


def take_generator(source: Path, run: Path, config: Path, overrides: list[str]) -> None:
  """Makes `run` a run of the config whose generator is trained already."""
  wanted, before = load_config(config, overrides), load_config(source / "config.yaml")
  for part in ("data", "plan", "generator", "seed"):
    if getattr(wanted, part) != getattr(before, part):
      raise SystemExit(f"{source}: its {part} is not that of {config}; train it anew")
  if wanted.refiner.held_back != before.refiner.held_back:
    raise SystemExit(f"{source}: its generator saw other cases, since its refiner.held_back is "
                     f"{before.refiner.held_back}; train it anew")
  run.mkdir(parents=True)
  for name in SHARED:
    path = source / name
    (shutil.copytree if path.is_dir() else shutil.copy)(path, run / name)
  same_grid = (wanted.sam2.image_size, wanted.refinement.zoom) == (
    before.sam2.image_size, before.refinement.zoom)
  if same_grid and wanted.inference == before.inference:
    shutil.copytree(source / "prompts", run / "prompts")
  (run / "config.yaml").write_text(config_yaml(wanted))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("config", type=Path)
  parser.add_argument("overrides", nargs="*")
  parser.add_argument("--run", type=Path, required=True)
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--from", dest="source", type=Path)
  options = parser.parse_intermixed_args()
  run = options.run
  run.parent.mkdir(parents=True, exist_ok=True)
  clock = Clock(run.with_suffix(".clock.json"))
  if options.source and not run.exists():
    try:
      take_generator(options.source, run, options.config, options.overrides)
    except UserError as error:
      raise SystemExit(str(error)) from None
  command = [sys.executable, "-m", "rfmedsam2_jax", "train", str(options.config), "--out", str(run),
             *options.overrides]
  if (run / "config.yaml").exists():
    command.append("--resume")
  trained = run / "refiner" / "params"
  part, since = "preprocessing", time.monotonic()
  with subprocess.Popen(command, text=True, stderr=subprocess.PIPE) as process:
    assert process.stderr is not None
    try:
      for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        now = time.monotonic()
        clock.add(part, now - since)  # with every line: a run that is killed keeps its time
        since = now
        # Everything after the preparation is training, prompts of the refiner's cases included.
        if part == "preprocessing" and " prepared " in line:
          part = "training"
        elif part == "training" and trained.is_dir():
          part = "scoring"
    except KeyboardInterrupt:
      process.send_signal(signal.SIGTERM)
  clock.add(part, time.monotonic() - since)
  if process.returncode:
    raise SystemExit(process.returncode)
  result = json.loads((run / "validation.json").read_text("utf-8"))
  about = {
    "what": "rfmedsam2_jax", "config": str(options.config), "overrides": options.overrides,
    "from": str(options.source) if options.source else None,
    "seconds": {name: round(value, 1) for name, value in clock.seconds.items()},
    "machine": platform.machine(), "cores": os.cpu_count(),
    "versions": json.loads((run / "versions.json").read_text("utf-8")),
  }
  save(options.out, about, result)


if __name__ == "__main__":
  main()
