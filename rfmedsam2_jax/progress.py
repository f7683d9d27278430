"""Progress of long work as lines with the time left."""

import time
from collections.abc import Callable


def duration(seconds: float) -> str:
  """Seconds as 1:02:03 or 2:03."""
  minutes, rest = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
  """Calls `report` with lines such as "slices: 40/300, 1:05 left", at most every five seconds."""

  def __init__(self, what: str, report: Callable[[str], None]):
    self._what, self._report = what, report
    self._began = self._last = time.monotonic()

  def __call__(self, done: int, total: int) -> None:
    now = time.monotonic()
    if now - self._last > 5 and done < total:
      left = (now - self._began) / done * (total - done)
      self._report(f"{self._what}: {done}/{total}, {duration(left)} left")
      self._last = now
