"""What a case of the campaign is, and what counts as right.

A case makes damaged or hostile files in a folder of its own and says what is called with them.
Right is one of two ends:

- refused: `UserError`, on the command line exit status 2 and one line on standard error, which
  names the file or the key and says what to do; the output folder holds what it held before;
- read: exit status 0, every file in the output folder is whole, and `Attempt.judge` finds that the
  result is what the bytes say as another library reads them (witnesses.py).

Everything else is a mistake: any other exception or status, other lines on standard error, a
success that the witness does not confirm, too much time, too much memory.
"""

import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LINE = 1200  # characters of the longest line that is still clear
_OURS = ("rfmedsam2: ", "convert: ")
# What no line may hold: Python's and ITK's insides, and characters that no terminal shows.
_INSIDES = re.compile(r"Traceback|object at 0x|\bitk::|\.hxx|\.cxx|[\x00-\x08\x0b-\x1f\x7f]")


def main(arguments: Sequence[str]) -> int:
  """A command of `rfmedsam2` without its lines of progress, which go to standard error too."""
  from rfmedsam2_jax.cli import main as rfmedsam2

  return rfmedsam2([*arguments, "--quiet"])


class Wrong(Exception):
  """The program did not do what is right."""


@dataclasses.dataclass(frozen=True)
class Attempt:
  """One call of the program.

  Attributes:
    call: gives the exit status of a command; or None of the Python API, which raises UserError.
    names: one of which the line must have.
    out: what results may be written to; whatever lies there after a success must be whole.
    judge: gives why a success is wrong, or ""; None: a success is wrong.
    must_read: whether a refusal is wrong.
  """

  call: Callable[[], int | None]
  names: tuple[str, ...]
  out: Path | None = None
  judge: Callable[[], str] | None = None
  must_read: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
  """make: (folder of the case, its random numbers, stage) -> Attempt."""

  kind: str
  name: str
  make: Callable[[Path, np.random.Generator, Any], Attempt]

  def rng(self, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(f"{self.kind}/{self.name}".encode())])


Make = Callable[[Path, np.random.Generator, Any], Attempt]
KINDS: dict[str, Callable[[], Iterator[tuple[str, Make]]]] = {}


def kind(name: str):
  """Registers a generator of (name, make)."""
  def add(cases):
    KINDS[name] = cases
    return cases
  return add


def all_cases() -> list[Case]:
  """Every case, in an order that depends on the code alone."""
  found = [Case(name, case, make) for name, cases in KINDS.items() for case, make in cases()]
  names = [(case.kind, case.name) for case in found]
  assert len(set(names)) == len(names), "two cases have one name"
  return found


def judge(attempt: Attempt, status: int | None, error: str, before: dict[str, bytes]) -> str:
  """Judges the end of a call.

  Args:
    status: 0 or None after a success.
    error: all of standard error, or the message of the UserError.
    before: `snapshot` of the output folder.

  Returns:
    "refused" or "read".

  Raises:
    Wrong: it is neither.
  """
  lines = [line for line in error.splitlines() if line.strip()]
  said = [line for line in lines if ": warning: " not in line]
  if strange := [line for line in lines if not line.startswith(_OURS)]:
    raise Wrong(f"another line on standard error: {strange[0][:300]}")
  if status not in (0, 2, None):
    raise Wrong(f"exit status {status}")
  after = snapshot(attempt.out)
  if status == 2:
    if len(said) != 1:
      raise Wrong(f"{len(said)} lines instead of one: {said[:3]}")
    check_line(said[0], attempt.names)
    if after != before:
      raise Wrong(f"refused, but something was left: {sorted(after.keys() ^ before.keys())[:3]}")
    if attempt.must_read:
      raise Wrong(f"refused what is right: {said[0]}")
    return "refused"
  if said:
    raise Wrong(f"a line besides success: {said[0]}")
  for name, content in after.items():
    check_whole(name, content)
  if attempt.judge is None:
    raise Wrong("a success, where nothing can be right")
  if reason := attempt.judge():
    raise Wrong(f"wrong silent success: {reason}")
  return "read"


def check_line(line: str, names: tuple[str, ...]) -> None:
  """Whether a line is clear: it names the culprit, says what to do, and shows no insides."""
  shown = line.removeprefix(_OURS[0]).removeprefix(_OURS[1])
  if len(line) > LINE or _INSIDES.search(line):
    raise Wrong(f"no clear line: {line[:300]!r}")
  if not any(name in shown for name in names):
    raise Wrong(f"the line names none of {names}: {line}")
  if ";" not in shown and ", " not in shown:
    raise Wrong(f"the line does not say what to do: {line}")


def snapshot(out: Path | None) -> dict[str, bytes]:
  """The files below a folder by name; hidden locks of runs are no results."""
  if out is None or not out.is_dir():
    return {}
  return {
    str(path.relative_to(out)): path.read_bytes()
    for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"
  }


def check_whole(name: str, content: bytes) -> None:
  if Path(name).name.startswith("."):
    raise Wrong(f"a temporary file was left: {name}")
  try:
    if name.endswith(".gz"):
      gzip.decompress(content)
    elif name.endswith(".json"):
      json.loads(content, parse_constant=_no_constant)
  except (OSError, EOFError, ValueError, zlib.error) as error:
    raise Wrong(f"half written: {name} ({error})") from None


def _no_constant(name: str) -> None:
  raise ValueError(f"{name} is not JSON")
