"""Trains a network for a few steps on several meshes of 8 simulated devices; prints JSON.

A process of its own, because the number of devices is fixed when JAX starts.
python tests/parallel/mesh_worker.py generator|refiner|tracker MESH...

A mesh is DATAxFSDP[xMODEL][@SLICES][/MICROBATCHES]; every second device is of another slice then,
so that the devices' order is not that of one slice. With DISTRIBUTED=HOST:PORT,PROCESSES,INDEX, or
"auto" and PROCESSES, the devices are those of several processes.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

DISTRIBUTED = os.environ.get("DISTRIBUTED", "off")
PROCESSES = DISTRIBUTED.split(",")[1] if "," in DISTRIBUTED else os.environ.get("PROCESSES", "1")
DEVICES = 8 // int(PROCESSES)
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={DEVICES}"]
)
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [str(Path(__file__).parents[1])]

import jax
import numpy as np
from jax.sharding import Mesh
from small_sam2 import SIDE, SMALL, drawn

from rfmedsam2_jax.config.tracker import TrackerConfig
from rfmedsam2_jax.config.training import GeneratorConfig, OptimizerConfig, RefinerConfig
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.nn.unet import UNet, UNetConfig
from rfmedsam2_jax.parallel import hosts, rules
from rfmedsam2_jax.parallel.mesh import (
  MeshConfig,
  batch_shards,
  local_rows,
  make_mesh,
  place_batch,
)
from rfmedsam2_jax.programs.costs import collectives_of
from rfmedsam2_jax.refinement.config import RefinementConfig, StageConfig
from rfmedsam2_jax.training.state import init_state, make_optimizer
from rfmedsam2_jax.training.step import (
  compile_step,
  generator_loss_fn,
  make_step,
  refiner_loss_fn,
)
from rfmedsam2_jax.training.tracker_step import tracker_loss_fn

BEGAN = time.time()
# One layer of the decoder is spread as two are, and compiles in less time.
MODEL = SAM2(dataclasses.replace(SMALL, decoder_depth=1))
STEPS, BATCH = 5, 8
STAGES = int(os.environ.get("STAGES", "1"))
# Not Adam: where a gradient is zero but for rounding (biases before a norm), it makes of any
# rounding a step of full size.
OPTIMIZER = OptimizerConfig("sgd", warmup_steps=1, learning_rate=1e-2, clip_norm=0.1)
jax.config.update("jax_disable_most_optimizations", True)
rules.SMALL = 32  # the networks are small here
# What is trained. That the image encoder's gradient is alike on a mesh is the refiner's to show;
# half of a step's compilation is left out here.
TRAINED = {"tracker": ("sam_mask_decoder/*", "memory_attention/*", "memory_encoder/*")}


def generator():
  config = GeneratorConfig(optimizer=OPTIMIZER)
  unet = UNet(UNetConfig((8, 16), ((1, 1, 1), (2, 2, 2)), ((3, 3, 3),) * 2, 1), 3)
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.standard_normal((BATCH, 8, 8, 8, 1), np.float32),
    "target": rng.integers(0, 3, (BATCH, 8, 8, 8)).astype(np.uint8),
  }
  params = unet.init(jax.random.key(0), batch["image"][:1], deep_supervision=True)["params"]
  membership = np.array([[False, False], [True, False], [False, True]])
  return params, generator_loss_fn(unet, config, membership, False), batch


def refiner():
  """Runs that differ in their padding and in how many structures are where."""
  config = RefinerConfig(optimizer=OPTIMIZER)
  refinement = RefinementConfig(stages=(StageConfig(), StageConfig(pointers=True))[:STAGES])
  rng = np.random.default_rng(0)
  tracks, length, side = 2, 3, SIDE // 4
  logits = 8 * rng.standard_normal((BATCH, tracks, length, side, side), np.float32)
  logits[::3, 0] = -16
  inside = np.ones((BATCH, length), bool)
  inside[1, 2:] = False
  masks = (logits > 1).astype(np.float32)
  present = masks.any((3, 4))
  batch = {
    "images": rng.random((BATCH, length, SIDE, SIDE, 3), np.float32),
    "logits": logits,
    "masks": masks,
    "known": np.ones_like(logits),
    "present": present,
    "absent": ~present,
    "inside": inside,
    "depth": np.arange(5, 5 + BATCH, dtype=np.int32),
  }
  return drawn(MODEL.config), refiner_loss_fn(MODEL, config, refinement), batch


def tracker():
  """Runs that differ in how many objects they have, and where."""
  config = TrackerConfig(slices=3, objects=2, corrections=1, optimizer=OPTIMIZER)
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:SIDE, :SIDE]
  cy, cx = rng.uniform(0.3, 0.7, (2, BATCH, 2, 3, 1, 1)) * SIDE
  objects = np.hypot(y - cy, x - cx) < rng.uniform(0.1, 0.3, (BATCH, 2, 3, 1, 1)) * SIDE
  objects[1, 0, 1:] = objects[2, 1] = False
  batch = {
    "images": rng.random((BATCH, 3, SIDE, SIDE, 3), np.float32),
    "objects": objects, "has": objects.any((2, 3, 4)),
  }
  return drawn(MODEL.config), tracker_loss_fn(MODEL, config), batch


def run(params, trained, loss, batch, mesh: Mesh, microbatches: int = 1) -> dict:
  optimizer = make_optimizer(OPTIMIZER, STEPS)
  whole = init_state(params, trained, optimizer, jax.random.key(1))
  state = rules.place(whole, mesh)
  step = compile_step(make_step(loss, optimizer, OPTIMIZER, mesh, microbatches), state, mesh)
  rows = local_rows(mesh, BATCH)
  placed = place_batch({name: x[rows] for name, x in batch.items()}, mesh)
  here = jax.local_devices()[0]
  held = [
    sum(shard.data.nbytes for shard in x.addressable_shards if shard.device == here)
    for x in jax.tree.leaves((state.trained, state.optimizer))
  ]
  compiled = step.lower(state, placed).compile()
  losses = []
  for _ in range(STEPS):
    state, metrics = compiled(state, placed)
    losses.append(float(metrics["loss"]))
  return {
    "losses": losses,
    "params": rules.whole(state.params, mesh),
    "bytes": sum(held),
    "largest_parameter": max(x.nbytes for x in jax.tree.leaves(params)),
    "collectives": [c._asdict() for c in collectives_of(compiled.as_text())],
    "slices": [len({device.slice_index for device in copy.flat}) for copy in mesh.devices],
    "local_batch": sum(x.nbytes for x in batch.values()) // batch_shards(mesh),
  }


def difference(a, b) -> float:
  """Largest difference of parameters, relative to the largest parameter of the array."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-3)) for x, y in pairs)


def main() -> None:
  hosts.initialise(DISTRIBUTED)
  phase, *labels = sys.argv[1:]
  params, loss, batch = {"generator": generator, "refiner": refiner, "tracker": tracker}[phase]()
  results = {}
  for label in labels:
    print(label, round(time.time() - BEGAN), file=sys.stderr, flush=True)
    sizes, _, parts = label.partition("/")
    sizes, _, slices = sizes.partition("@")
    kind, count = type(jax.devices()[0]), int(slices or 1)
    kind.slice_index = property(lambda device, count=count: device.id % count)
    mesh = make_mesh(MeshConfig(*(int(n) for n in sizes.split("x"))))
    results[label] = run(params, TRAINED.get(phase, ("*",)), loss, batch, mesh, int(parts or 1))
  for result in results.values():
    if "1x1" in results:
      result["difference"] = difference(result["params"], results["1x1"]["params"])
  for result in results.values():
    result["moved"] = difference(result["params"], params)
    result["checksum"] = [float(np.abs(x).sum()) for x in jax.tree.leaves(result.pop("params"))]
  print(json.dumps(results))


if __name__ == "__main__":
  main()
