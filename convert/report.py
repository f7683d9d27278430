"""Whether a checkpoint fits a network, tensor by tensor, and what to do where it does not."""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence

# What "memory" allows: all that only tracking and refinement use. Sam2Model lacks it.
MEMORY = (
  "memory_attention.*", "memory_encoder.*", "maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr",
  "no_obj_embed_spatial", "mask_downsample.*", "obj_ptr_proj.*", "obj_ptr_tpos_proj.*",
)
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Match:
  """Official names, sorted.

  Attributes:
    matched: in both, with the same shape.
    missing: only in the network.
    unexpected: only in the checkpoint.
    conflicts: in both, with its shape in the checkpoint and in the network.
    values: numbers in the matched tensors.
  """

  matched: tuple[str, ...]
  missing: tuple[str, ...]
  unexpected: tuple[str, ...]
  conflicts: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
  values: int

  @property
  def fresh(self) -> tuple[str, ...]:
    """What the checkpoint cannot give."""
    return (*self.missing, *self.conflicts)

  def refused(self, allowed: Sequence[str]) -> list[str]:
    """Names that spoil the match and that no pattern allows."""
    patterns = [p for name in allowed for p in (MEMORY if name == "memory" else (name,))]
    return [
      name for name in (*self.missing, *self.unexpected, *self.conflicts)
      if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


def match(found: Shapes, expected: Shapes) -> Match:
  """Compares the tensors of a checkpoint with those of a network."""
  both = sorted(found.keys() & expected.keys())
  matched = tuple(name for name in both if found[name] == expected[name])
  return Match(
    matched=matched,
    missing=tuple(sorted(expected.keys() - found.keys())),
    unexpected=tuple(sorted(found.keys() - expected.keys())),
    conflicts={
      name: (found[name], expected[name]) for name in both if found[name] != expected[name]
    },
    values=sum(math.prod(found[name]) for name in matched),
  )


def lines(result: Match, allowed: Sequence[str], shown: int = 8) -> list[str]:
  """The report, for people; at most `shown` names of each kind, those that are refused first."""
  refused = set(result.refused(allowed))
  text = [f"  matched      {len(result.matched):5d} tensors, {result.values / 1e6:.2f} M values"]
  shapes = {name: f" is {a}, should be {b}" for name, (a, b) in result.conflicts.items()}
  for what, names, gets in (
    ("missing", result.missing, "freshly initialised"),
    ("unexpected", result.unexpected, "left out"),
    ("other shape", tuple(result.conflicts), "freshly initialised"),
  ):
    text.append(f"  {what:12s} {len(names):5d}")
    for name in sorted(names, key=lambda name: name not in refused)[:shown]:
      allowance = "" if name in refused else f": allowed, {gets}"
      text.append(f"    {name}{shapes.get(name, '')}{allowance}")
    if len(names) > shown:
      text.append(f"    and {len(names) - shown} more")
  return text
