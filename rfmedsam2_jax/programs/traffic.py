"""What an instruction of a compiled program reads from and writes to main memory.

As XLA's HloCostAnalysis: of a slice only what is taken, of an update in place only what is new.
Unlike it: what lies in memory on the chip (another space of a TPU's layout) costs nothing.
"""

from rfmedsam2_jax.programs.arithmetic import FREE
from rfmedsam2_jax.programs.hlo import Computation, Instruction, Laid, Module

# Nothing moves, or what does is counted where they begin or in what they call.
_STILL = frozenset((
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
  "async-start", "async-update", "async-done", "after-all", "opt-barrier", "partition-id",
  "replica-id", "domain", "add-dependency", "copy-done", "slice-done", "all-reduce-done",
  "all-gather-done", "collective-permute-done", "send-done", "recv-done"))
_TAKING = ("dynamic-slice", "slice", "gather")


def traffic(module: Module, within: Computation, x: Instruction) -> float:
  """Bytes of an instruction that is not part of a fusion."""
  operands = within.operands(x)
  if x.opcode in _STILL or x.opcode == "custom-call" and x.text("custom_call_target") in FREE:
    return 0
  if x.opcode == "fusion":
    inside = module.computations[x.called["calls"]]
    read = sum(_read(module, inside, parameter, operand.arrays)
               for parameter, operand in zip(inside.parameters, operands, strict=True))
    return read + _written(module, inside, inside.root, x.arrays)
  if x.opcode in ("copy-start", "slice-start"):  # to, from, context; or from, to, context
    moved = min(array.size for array in x.arrays[:2])
    return moved * sum(array.space == 0 for array in x.arrays[:2])
  if x.opcode in _TAKING:
    return _size(x.arrays) + _taken(x, operands[0].arrays) + _sizes(operands[1:])
  if x.opcode == "dynamic-update-slice":
    return _size(operands[1].arrays) + _like(operands[1].arrays, x.arrays)
  if x.opcode == "scatter":
    given = operands[len(x.arrays):]
    return _sizes(given) + _like(given[-1].arrays, x.arrays)
  return _sizes(operands) + _size(x.arrays)


def _size(arrays: tuple[Laid, ...]) -> int:
  return sum(array.size for array in arrays if array.space == 0)


def _sizes(operands: list[Instruction]) -> int:
  return sum(_size(operand.arrays) for operand in operands)


def _taken(x: Instruction, source: tuple[Laid, ...]) -> int:
  """Of a source, what a slice of it reads."""
  return min(x.size, _size(source)) if source and source[0].space == 0 else 0


def _like(arrays: tuple[Laid, ...], place: tuple[Laid, ...]) -> int:
  """Bytes of arrays, where the place that they are written to is in main memory."""
  return sum(a.size for a in arrays) if place and place[0].space == 0 else 0


def _read(module: Module, inside: Computation, x: Instruction, given: tuple[Laid, ...]) -> int:
  """Of what a fusion is given as its parameter x, what it reads."""
  whole = _size(given)
  if not whole:
    return 0
  read = 0
  for user in inside.users(x.name):
    if user.opcode in _TAKING and user.operands[0] == x.name:
      read += user.size
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == x.name:
      continue  # is written in place
    elif user.opcode == "fusion":
      deeper = module.computations[user.called["calls"]]
      read += sum(_read(module, deeper, deeper.parameters[n], given)
                  for n, name in enumerate(user.operands) if name == x.name)
    elif user.opcode == "bitcast":
      read += _read(module, inside, user, given)
    else:
      return whole
  return min(read, whole)


def _written(
  module: Module, inside: Computation, x: Instruction, place: tuple[Laid, ...]
) -> int:
  """Of a fusion's result x, what is written to its place."""
  if x.opcode == "tuple":
    parts = inside.operands(x)
    return sum(_written(module, inside, part, place[n:n + 1]) for n, part in enumerate(parts))
  if x.opcode == "dynamic-update-slice":
    return min(_like(inside.operands(x)[1].arrays, place), _size(place))
  if x.opcode == "bitcast":
    return _written(module, inside, inside.operands(x)[0], place)
  if x.opcode == "fusion":
    deeper = module.computations[x.called["calls"]]
    return _written(module, deeper, deeper.root, place)
  return _size(place)
