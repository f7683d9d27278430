"""The `shard` command: the steps of all phases on a mesh of devices that need not exist.

A step is compiled for as many simulated CPU devices, or for the chips of a TPU slice by their own
compiler. Where arrays lie and what is sent hardly depends on the kind of device; the memory of
activations does, and a CPU's is an estimate.
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
from rfmedsam2_jax.parallel.mesh import batch_shapes, batch_shards, make_mesh
from rfmedsam2_jax.parallel.rules import path_of, placements, shardings, specs
from rfmedsam2_jax.programs.chips import GIB, Chip
from rfmedsam2_jax.training.compiled import Facts, compile_facts, lines_of, remedies
from rfmedsam2_jax.training.phases import (
  PHASES,
  Phase,
  PhaseName,
  check_batches,
  tracker_phases,
)


class Target(NamedTuple):
  """What the steps are for: `devices` (None: those that JAX has), all of them of a kind of `chip`
  (None: of a CPU), `name` for the report."""

  devices: Sequence[Any] | None = None
  chip: Chip | None = None
  name: str = ""


def shard(
  config: Config, channels: int, structures: int, phases: Sequence[PhaseName], target: Target,
  report: Callable[[str], None] = print, compiles: bool = True, progress: Report = silent,
) -> list[Facts]:
  """Reports what every device would hold and send, and returns it; reads no data.

  channels, structures: of the data set. compiles: False leaves out what only the compiled step
  tells. progress: takes lines about what is done.

  Returns:
    For every phase its name, the mesh, bytes that a device holds, and what
    training.compiled.compile_facts gives.

  Raises:
    UserError: a mesh that these devices do not make, a batch that does not spread over it.
  """
  mesh = make_mesh(config.mesh, target.devices)
  check_batches(config, phases, mesh)
  key = jax.random.key(0)
  made = tracker_phases(config) if "tracker" in phases else []
  if others := [name for name in phases if name != "tracker"]:
    plan = _plan_of_shapes(config.plan, channels, structures)
    made += [PHASES[name](config, plan) for name in others]
  found = []
  for phase in made:
    progress(f"{phase.name}: laying out" + (" and compiling the training step" if compiles else ""))
    state = jax.eval_shape(lambda key, phase=phase: phase.start(phase.init(key), key), key)
    facts = _report_layout(phase, state, mesh, report, target.name)
    if compiles:
      compiled = compile_facts(_lowered(phase, state, mesh), target.chip)
      for line in lines_of(compiled, target.chip, remedies(config, phase, mesh)):
        report(line)
      facts |= compiled
    found.append(facts)
  return found


def _plan_of_shapes(config: PlanConfig, channels: int, structures: int) -> Plan:
  """A plan that has the sizes of a real one."""
  patch, spacing = config.patch_size, config.spacing or (1.0, 1.0, 1.0)
  seen = config.generator_spacing or spacing
  if patch is None:
    raise UserError("plan.patch_size: is left to the data set, which is not read here; give it, as "
                    "in plan.patch_size=[96,160,160]")
  strides, kernels, size = pooling(np.array(seen), np.array(patch), config.poolings)
  values = tuple(range(1, structures + 1))
  labels = Labels(tuple(Structure(f"structure {k}", (k,)) for k in values), False, values)
  rules = tuple(ChannelRule(f"channel {k}", "zscore") for k in range(channels))
  depth, height, width = map(int, size)
  patch = depth, height, width
  try:
    return Plan("shapes", 0, spacing, patch, rules, patch, strides, kernels, labels,
                config.generator_spacing)
  except ValueError as error:
    raise UserError(f"plan: {error}; give others") from None


def _report_layout(
  phase: Phase, state: Any, mesh: Mesh, report: Callable[[str], None], where: str
) -> Facts:
  """Reports, of a phase's TrainState of shapes, where its arrays lie and what a device holds."""
  shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  report(f"{phase.name}: {f'{where}, ' if where else ''}{mesh.size} devices, {shape}")
  for name in ("trained", "frozen"):
    for line in _decisions(getattr(state, name), name, mesh):
      report(line)
  trees = {"trained parameters": state.trained, "frozen parameters": state.frozen,
           "gradients": state.trained, "averaged parameters": state.ema,
           "optimizer": state.optimizer}
  held = {name: (bytes_per_device(tree, mesh), _bytes(tree)) for name, tree in trees.items()}
  held["batch"] = _bytes(phase.batch) // batch_shards(mesh), _bytes(phase.batch)
  report(f"  {'per device':22s} {'GiB':>9s} {'of':>9s}")
  for name, (mine, whole) in held.items():
    report(f"  {name:22s} {mine / GIB:9.4f} {whole / GIB:9.4f}")
  return {"phase": phase.name, "where": where, "devices": mesh.size, "mesh": dict(mesh.shape),
          "held": {name: mine for name, (mine, _) in held.items()}}


def _lowered(phase: Phase, state: Any, mesh: Mesh) -> Any:
  """The training step itself, for a state and a batch of shapes, traced for the mesh's devices."""
  placed = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    state, shardings(state, mesh))
  return phase.step(state, mesh).lower(placed, batch_shapes(phase.batch, mesh))


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
