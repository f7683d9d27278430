"""What a compiled step costs on one device: arithmetic, memory traffic, collectives.

XLA's own analysis counts the body of a loop once and calls out of XLA as nothing. Here a body
counts as often as it runs (`loops`), and calls as what they compute (`arithmetic`). Only products
of matrices and convolutions count as arithmetic: the peak of a device is the rate of those.
"""

import dataclasses
import functools
from collections import Counter
from typing import NamedTuple

from rfmedsam2_jax.programs.arithmetic import flops_of
from rfmedsam2_jax.programs.hlo import Computation, Instruction, Module, read_module
from rfmedsam2_jax.programs.loops import trips
from rfmedsam2_jax.programs.traffic import traffic

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
  """One operation of KINDS: bytes of its result on one device, arrays combined, largest's bytes,
  and how often it runs."""

  kind: str
  bytes: int
  arrays: int
  largest: int
  times: int = 1


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of a program that runs once, on one device.

  flops: of products and convolutions. bytes: read from and written to main memory. loops: how many
  count once, as nothing says how often they run. calls: out of XLA, by name, whose arithmetic is
  not known and not counted.
  """

  flops: float = 0
  bytes: float = 0
  collectives: tuple[Collective, ...] = ()
  loops: int = 0
  calls: Counter[str] = dataclasses.field(default_factory=Counter)

  def repeated(self, times: int) -> "Cost":
    """Of a loop with this body."""
    return dataclasses.replace(
      self, flops=self.flops * times, bytes=self.bytes * times,
      collectives=tuple(c._replace(times=c.times * times) for c in self.collectives if times))


def cost_of(text: str) -> Cost:
  """What an optimised module (`compiled.as_text()`) costs; ValueError if it is none."""
  module = read_module(text)
  return _Costs(module).of(module.entry, False)


def collectives_of(text: str) -> list[Collective]:
  """The collectives of an optimised module, in its order."""
  return list(cost_of(text).collectives)


class _Costs:
  def __init__(self, module: Module):
    self._module = module
    self.of = functools.cache(self._of)

  def _of(self, name: str, fused: bool) -> Cost:
    """Of a computation; within a fusion nothing is read or written."""
    within = self._module.computations[name]
    return _sum([self._instruction(within, x, fused) for x in within.instructions.values()])

  def _instruction(self, within: Computation, x: Instruction, fused: bool) -> Cost:
    called = x.called
    if x.opcode == "while":
      times = trips(self._module, within, x)
      once = _sum([self.of(called["body"], fused), self.of(called["condition"], fused)])
      return _sum([once.repeated(1 if times is None else times), Cost(loops=times is None)])
    if x.opcode == "conditional":
      ways = [self.of(name, fused) for name in _branches(x)]
      return max(ways, key=lambda way: (way.flops, way.bytes), default=Cost())
    own = _own(within, x)
    if not fused:
      own = dataclasses.replace(own, bytes=traffic(self._module, within, x))
    if x.opcode in ("fusion", "call", "async-start"):
      inside = called.get("calls") or called["to_apply"]
      return _sum([own, self.of(inside, fused or x.opcode == "fusion")])
    return own


def _sum(costs: list[Cost]) -> Cost:
  return Cost(
    sum(c.flops for c in costs), sum(c.bytes for c in costs),
    tuple(one for c in costs for one in c.collectives), sum(c.loops for c in costs),
    sum((c.calls for c in costs if c.calls), Counter()))


def _branches(x: Instruction) -> list[str]:
  named = x.braced("branch_computations").split(",")
  return [name.strip().lstrip("%") for name in named if name.strip()] or [
    x.called["true_computation"], x.called["false_computation"]]


def _own(within: Computation, x: Instruction) -> Cost:
  """Arithmetic and collectives of an instruction itself."""
  kind = x.opcode.removesuffix("-start")
  if kind in KINDS and _begins(within, x):
    # What -start gives has the operands before the results, but of a sum.
    arrays, given = x.arrays, len(x.operands)
    if kind != x.opcode and kind != "all-reduce" and len(arrays) > given:
      arrays = arrays[given:2 * given]
    sizes = [array.bytes for array in arrays]
    return Cost(collectives=(Collective(kind, sum(sizes), len(sizes), max(sizes, default=0)),))
  flops = flops_of(within, x)
  if flops is None:
    return Cost(calls=Counter([x.text("custom_call_target")]))
  return Cost(flops)


def _begins(within: Computation, x: Instruction) -> bool:
  """Whether a collective is not a further part of one that began before.

  For TPUs those that run beside computations are cut into a chain of parts, each in a fusion.
  """
  return "chain_id=" not in x.rest or any(
    "AsyncCollectiveStart" in user.rest for user in within.users(x.name))
