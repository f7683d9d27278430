"""What the compiled step of a phase says: whether it fits, what it takes at least, what it sends.

In: the step as a device's own compiler gives it, which for a TPU needs none (programs.topology).
"""

import time
from collections.abc import Iterator
from typing import Any

import jax

from rfmedsam2_jax.base.errors import first_line
from rfmedsam2_jax.config import Config
from rfmedsam2_jax.parallel.mesh import batch_shards
from rfmedsam2_jax.programs.chips import GIB, Chip
from rfmedsam2_jax.programs.costs import KINDS, Cost, cost_of
from rfmedsam2_jax.training.phases import Phase

Facts = dict[str, Any]


def compile_facts(lowered: Any, chip: Chip | None) -> Facts:
  """Of a `jax.stages.Lowered` step: bytes, FLOP and seconds of one device; JSON may hold them.

  chip: what it is compiled for; None, a CPU that stands for anything, whose memory is an estimate
  and whose traffic tells nothing. A program too large for the chip has a "refusal" and no costs.
  """
  began = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if chip is None or "RESOURCE_EXHAUSTED" not in str(error):
      raise
    seconds = time.perf_counter() - began
    return {"compile_seconds": seconds, "fits": False, "refusal": first_line(error, 400)}
  facts: Facts = {"compile_seconds": time.perf_counter() - began}
  if (memory := compiled.memory_analysis()) is not None:
    facts["memory"] = _memory(memory)
  cost = cost_of(compiled.as_text())
  facts |= _costs(cost)
  if chip is not None:
    facts["fits"] = facts["memory"]["total"] <= chip.usable
    arithmetic = cost.flops * chip.devices / chip.flops
    traffic = cost.bytes * chip.devices / chip.rate
    facts |= {
      "bytes": cost.bytes, "seconds": {"arithmetic": arithmetic, "memory": traffic},
      "limit": "arithmetic" if arithmetic > traffic else "memory"}
  return facts


def _memory(found: Any) -> dict[str, int]:
  """Bytes of one device; results that lie where arguments lay are `shared`."""
  parts = {"arguments": found.argument_size_in_bytes, "results": found.output_size_in_bytes,
           "shared": found.alias_size_in_bytes, "temporary": found.temp_size_in_bytes,
           "program": found.generated_code_size_in_bytes}
  return parts | {"total": sum(parts.values()) - 2 * parts["shared"]}


def _costs(cost: Cost) -> Facts:
  collectives = {}
  for kind in KINDS:
    if some := [c for c in cost.collectives if c.kind == kind]:
      collectives[kind] = {
        "count": sum(c.times for c in some), "bytes": sum(c.bytes * c.times for c in some),
        "largest": max(c.largest for c in some)}
  return {"flops": cost.flops, "collectives": collectives, "loops_counted_once": cost.loops,
          "calls_not_counted": dict(cost.calls)}


def products_of(compiled: Any) -> float:
  """FLOP of a step on one device, loops as often as they run; 0 where its text says something new,
  which is no reason not to train."""
  try:
    return cost_of(compiled.as_text() or "").flops
  except (ValueError, LookupError):
    return 0.0


def lines_of(facts: Facts, chip: Chip | None, remedies: list[str]) -> Iterator[str]:
  """Facts for a person; remedies: said if the step does not fit."""
  if chip is not None:
    yield f"  compiled for {chip.kind} in {facts['compile_seconds']:.0f} s"
    yield from _whether_it_fits(facts, chip)
    if not facts["fits"]:
      yield f"  does not fit; what helps: {'; '.join(remedies)}"
  elif "memory" in facts:
    yield (f"  {'activations, others':22s} {facts['memory']['temporary'] / GIB:9.4f}   (as "
           "compiled for a CPU)")
  if "refusal" in facts:
    return
  flops = f"  arithmetic: {facts['flops'] / 1e12:.4g} TFLOP per device and step"
  yield flops + (_at(facts, "arithmetic", chip) if chip else "") + "; products and convolutions"
  if chip is not None:
    yield (f"  memory traffic: {facts['bytes'] / 1e9:.4g} GB per device and step"
           f"{_at(facts, 'memory', chip)}")
    least = max(facts["seconds"].values())
    yield f"  limited by {facts['limit']}: a step takes {least:.2g} s at least"
  if facts["loops_counted_once"]:
    yield f"  {facts['loops_counted_once']} loops of unknown length are counted once"
  for name, count in facts["calls_not_counted"].items():
    yield f"  not counted: {count} calls of {name}"
  for kind, found in facts["collectives"].items():
    yield (f"  {kind}: {found['count']}, {found['bytes'] / GIB:.4f} GiB per step, largest array "
           f"{found['largest'] / 2**20:.2f} MiB")
  if not facts["collectives"]:
    yield "  no collectives"


def _whether_it_fits(facts: Facts, chip: Chip) -> Iterator[str]:
  room = (f"{chip.usable / GIB:.2f} GiB that programs have of {chip.memory / chip.devices / GIB:g} "
          "GiB")
  if "refusal" in facts:
    yield f"  memory: the compiler refuses it ({facts['refusal']})"
    return
  memory = {name: size / GIB for name, size in facts["memory"].items()}
  yield (f"  memory: {memory['total']:.3f} GiB of {room}{': fits' if facts['fits'] else ''}")
  yield (f"    arguments {memory['arguments']:.3f}, results elsewhere "
         f"{memory['results'] - memory['shared']:.3f}, temporary {memory['temporary']:.3f}, "
         f"program {memory['program']:.3f}")


def _at(facts: Facts, what: str, chip: Chip) -> str:
  rate = {"arithmetic": f"{chip.flops / chip.devices / 1e12:.0f} TFLOP/s",
          "memory": f"{chip.rate / chip.devices / 1e9:.0f} GB/s"}[what]
  return f", {facts['seconds'][what]:.2g} s at {rate}"


def remedies(config: Config, phase: Phase, mesh: Any) -> list[str]:
  """What makes a step smaller, the cheapest first, of what is not yet done."""
  network, settings = ("generator", config.generator) if phase.name == "generator" else (
    "sam2", config.sam2)
  parts = batch_shards(mesh)
  rows = phase.settings.batch_size // parts // phase.settings.microbatches
  found = []
  if settings.remat != "block":
    found.append(f"{network}.remat=block (is {settings.remat})")
  if settings.dtype == "float32":
    found.append(f"{network}.dtype=bfloat16")
  if rows > 1:
    if phase.name != "mask_adapter":  # which has none
      found.append(f"{phase.key}.microbatches={phase.settings.microbatches * rows}")
    found.append(f"{phase.key}.batch_size={phase.settings.batch_size // rows} "
                 f"({rows} rows on a device at once)")
  if mesh.shape["fsdp"] < mesh.size:
    found.append(f"mesh.fsdp={mesh.size} (parameters and optimizer)")
  smaller = {"generator": "a smaller plan.patch_size", "tracker": "fewer tracker.slices or objects"}
  found.append(smaller.get(phase.key, "fewer refiner.slices or structures"))
  return [*found, "a chip with more memory"]
