"""Prompted tracking, ours and the official video predictor, side by side on the same cores.

python benchmarks/tracking.py [--size tiny] [--side 512] [--slices 32] [--objects 1 3 8]
python benchmarks/tracking.py --depths 16 64 256

A box for each object on the middle slice, followed forward and backward; slices lie in memory on
both sides, weights are drawn once and shared. Every measurement is a process of its own, ours and
theirs in turn; the median of the repeats is compared. Compilation is timed apart (with an empty
cache), peak memory is that of the whole process. `--depths` measures memory against depth instead.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

# The official side is driven as in the parity tests.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--size", default="tiny", help="of SAM 2.1: tiny, small, base_plus, large")
  parser.add_argument("--side", type=int, default=512)
  parser.add_argument("--slices", type=int, default=32)
  parser.add_argument("--objects", type=int, nargs="*", default=[1, 3, 8])
  parser.add_argument("--depths", type=int, nargs="*", default=[])
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--worker", choices=("ours", "ours, no cache", "official"))
  options = parser.parse_args()
  if options.worker:
    print(json.dumps(measure(options)))
  elif options.depths:
    compare_memory(options)
  else:
    compare_times(options)


def compare_times(options: argparse.Namespace) -> None:
  print(f"SAM 2.1 {options.size}, {options.slices} slices at {options.side}, medians of "
        f"{options.repeats}")
  print(f"{'objects':>7} {'official s':>11} {'ours s':>8} {'ratio':>6} {'compile s':>10} "
        f"{'official GiB':>13} {'ours GiB':>9}")
  for objects in options.objects:
    runs: dict[str, list[dict]] = {"official": [], "ours": []}
    for _ in range(options.repeats):
      for worker, found in runs.items():
        found.append(spawn(options, worker, objects, options.slices))
    official, ours = (statistics.median(r["seconds"] for r in runs[w]) for w in runs)
    peaks = [max(r["peak_gib"] for r in runs[w]) for w in runs]
    compiled = runs["ours"][0]["compile"]
    print(f"{objects:>7} {official:>11.1f} {ours:>8.1f} {official / ours:>6.2f} {compiled:>10.1f} "
          f"{peaks[0]:>13.2f} {peaks[1]:>9.2f}", flush=True)


def compare_memory(options: argparse.Namespace) -> None:
  workers = ("official", "ours", "ours, no cache")
  print(f"SAM 2.1 {options.size} at {options.side}, one object: peak GiB of the process")
  print(f"{'slices':>7} " + " ".join(f"{worker:>15}" for worker in workers))
  for depth in options.depths:
    peaks = [spawn(options, worker, 1, depth)["peak_gib"] for worker in workers]
    print(f"{depth:>7} " + " ".join(f"{peak:>15.2f}" for peak in peaks), flush=True)


def spawn(options: argparse.Namespace, worker: str, objects: int, slices: int) -> dict:
  command = [
    sys.executable, __file__, "--worker", worker, "--size", options.size, "--side",
    str(options.side), "--objects", str(objects), "--slices", str(slices),
  ]
  out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  return json.loads(out.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict:
  """One side: seconds of a run after a short one, seconds of the first call, peak memory."""
  from rfmedsam2_jax.nn import PRESETS, AdapterConfig
  from rfmedsam2_jax.tracking import SlicePrompt

  config = dataclasses.replace(
    PRESETS[f"sam2.1_hiera_{options.size}"],
    image_size=options.side,
    adapters=AdapterConfig(dwconv=False, cnn=False),
  )
  rng = np.random.default_rng(0)
  volume = rng.standard_normal((options.slices, options.side, options.side), np.float32)
  objects, middle = options.objects[0], options.slices // 2
  corners = rng.uniform(0.1, 0.5, (objects, 2)) * options.side
  extent = 0.3 * options.side
  prompts = [
    SlicePrompt(k, middle, box=(x, y, x + extent, y + extent)) for k, (x, y) in enumerate(corners)
  ]
  run = official_run if options.worker == "official" else our_run
  first, seconds = run(config, volume, prompts, options.worker != "ours")
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  return {"seconds": seconds, "compile": first, "peak_gib": peak}


def our_run(config, volume, prompts, no_cache):
  import jax
  import jax.numpy as jnp

  from rfmedsam2_jax.nn import SAM2, init_params
  from rfmedsam2_jax.tracking import TrackingConfig, VolumeTracker

  # Drawn as a checkpoint would come, without the initialisation's program and its memory.
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
  params = jax.tree.map(
    lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32), x.dtype), shapes
  )
  options = TrackingConfig(cache="none" if no_cache else "bfloat16")

  def slices(numbers):
    return np.repeat(volume[numbers][..., None], 3, axis=-1)

  def run(depth, prompts):
    began = time.perf_counter()
    VolumeTracker(SAM2(config), params, options, slices, depth).track(prompts)
    return time.perf_counter() - began

  # The same programs serve every depth.
  first = run(3, [dataclasses.replace(p, slice=1) for p in prompts])
  return first, run(len(volume), prompts)


def official_run(config, volume, prompts, _):
  import torch
  from official_tracking import OfficialTracker

  from convert.official import build

  torch.manual_seed(0)
  model = build(config, video=True)

  def run(volume, prompts):
    images = np.repeat(volume[..., None], 3, axis=-1)
    began = time.perf_counter()
    with torch.inference_mode():
      OfficialTracker(model, images, record=False).run(prompts)
    return time.perf_counter() - began

  first = run(volume[:3], [dataclasses.replace(p, slice=1) for p in prompts])
  return first, run(volume, prompts)


if __name__ == "__main__":
  main()
