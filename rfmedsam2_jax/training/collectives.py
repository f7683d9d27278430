"""What a compiled program sends between devices, read from its text."""

import math
import re
from typing import NamedTuple

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
