"""Kills a training run again and again at random moments, saves included, and goes on with it.

python tests/parallel/sigkill_campaign.py [--kills 20] [--seed 0] [--folder FOLDER]

A tiny run is trained once undisturbed, then again and again with SIGKILLs. After each kill the
folder must be one that `--resume` takes, with no more lost than the steps since the last finished
save; in the end the parameters must be those of the undisturbed run, bit for bit. Exits with 1
otherwise.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from rfmedsam2_jax.model import load

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
EVERY = 5  # steps between saves
KILLS_PER_RUN = 5
LONGER = 6  # a step of the generator takes so much less time than one of the refiner


def write_config(folder: Path, steps: int) -> Path:
  from tiny_config import TINY

  from rfmedsam2_jax.data.phantom import PhantomConfig, write_phantom

  size = PhantomConfig(cases=4, test_cases=0, slice_spacing=(9.0, 10.0), pixel_spacing=(5.0, 6.0))
  loop = {"steps": steps, "log_every": 1, "checkpoint_every": EVERY}
  longer = loop | {"steps": LONGER * steps}
  tree = TINY | {
    "data": TINY["data"] | {"dataset": str(write_phantom(folder / "phantoms", size))},
    "generator": TINY["generator"] | {"loop": longer},
    "refiner": TINY["refiner"] | {"loop": loop},
  }
  (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
  return folder / "tiny.yaml"


def start(config: Path, run: Path) -> subprocess.Popen:
  command = [sys.executable, "-m", "rfmedsam2_jax", "train", str(config), "--out", str(run)]
  if (run / "config.yaml").exists():
    command.append("--resume")
  # Compiled once, so that kills meet training and saving rather than the compiler.
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(config.parent / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  with open(run.with_suffix(".log"), "a") as log:
    return subprocess.Popen(
      command, stdout=log, stderr=log, cwd=TESTS.parent, env=os.environ | cache
    )


def lost_steps(run: Path) -> int:
  """Steps that were logged but are not in a finished checkpoint, of the phase that was running."""
  lines = []
  if (run / "log.jsonl").exists():
    for line in (run / "log.jsonl").read_text("utf-8").splitlines():
      try:
        lines.append(json.loads(line))
      except ValueError:
        pass  # cut off by the kill
  if not lines or (run / lines[-1]["phase"] / "params").is_dir():
    return 0
  folder = run / lines[-1]["phase"] / "checkpoints"
  saved = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
  return lines[-1]["step"] - max(saved, default=0)


def params_of(run: Path, phase: str) -> list[np.ndarray]:
  import jax


  return [np.asarray(x) for x in jax.tree.leaves(getattr(load(run), phase))]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument(
    "--steps", type=int, default=60, help=f"of the refiner; the generator has {LONGER} times these"
  )
  parser.add_argument("--longest", type=float, default=30, help="seconds before a kill")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", type=Path)
  options = parser.parse_args()
  folder = options.folder or Path(tempfile.mkdtemp(prefix="sigkill-"))
  folder.mkdir(parents=True, exist_ok=True)
  rng = random.Random(options.seed)
  config = write_config(folder, options.steps)
  if start(config, folder / "undisturbed").wait() != 0:
    print(f"the undisturbed run failed: {folder / 'undisturbed.log'}")
    return 1
  kills, runs, worst, by_phase = 0, 0, 0, {"before": 0, "generator": 0, "refiner": 0}
  while kills < options.kills or runs == 0:
    run = folder / f"killed{runs}"
    left = min(KILLS_PER_RUN, options.kills - kills)
    while True:
      process = start(config, run)
      moment = rng.uniform(1, options.longest)
      try:
        status = process.wait(moment if left else None)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        kills, left = kills + 1, left - 1
        lost = lost_steps(run)
        worst = max(worst, lost)
        phase = "refiner" if (run / "refiner").is_dir() else (
          "generator" if (run / "generator").is_dir() else "before")
        by_phase[phase] += 1
        print(f"kill {kills} after {moment:.1f} s ({phase}): {lost} steps lost", flush=True)
        # One save may be on its way while the next steps are made.
        if lost > 2 * EVERY:
          print(f"{run}: more than {2 * EVERY} steps are lost")
          return 1
        continue
      if status != 0:
        print(f"{run}: cannot be resumed, see {run.with_suffix('.log')}")
        return 1
      break
    for phase in ("generator", "refiner"):
      pairs = zip(params_of(folder / "undisturbed", phase), params_of(run, phase), strict=True)
      if not all(np.array_equal(a, b) for a, b in pairs):
        print(f"{run}: the {phase}'s parameters are not those of the undisturbed run")
        return 1
    runs += 1
  print(f"{kills} kills ({by_phase}) in {runs} runs, at most {worst} steps lost, saves every "
        f"{EVERY}; final parameters equal the undisturbed run's bit for bit")
  return 0


if __name__ == "__main__":
  began = time.monotonic()
  status = main()
  print(f"{time.monotonic() - began:.0f} s")
  os._exit(status)
