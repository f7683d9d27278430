"""How often the loops of an XLA module run: what XLA says, or what their counters come to."""

import functools
import re
from collections.abc import Callable

from rfmedsam2_jax.programs.hlo import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_MOST = 10**5  # more steps of a loop are not followed
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "broadcast")
_SUMS: dict[str, Callable[[int, int], int]] = {
  "add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b,
  "minimum": min, "maximum": max, "and": lambda a, b: a & b, "or": lambda a, b: a | b,
}
_COMPARED: dict[str, Callable[[int, int], bool]] = {
  "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b,
  "GE": lambda a, b: a >= b, "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}


class _Unknown(Exception):
  """A number that only running the program tells."""


def trips(module: Module, within: Computation, loop: Instruction) -> int | None:
  """How often the body of a `while` of a computation runs; None if that is not written in it.

  Compilers that do not note it (libtpu) leave it to be found: the whole numbers that the condition
  looks at are followed from their constants through the body, until it is false.
  """
  if known := _KNOWN.search(loop.rest):
    return int(known[1])
  condition = module.computations[loop.called["condition"]]
  body = module.computations[loop.called["body"]]
  try:
    (given,) = within.operands(loop)
    state: dict[int, int] = {}
    # What the condition looks at, and what that is made of from step to step.
    wanted = _asked(module, condition, condition.root)
    while missing := wanted - set(state):
      for index in missing:
        state[index] = _Numbers(module, within, {}).element(given, index)
        wanted |= _asked(module, body, body.root, index)
    for count in range(_MOST):
      if not _Numbers(module, condition, state).of(condition.root):
        return count
      numbers = _Numbers(module, body, state)
      state = {index: numbers.element(body.root, index) for index in state}
  except _Unknown:
    pass
  return None


class _Numbers:
  """Whole numbers of a computation, of which `state` are elements of its one parameter."""

  def __init__(self, module: Module, within: Computation, state: dict[int, int]):
    self._module, self._within, self._state = module, within, state
    self._arguments: list[Callable[[], int]] = []
    self.asked: set[int] = set()

  def of(self, x: Instruction) -> int:
    """A scalar; _Unknown if it depends on more than constants and the state."""
    operands = self._within.operands(x)
    if x.opcode == "constant":
      text = x.rest.partition(")")[0]
      if not re.fullmatch(r"-?\d+|true|false", text):
        raise _Unknown
      return int({"true": "1", "false": "0"}.get(text, text))
    if x.opcode in _SAME:
      return self.of(operands[0])
    if x.opcode in _SUMS:
      return _SUMS[x.opcode](self.of(operands[0]), self.of(operands[1]))
    if x.opcode == "compare":
      direction = re.search(r"direction=(\w+)", x.rest)
      return _COMPARED[direction[1] if direction else ""](
        self.of(operands[0]), self.of(operands[1]))
    if x.opcode == "get-tuple-element":
      return self.element(operands[0], x.integer("index", 0))
    if x.opcode in ("fusion", "call"):
      return self._inside(x).of(self._called(x).root)
    if x.opcode == "parameter" and self._arguments:
      return self._arguments[int(x.rest.partition(")")[0])]()
    raise _Unknown

  def element(self, x: Instruction, index: int) -> int:
    """An element of a tuple."""
    if x.opcode == "tuple":
      return self.of(self._within.operands(x)[index])
    if x.opcode == "parameter" and not self._arguments:
      self.asked.add(index)
      if index in self._state:
        return self._state[index]
    if x.opcode in ("fusion", "call"):
      return self._inside(x).element(self._called(x).root, index)
    raise _Unknown

  def _called(self, x: Instruction) -> Computation:
    return self._module.computations[x.called.get("calls") or x.called["to_apply"]]

  def _inside(self, x: Instruction) -> "_Numbers":
    inside = _Numbers(self._module, self._called(x), {})
    inside._arguments = [functools.partial(self.of, y) for y in self._within.operands(x)]
    return inside


def _asked(
  module: Module, within: Computation, root: Instruction, index: int | None = None
) -> set[int]:
  """Elements of the parameter that a result, or one element of it, depends on."""
  known: dict[int, int] = {}
  while True:
    numbers = _Numbers(module, within, known)
    try:
      if index is None:
        numbers.of(root)
      else:
        numbers.element(root, index)
      return set(known)
    except _Unknown:
      if not (more := numbers.asked - set(known)):
        raise
      known |= dict.fromkeys(more, 1)
