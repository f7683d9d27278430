"""The `shard` command: the steps of all phases on a mesh of devices that need not exist.

A step is compiled for as many simulated CPU devices. Where arrays lie and what is sent does not
depend on the kind of device; the memory of activations does, and is an estimate.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Report, silent
from rfmedsam2_jax.config import Config
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.plan import ChannelRule, Plan, PlanConfig, pooling
from rfmedsam2_jax.parallel.devices import flops_of
from rfmedsam2_jax.parallel.mesh import batch_shapes, batch_shards, make_mesh
from rfmedsam2_jax.parallel.rules import path_of, placements, shardings, specs
from rfmedsam2_jax.training.phases import (
  PHASES,
  Phase,
  PhaseName,
  check_batches,
  tracker_phases,
)

GIB = 2**30
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
          "u64": 8, "f64": 8}
_LINE = re.compile(rf"= (\(?[^=]*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
  """One operation of KINDS: bytes of its result on one device, arrays combined, largest's bytes."""

  kind: str
  bytes: int
  arrays: int
  largest: int


def collectives_of(text: str) -> list[Collective]:
  """The collectives of an optimised HLO module (`compiled.as_text()`), in its order."""
  found = []
  for match in filter(None, map(_LINE.search, text.splitlines())):
    sizes = [_BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
             for dtype, shape in _ARRAY.findall(match[1]) if dtype in _BYTES]
    found.append(Collective(match[2], sum(sizes), len(sizes), max(sizes, default=0)))
  return found


def shard(
  config: Config, channels: int, structures: int, phases: Sequence[PhaseName],
  report: Callable[[str], None] = print, compiles: bool = True, progress: Report = silent,
) -> None:
  """Reports what every device would hold and send; reads no data.

  channels, structures: of the data set. compiles: False leaves out what only the compiled step
  tells. progress: takes lines about what is done.

  Raises:
    UserError: a mesh that these devices do not make, a batch that does not spread over it.
  """
  mesh = make_mesh(config.mesh)
  check_batches(config, phases, mesh)
  key = jax.random.key(0)
  made = tracker_phases(config) if "tracker" in phases else []
  if others := [name for name in phases if name != "tracker"]:
    plan = _plan_of_shapes(config.plan, channels, structures)
    made += [PHASES[name](config, plan) for name in others]
  for phase in made:
    progress(f"{phase.name}: laying out" + (" and compiling the training step" if compiles else ""))
    state = jax.eval_shape(lambda key, phase=phase: phase.start(phase.init(key), key), key)
    _report_step(phase, state, mesh, report, compiles)


def _plan_of_shapes(config: PlanConfig, channels: int, structures: int) -> Plan:
  """A plan that has the sizes of a real one."""
  patch, spacing = config.patch_size, config.spacing or (1.0, 1.0, 1.0)
  if patch is None:
    raise UserError("plan.patch_size: is left to the data set, which is not read here; give it, as "
                    "in plan.patch_size=[96,160,160]")
  strides, kernels, size = pooling(np.array(spacing), np.array(patch), config.poolings)
  values = tuple(range(1, structures + 1))
  labels = Labels(tuple(Structure(f"structure {k}", (k,)) for k in values), False, values)
  rules = tuple(ChannelRule(f"channel {k}", "zscore") for k in range(channels))
  depth, height, width = map(int, size)
  patch = depth, height, width
  return Plan("shapes", 0, spacing, patch, rules, patch, strides, kernels, labels)


def _report_step(
  phase: Phase, state: Any, mesh: Mesh, report: Callable[[str], None], compiles: bool
) -> None:
  """Reports one phase's step, of a TrainState of shapes: decisions, bytes, collectives."""
  shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  report(f"{phase.name}: {mesh.size} devices, {shape}")
  for name in ("trained", "frozen"):
    for line in _decisions(getattr(state, name), name, mesh):
      report(line)
  held = {"trained parameters": state.trained, "frozen parameters": state.frozen,
          "gradients": state.trained, "averaged parameters": state.ema,
          "optimizer": state.optimizer}
  report(f"  {'per device':22s} {'GiB':>9s} {'of':>9s}")
  for name, tree in held.items():
    report(f"  {name:22s} {bytes_per_device(tree, mesh) / GIB:9.4f} {_bytes(tree) / GIB:9.4f}")
  batch = _bytes(phase.batch)
  report(f"  {'batch':22s} {batch / batch_shards(mesh) / GIB:9.4f} {batch / GIB:9.4f}")
  if not compiles:
    return
  placed = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    state, shardings(state, mesh))
  compiled = phase.step(state, mesh).lower(placed, batch_shapes(phase.batch, mesh)).compile()
  if (memory := compiled.memory_analysis()) is not None:
    report(f"  {'activations, others':22s} {memory.temp_size_in_bytes / GIB:9.4f}   (as compiled "
           "for a CPU)")
  if flops := flops_of(compiled):
    report(f"  arithmetic: {flops / 1e12:.3f} TFLOP per device and step (bodies of loops "
           "are counted once)")
  found = collectives_of(compiled.as_text())
  for kind in KINDS:
    if some := [c for c in found if c.kind == kind]:
      report(f"  {kind}: {len(some)}, {sum(c.bytes for c in some) / GIB:.4f} GiB per step, largest "
             f"array {max(c.largest for c in some) / 2**20:.2f} MiB")
  if not found:
    report("  no collectives")


def _decisions(tree: Any, name: str, mesh: Mesh) -> Iterator[str]:
  """One line for every rule's decision; arrays whose paths differ by numbers alone share a line."""
  shapes = {path_of(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
  for path, placement in placements(tree, mesh).items():
    spec = tuple(placement.spec) + (None,) * (len(shapes[path]) - len(placement.spec))
    groups[re.sub(r"\d+", "*", path), shapes[path], spec, placement.reason].append(path)
  for (pattern, shape, spec, reason), paths in groups.items():
    sizes = ", ".join(
      f"{size}/{axis}" if axis else str(size) for size, axis in zip(shape, spec, strict=True))
    count = f" ({len(paths)})" if len(paths) > 1 else ""
    yield f"  {name} {pattern if len(paths) > 1 else paths[0]}{count} [{sizes}] {reason}"


def bytes_per_device(tree: Any, mesh: Mesh) -> int:
  """Of the arrays of a tree, what one device holds."""
  leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(specs(tree, mesh)), strict=True)
  return sum(_size(x) // math.prod(mesh.shape[a] for a in spec if a) for x, spec in leaves)


def _bytes(tree: Any) -> int:
  return sum(_size(x) for x in jax.tree.leaves(tree))


def _size(x: Any) -> int:
  is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return 8 if is_key else math.prod(x.shape) * x.dtype.itemsize
