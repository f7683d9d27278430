"""The text of an XLA module (`compiled.as_text()`) as computations of instructions.

Read for what a program costs (`costs`) and how often its loops run (`loops`). The text is what
every backend gives; XLA's own classes are no public part of JAX.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")  # of a computation
_NAMED = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OPERAND = re.compile(r"%?([A-Za-z_][\w.\-]*)\s*(?:,|$)")
_CALLED = re.compile(
  r"\b(calls|to_apply|condition|body|(?:true|false)_computation)=%?([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_PARENTHESIS = re.compile(r"[()]")


class Laid(NamedTuple):
  """An array as it lies in memory.

  size: bytes, with what a TPU's layout adds to fill its tiles. space: 0 is the device's main
  memory, others are on the chip.
  """
  dtype: str
  shape: tuple[int, ...]
  size: int
  space: int = 0

  @property
  def bytes(self) -> int:
    """Of its elements alone."""
    return math.prod(self.shape) * _bits(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """arrays: its result, a tuple flattened. operands: names. rest: of its line, operands first."""
  name: str
  opcode: str
  arrays: tuple[Laid, ...]
  operands: tuple[str, ...]
  rest: str

  @functools.cached_property
  def size(self) -> int:
    return sum(array.size for array in self.arrays)

  @functools.cached_property
  def called(self) -> dict[str, str]:
    """The computations that attributes name: calls, to_apply, condition, body, ..."""
    return dict(_CALLED.findall(self.rest))

  def text(self, attribute: str) -> str:
    """Of an attribute such as custom_call_target="TopK", or ""."""
    found = re.search(rf'\b{attribute}="([^"]*)"', self.rest)
    return found[1] if found else ""

  def braced(self, attribute: str) -> str:
    """Of an attribute such as lhs_contracting_dims={1,2}, or ""."""
    found = re.search(rf"\b{attribute}=\{{([^}}]*)\}}", self.rest)
    return found[1] if found else ""

  def numbers(self, attribute: str) -> tuple[int, ...]:
    return _integers(self.braced(attribute))

  def integer(self, attribute: str, default: int) -> int:
    found = re.search(rf"\b{attribute}=(\d+)", self.rest)
    return int(found[1]) if found else default


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in their order; `root` gives the result."""
  instructions: dict[str, Instruction]
  root: Instruction

  def operands(self, instruction: Instruction) -> list[Instruction]:
    return [self.instructions[name] for name in instruction.operands if name in self.instructions]

  def users(self, name: str) -> list[Instruction]:
    return self._users.get(name, [])

  @functools.cached_property
  def _users(self) -> dict[str, list[Instruction]]:
    found = dict[str, list[Instruction]]()
    for x in self.instructions.values():
      for name in dict.fromkeys(x.operands):
        found.setdefault(name, []).append(x)
    return found

  @functools.cached_property
  def parameters(self) -> list[Instruction]:
    found = [x for x in self.instructions.values() if x.opcode == "parameter"]
    return sorted(found, key=lambda x: int(x.rest.partition(")")[0]))


class Module(NamedTuple):
  """Computations by name; `entry` is the name of the one that runs."""
  computations: dict[str, Computation]
  entry: str


def read_module(text: str) -> Module:
  """A module from its text; ValueError if it has no ENTRY."""
  computations, entry = dict[str, Computation](), ""
  name, lines, root = "", dict[str, Instruction](), ""
  for line in text.splitlines():
    if line[:1] in (" ", "\t"):
      if name and (named := _NAMED.match(line)):
        lines[named[2]] = _instruction(named[2], line[named.end():])
        root = named[2] if named[1] or not root else root
    elif line.startswith("}") and name:
      computations[name] = Computation(lines, lines[root])
      name, lines, root = "", {}, ""
    elif head := _HEAD.match(line):
      name = head[2]
      entry = name if head[1] else entry
  if not entry:
    raise ValueError("no text of an XLA module: has no ENTRY")
  return Module(computations, entry)


def _instruction(name: str, line: str) -> Instruction:
  end = _closing(line, 0) if line.startswith("(") else line.find(" ")
  arrays = tuple(_laid(*found) for found in _ARRAY.findall(line[:end]))
  opcode = _OPCODE.match(line, end)
  if opcode is None:
    raise ValueError(f"{line[:80]}: is no instruction of XLA")
  rest = line[opcode.end():]
  inside = rest[:_closing(line, opcode.end() - 1) - opcode.end() - 1]
  operands = () if opcode[1] in ("constant", "parameter") else _OPERAND.findall(
    _COMMENT.sub("", inside))
  return Instruction(name, opcode[1], arrays, tuple(operands), rest)


def _closing(text: str, start: int) -> int:
  """Behind the parenthesis that closes the one at `start`."""
  depth = 0
  for found in _PARENTHESIS.finditer(text, start):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return found.end()
  return len(text)


@functools.cache
def _laid(dtype: str, dims: str, layout: str) -> Laid:
  shape = _integers(dims.replace("<=", ""))
  order, _, rest = layout.partition(":")
  space = re.search(r"S\((\d+)\)", rest)
  tile = re.search(r"T\(([\d,]+)\)", rest)
  sides = [shape[axis] for axis in reversed(_integers(order))] if order else list(shape)
  if tile:
    tiled = _integers(tile[1])
    sides = [1] * (len(tiled) - len(sides)) + sides
    for axis, n in enumerate(tiled, len(sides) - len(tiled)):
      sides[axis] = -(-sides[axis] // n) * n
  return Laid(dtype, shape, math.prod(sides) * _bits(dtype) // 8, int(space[1]) if space else 0)


def _bits(dtype: str) -> int:
  """Of an element: 16 of bf16, 8 of f8e4m3fn and of pred; none of a token."""
  found = re.search(r"\d+", dtype)
  return 8 if dtype == "pred" else int(found[0]) if found else 0


def _integers(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(",") if n.strip())
