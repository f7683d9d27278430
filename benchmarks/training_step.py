"""A training step of SAM 2.1 as the refiner, ours and the official PyTorch code, on one device.

python benchmarks/training_step.py [--size tiny base_plus] [--side 512 1024] [--dtype bfloat16]
                                   [--trainable all heads adapters] [--slices 8] [--structures 2]

One run of consecutive slices with an artificial batch of the shapes that training uses; every
structure is on every slice, so that all cells (one structure on one slice) count. On both sides a
step is: the image encoder over the slices; twice (two stages) the memory encoder, memory attention
(three slices before and behind and one anchor, where they exist; in the second stage object
pointers too) and the mask decoder (a box and a mask) over the cells; the loss; the gradient; its
clipping by the global norm; AdamW. Reading data is no part of it.

- Ours is the step that `rfmedsam2 train` compiles (training.step), without its jitter of boxes. It
  also averages the weights. Compilation is timed apart, with an empty cache.
- Theirs are the modules of sam2 1.1.0 (benchmarks/official_training.py), eager, under
  `torch.autocast` where --dtype is bfloat16, in eval mode (without dropout, which ours lacks). The
  package's own training code trains another task. Its decoder always computes four masks per cell,
  ours the one that is used. Ours has room for seven memories in every cell and masks those that do
  not exist; theirs gets those that exist.
- What is trained: `all` parameters; `heads`, the mask decoder and memory attention with the rest
  frozen; `adapters`, with all of SAM 2 frozen. The official classes have no adapters, so that there
  only ours is measured; `heads` is the comparison for a frozen encoder.

Weights and batch are the same on both sides. The first step's loss and gradient norm are printed:
in float32 on a CPU they agree, which shows that the work is the same. On a GPU both sides may round
the inputs of float32 products to TF32 (XLA's default; switched on for PyTorch).

Every side is a process of its own; seconds are the median of --repeats steps after two to warm up,
each waited for; CPU time is that of all threads of the host. On a CPU that other processes share
neither is to be trusted, as PyTorch's threads wait for each other busily; --threads 1 gives CPU
time that is. Peak memory is that of the process on a CPU, compilation included, and that of the
allocator on a GPU.

The arithmetic of a step (FLOP) is XLA's count of our step written plainly: attention in one piece,
nothing computed twice, memories that exist. XLA's count of the compiled step is no use: it has the
body of a loop once, however often it runs, and cannot see into a library's attention. Utilisation
is that arithmetic, for both sides, over the device's peak where that is known.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np
import side_by_side
from small_sam2 import drawn

from rfmedsam2_jax.config.training import OptimizerConfig, RefinerConfig
from rfmedsam2_jax.nn import (
  PRESETS,
  SAM2,
  AdapterConfig,
  SAM2Config,
  attention,
  init_params,
  row_bands,
)
from rfmedsam2_jax.parallel.devices import peak_flops
from rfmedsam2_jax.parallel.mesh import MeshConfig, make_mesh
from rfmedsam2_jax.refinement import RefinementConfig, StageConfig
from rfmedsam2_jax.training.state import TrainState, init_state, make_optimizer
from rfmedsam2_jax.training.step import compile_step, make_step, refiner_loss_fn

Arrays = dict[str, np.ndarray]
Found = dict[str, Any]

WARM_UP = 2  # steps that are not counted
# Patterns of our paths, and prefixes of the official names (none: there is nothing like it).
TRAINED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  "all": (("*",), ("",)),
  "heads": (
    ("sam_mask_decoder/*", "memory_attention/*"), ("sam_mask_decoder.", "memory_attention.")
  ),
  "adapters": (("*adapter*",), ()),
}
# Structures are present by a wide margin: cells without them would be left out.
PRESENCE_BIAS = 10.0
# Steps so small that what is measured last is what was measured first.
OPTIMIZER = OptimizerConfig(learning_rate=1e-6, warmup_steps=0, clip_norm=1.0)


class _Still(RefinerConfig):
  box_jitter = 0.0


REFINER = _Still(optimizer=OPTIMIZER)

@dataclasses.dataclass(frozen=True)
class Case:
  """One comparison."""

  config: SAM2Config
  slices: int
  structures: int
  trainable: str  # a key of TRAINED
  repeats: int
  size: str = ""  # name of the config, for the command line of the workers

  @property
  def cells(self) -> int:
    """Of both stages together."""
    return self.slices * self.structures * len(refinement().stages)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--size", nargs="+", default=["tiny"], help="tiny, small, base_plus, large")
  parser.add_argument("--side", nargs="+", type=int, default=[512])
  parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
  parser.add_argument("--trainable", nargs="+", default=["all"], choices=TRAINED)
  parser.add_argument("--slices", type=int, default=8, help="of the run, at least 2")
  parser.add_argument("--structures", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=5, help="steps that are timed")
  parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
  parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores of either side")
  parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.slices < 2:
    parser.error("--slices: a slice needs another one to remember, give at least 2")
  side_by_side.use_cores(options.threads)
  for case in cases(options):
    if options.worker:
      print(json.dumps(WORKERS[options.worker](case)))
    else:
      compare(case, options.device, options.threads)


def cases(options: argparse.Namespace) -> list[Case]:
  found = []
  for size, side, dtype, trainable in itertools.product(
    options.size, options.side, options.dtype, options.trainable
  ):
    adapted = trainable == "adapters"
    config = dataclasses.replace(
      PRESETS[f"sam2.1_hiera_{size}"],
      image_size=side,
      dtype=dtype,
      adapters=AdapterConfig(dwconv=adapted, cnn=adapted),
    )
    found.append(
      Case(config, options.slices, options.structures, trainable, options.repeats, size)
    )
  return found


def compare(case: Case, device: str, threads: int) -> None:
  """Measures both sides, each in a process of its own, and prints what was found."""
  flop = spawn("count", case, device, threads)["flop"]
  print(
    f"{case.size} at {case.config.image_size}, {case.config.dtype}, trained: {case.trainable}; "
    f"{case.slices} slices, {case.cells} cells in {len(refinement().stages)} stages, "
    f"{flop / 1e12:.3g} TFLOP"
  )
  print(
    f"  {'':8} {'s/step':>8} {'CPU s':>8} {'slices/s':>9} {'cells/s':>8} {'TFLOP/s':>8} "
    f"{'of peak':>8} {'compile s':>10} {'peak GiB':>9} {'first loss':>11} {'gradient':>9}"
  )
  found = {}
  for side in ("ours", "official") if TRAINED[case.trainable][1] else ("ours",):
    try:
      found[side] = spawn(side, case, device, threads)
    except subprocess.CalledProcessError as error:
      print(f"  {side:8} failed with exit status {error.returncode}", flush=True)
      continue
    print(f"  {side:8} {row(case, flop, found[side])}", flush=True)
  if len(found) == 2:
    ours, official = found["ours"], found["official"]
    print(
      f"  ours is {official['seconds'] / ours['seconds']:.2f} times as fast and takes "
      f"{ours['peak_gib'] / official['peak_gib']:.2f} times the memory"
    )
    if (ours["device"] == "cpu") != (official["device"] == "cpu"):
      print(f"  not comparable: ours ran on {ours['device']}, official on {official['device']}")
  print("  " + "; ".join(f"{side}: {f['device']}, {f['version']}" for side, f in found.items()))


def row(case: Case, flop: float, found: Found) -> str:
  seconds = found["seconds"]
  speed = flop / seconds / 1e12
  peak = peak_of(found["device"], case.config.dtype)
  share = f"{speed / peak:8.1%}" if peak else f"{'-':>8}"
  compilation = f"{found['compile']:10.1f}" if found["compile"] else f"{'-':>10}"
  return (
    f"{seconds:8.3f} {found['cpu']:8.3f} {case.slices / seconds:9.2f} "
    f"{case.cells / seconds:8.2f} {speed:8.3f} {share} {compilation} "
    f"{found['peak_gib']:9.2f} {found['loss']:11.5f} {found['norm']:9.4f}"
  )


def peak_of(device: str, dtype: str) -> float | None:
  """TFLOP/s of the device; float32 is multiplied as TF32, at half of bfloat16's rate."""
  peak = peak_flops(device)
  return None if peak is None else peak / (1e12 if dtype == "bfloat16" else 2e12)


def spawn(worker: str, case: Case, device: str, threads: int) -> Found:
  command = [
    sys.executable, __file__, "--worker", worker, "--size", case.size,
    "--side", str(case.config.image_size), "--dtype", case.config.dtype,
    "--trainable", case.trainable, "--slices", str(case.slices),
    "--structures", str(case.structures), "--repeats", str(case.repeats), "--device", device,
    "--threads", str(threads),
  ]
  environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  if device == "cpu":
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
  if device == "cpu" or worker != "ours":
    # JAX only draws weights or counts there.
    environment |= {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
  return json.loads(done.stdout.splitlines()[-1])


def refinement(reach: int = 3) -> RefinementConfig:
  """Two stages as they are by default, with memories of `reach` slices on either side."""
  return RefinementConfig(
    stages=(StageConfig(reach=reach), StageConfig(reach=reach, pointers=True))
  )


def batch_of(case: Case) -> Arrays:
  """What data.pipeline.refiner_batches gives: discs, and prompts that are other discs."""
  side, length, tracks = case.config.image_size, case.slices, case.structures
  rng = np.random.default_rng(0)
  y, x = np.mgrid[: side // 4, : side // 4]

  def distance() -> np.ndarray:
    """To the edge of a disc, in pixels of the mask grid; positive inside. [1, T, L, m, m]."""
    centre = rng.uniform(0.4, 0.6, (2, 1, tracks, length, 1, 1)) * side / 4
    radius = rng.uniform(0.2, 0.3, (1, tracks, length, 1, 1)) * side / 4
    return np.float32(radius - np.hypot(y - centre[0], x - centre[1]))

  masks = np.float32(distance() > 0)
  return {
    "images": rng.random((1, length, side, side, 3), np.float32),
    "masks": masks,
    "known": np.ones_like(masks),
    "present": np.ones(masks.shape[:3], bool),
    "absent": np.zeros(masks.shape[:3], bool),
    "logits": distance().clip(-32, 32),
    "inside": np.ones((1, length), bool),
    "depth": np.full(1, length, np.int32),
    "structures": np.arange(tracks, dtype=np.int32)[None],
  }


def lowered_step(case: Case, reach: int, state: TrainState, batch: Arrays) -> jax.stages.Lowered:
  """The step of training, not yet compiled; the only place that knows how one is made."""
  loss = refiner_loss_fn(SAM2(case.config), REFINER, refinement(reach))
  step = make_step(loss, make_optimizer(OPTIMIZER, steps=10**6), OPTIMIZER)
  mesh = make_mesh(MeshConfig(data=1))
  return compile_step(step, state, mesh).lower(state, batch)


def fresh_state(case: Case, params: dict[str, Any]) -> TrainState:
  optimizer = make_optimizer(OPTIMIZER, steps=10**6)
  return init_state(params, TRAINED[case.trainable][0], optimizer, jax.random.key(0))


def measure_ours(case: Case) -> Found:
  params = jax.tree.map(jax.numpy.asarray, drawn(case.config, presence_bias=PRESENCE_BIAS))
  state = fresh_state(case, params)
  del params  # the state is donated
  batch = jax.tree.map(jax.numpy.asarray, batch_of(case))
  began = time.perf_counter()
  step = lowered_step(case, 3, state, batch).compile()
  compilation = time.perf_counter() - began

  def run() -> tuple[float, float]:
    nonlocal state
    state, metrics = step(state, batch)
    jax.block_until_ready(state)
    return float(metrics["loss"]), float(metrics["gradient_norm"])

  found = timed(run, case.repeats)
  device = jax.devices()[0]
  allocator = device.memory_stats()  # None on a CPU
  peak = allocator["peak_bytes_in_use"] / 2**30 if allocator else side_by_side.peak_of_process()
  return found | {
    "compile": compilation,
    "peak_gib": peak,
    "device": device.device_kind,
    "version": f"jax {jax.__version__}",
  }


def measure_official(case: Case) -> Found:
  import torch
  from official_training import OfficialTraining

  from rfmedsam2_jax.weights.names import to_official

  device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  training = OfficialTraining(
    case.config,
    to_official(drawn(case.config, presence_bias=PRESENCE_BIAS)),
    TRAINED[case.trainable][1],
    batch_of(case),
    refinement(),
    REFINER.loss,
    OPTIMIZER,
    device,
  )

  def run() -> tuple[float, float]:
    loss, norm = training.step()
    if device.type == "cuda":
      torch.cuda.synchronize()
    return float(loss), float(norm)

  found = timed(run, case.repeats) | {"compile": None, "version": f"torch {torch.__version__}"}
  if device.type == "cuda":
    peak = torch.cuda.max_memory_allocated() / 2**30
    return found | {"peak_gib": peak, "device": torch.cuda.get_device_name()}
  return found | {"peak_gib": side_by_side.peak_of_process(), "device": "cpu"}


def timed(run: Callable[[], tuple[float, float]], repeats: int) -> Found:
  """Median seconds of a step, by the clock and of CPU time; loss and gradient norm of the first."""
  seconds, results = [], []
  for _ in range(WARM_UP + repeats):
    wall, cpu = time.perf_counter(), time.process_time()
    results.append(run())
    seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
  loss, norm = results[0]
  if not all(math.isfinite(x) for result in results for x in result):
    raise SystemExit(f"loss or gradient is not finite: {results}")
  wall, cpu = (statistics.median(column) for column in zip(*seconds[WARM_UP:], strict=True))
  return {"seconds": wall, "cpu": cpu, "loss": loss, "norm": norm}


def count_flop(case: Case) -> Found:
  """What a step has to compute, whatever device it runs on; only traced here, on the CPU."""
  # In float32 no backend has an attention of its own that XLA cannot look into.
  case = dataclasses.replace(case, config=dataclasses.replace(case.config, dtype="float32"))
  state = jax.eval_shape(
    lambda key: fresh_state(case, init_params(case.config, key)), jax.random.key(0)
  )
  batch = batch_of(case)

  @functools.cache
  def count(reach: int) -> float:
    # In one piece: XLA counts the body of a loop once, and what is computed again counts again.
    with (
      mock.patch.object(attention, "_CPU_SCORES_PER_CHANNEL", 2**62),
      mock.patch.object(row_bands, "BAND", 2**62),
    ):
      lowered = lowered_step(case, reach, state, batch)
      # Not every version of JAX counts before it compiles.
      return (lowered.cost_analysis() or lowered.compile().cost_analysis())["flops"]

  # Ours has room for equally many memories in all cells. The arithmetic grows linearly with them,
  # and only those that exist are counted.
  room = 2 * 3 + 1
  near = sum(min(3, z) + min(3, case.slices - 1 - z) for z in range(case.slices))
  # The anchor does not remember itself, and is no neighbour besides: the mean over where it may be.
  existing = (near + case.slices - 1 - near / case.slices) / case.slices
  per_memory = (count(3) - count(2)) / 2
  return {"flop": count(3) - (room - existing) * per_memory}


WORKERS = {"ours": measure_ours, "official": measure_official, "count": count_flop}

if __name__ == "__main__":
  main()
