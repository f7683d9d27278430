"""Progress of long work as lines with the time left; some of them passing, see `Passing`.

Not by rich or tqdm: they draw bars for terminals, these lines also go to logs, JSON and pages.
"""

import math
import time
from collections.abc import Callable, Hashable
from typing import Any

Report = Callable[[str], None]
_EVERY = 0.5  # seconds between two passing lines of one Progress


class Passing(str):
  """A line that the next one replaces: a terminal rewrites it, a log can do without most."""


class Lines:
  """Writes whole lines; a passing one after 3 s of silence, after an hour once in 3 minutes."""

  def __init__(self, write: Report):
    self._write = write
    self._began = self._last = time.monotonic()

  def __call__(self, text: str) -> None:
    now = time.monotonic()
    if isinstance(text, Passing) and now - self._last < max(3.0, (now - self._began) / 20):
      return
    self._last = now
    self._write(str(text))


PRINTED = Lines(print)  # what functions report to unless they are told otherwise


def duration(seconds: float) -> str:
  """Seconds as 1:02:03 or 2:03."""
  minutes, rest = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TimeLeft:
  """A steady estimate, by the mean of the pieces but one that `compiles`; also called before it."""

  def __init__(self, compiles: bool = False):
    self._marks: list[tuple[int, float]] = []  # before and after the first piece
    self._compiles = compiles

  def __call__(self, done: int, total: int) -> str:
    """", 1:05 left"; empty where nothing can be said yet."""
    now = time.monotonic()
    if self._marks and done <= self._marks[0][0]:  # the same work once more
      self._marks, self._compiles = [], False
    if len(self._marks) < 2:
      self._marks.append((done, now))
    mark = next((m for m in reversed(self._marks) if m[0] < done), None)
    if mark is None or (mark is self._marks[0] and self._compiles):
      return ""
    left = (now - mark[1]) / (done - mark[0]) * (total - done)
    return f", {duration(left)} left" if left >= 1 else ""


def silent(text: str) -> None:
  """A report of nothing."""


class Progress:
  """Reports passing lines such as "slices: 40/300, 1:05 left", at most two a second.

  Called with (pieces done, all), once before the first piece; `compiles`: that takes longer.
  """

  def __init__(self, what: str, report: Report, compiles: bool = False):
    self._what, self._report = what, report
    self._left, self._last = TimeLeft(compiles), -math.inf

  def __call__(self, done: int, total: int) -> None:
    now = time.monotonic()
    left = self._left(done, total)
    if done < total and now - self._last >= _EVERY:
      self._last = now
      self._report(Passing(f"{self._what}: {done}/{total}{left}"))


def below(report: Report, heading: str) -> Report:
  """A report that puts `heading` before every line."""
  return lambda text: report(type(text)(heading + text))


def compiling(what: str, program: Any, key: Hashable, report: Report) -> bool:
  """Says that `what` is compiled, which can take a minute; returns whether it is.

  `program` is the function of `jax.jit` that is called next; it keeps in `announced` what has been
  said. `key` is what it is compiled for: shapes and static arguments.
  """
  announced = program.__dict__.setdefault("announced", set())
  if new := key not in announced:
    announced.add(key)
    report(f"compiling {what}")
  return new
