"""Where the time of a phase goes: steps, and what is beside them."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Literal


@dataclasses.dataclass
class TimeSpent:
  """Seconds of a phase in this process.

  entered: when it began, by `time.monotonic`; what was saved is restored then, and the step
  compiled. began: when its steps did. validation, saving: between steps. waiting: for batches.
  """

  entered: float
  began: float
  validation: float = 0.0
  saving: float = 0.0
  waiting: float = 0.0

  @contextlib.contextmanager
  def on(self, what: Literal["validation", "saving", "waiting"]) -> Iterator[None]:
    """Adds what is done within. No step may be under way where it is not `waiting`."""
    began = time.monotonic()
    yield
    setattr(self, what, getattr(self, what) + time.monotonic() - began)

  def stepping(self, now: float) -> float:
    """Seconds in steps and in what belongs to them, which a rate of steps is of."""
    return max(now - self.began - self.validation, 1e-6)

  def shares(self, now: float) -> dict[str, float]:
    """goodput: of all time since `entered`, that of steps. data_wait: of the time in steps, that in
    which the host waited for a batch; devices may have been at work meanwhile."""
    steps = self.stepping(now)
    return {"goodput": round(max(steps - self.saving, 0.0) / max(now - self.entered, 1e-6), 4),
            "data_wait": round(self.waiting / steps, 4)}
