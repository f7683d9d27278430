"""What a training step will hold and send on a mesh, without the devices of that mesh.

The step is compiled for as many simulated CPU devices. Where arrays lie and what is sent does not
depend on the kind of device; the memory of activations does, and is an estimate.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from rfmedsam2_jax.parallel.devices import flops_of
from rfmedsam2_jax.parallel.mesh import batch_shapes, batch_shards
from rfmedsam2_jax.parallel.rules import path_of, placements, shardings, specs
from rfmedsam2_jax.training.collectives import KINDS, collectives_of
from rfmedsam2_jax.training.phases import Phase

GIB = 2**30


def report_step(
  phase: Phase, state: Any, mesh: Mesh, report: Callable[[str], None], compiles: bool
) -> None:
  """Reports one phase's step: decisions, bytes per device, collectives.

  Args:
    state: a TrainState of jax.ShapeDtypeStruct.
    compiles: False leaves out what only the compiled step tells.
  """
  shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  report(f"{phase.name}: {mesh.size} devices, {shape}")
  for name in ("trained", "frozen"):
    for line in decisions(getattr(state, name), name, mesh):
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


def decisions(tree: Any, name: str, mesh: Mesh) -> Iterator[str]:
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
