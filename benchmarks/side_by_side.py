"""What the benchmarks against the official SAM 2 share: both sides in one process, turn by turn.

Wall time counts what a user waits for. It is only to be believed on an otherwise idle machine:
PyTorch's threads wait for each other busily, so that a third process slows it more than us. CPU
time does not depend on what else runs (with `--threads 1` it is the work itself).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# The official model with drawn weights is built as in the parity tests, with convert's help.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]

Run = Callable[[], Any]


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
  p = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  p.add_argument("--threads", type=int, default=2, help="cores that both sides may use")
  p.add_argument("--repeats", type=int, default=repeats)
  return p


def use_cores(count: int) -> None:
  """Restricts this process; to be called before JAX or PyTorch start their threads."""
  cores = sorted(os.sched_getaffinity(0))[-count:]
  os.sched_setaffinity(0, set(cores))
  os.environ["OMP_NUM_THREADS"] = str(len(cores))  # PyTorch's threads, once it is imported
  load = os.getloadavg()[0]
  if load > 0.5:
    print(f"load is {load:.1f}: other processes share the cores, wall times are not to be trusted")


def alternate(runs: dict[str, Run], repeats: int) -> dict[str, np.ndarray]:
  """Seconds [repeats, 2] of wall and CPU time per side, after one run to warm up."""
  for run in runs.values():
    run()
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
  for _ in range(repeats):
    for name, run in runs.items():
      wall, cpu = time.perf_counter(), time.process_time()
      run()
      times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
  return {name: np.array(t) for name, t in times.items()}


def row(label: str, times: dict[str, np.ndarray], more: str = "") -> str:
  """A line of the table: medians in ms and how many times as fast as the official code we are."""
  (ours_wall, ours_cpu), (wall, cpu) = (
    np.median(times[side], axis=0) * 1e3 for side in ("ours", "official")
  )
  best = times["official"][:, 0].min() / times["ours"][:, 0].min()
  return (
    f"{label:28s} {ours_wall:8.0f} {wall:8.0f} {wall / ours_wall:6.2f} {best:6.2f}"
    f" {ours_cpu:8.0f} {cpu:8.0f} {cpu / ours_cpu:6.2f}{more}"
  )


HEADER = (
  f"{'':28s} {'wall ms (median)':>17s} {'ratio':>6s} {'best':>6s} {'CPU ms (median)':>17s}"
  f" {'ratio':>6s}\n{'':28s} {'ours':>8s} {'official':>8s} {'':>6s} {'':>6s} {'ours':>8s}"
  f" {'official':>8s}"
)


def peak_memory(script: str, *arguments: str) -> float:
  """GiB that a process of `script` holds at most; it prints `report_peak()` as its last line."""
  done = subprocess.run(
    [sys.executable, script, *arguments], check=True, capture_output=True, text=True
  )
  return float(json.loads(done.stdout.splitlines()[-1])["peak_gib"])


def peak_of_process() -> float:
  """GiB that this process held at most so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def report_peak() -> None:
  print(json.dumps({"peak_gib": peak_of_process()}))
