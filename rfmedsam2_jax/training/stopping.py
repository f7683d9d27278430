"""SIGTERM, which preempted machines get: the run is saved, then left."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from rfmedsam2_jax.base import command


class Stopping:
  """Whether the run has been asked to stop; what cannot be left halfway is finished first."""

  def __init__(self):
    self._asked = False

  def ask(self, *_: Any) -> None:
    """Takes the signal."""
    self._asked = True

  def asked(self, step: int) -> bool:
    """Whether to stop after `step`: the same answer, at the same step, in every process."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked


@contextlib.contextmanager
def listening() -> Iterator[Stopping]:
  """Listens to SIGTERM as long as it lasts, in a command; other programs keep their handler."""
  stopping = Stopping()
  main = threading.current_thread() is threading.main_thread()
  if not command.running() or not main or jax.process_count() > 1:
    # Signals come to main threads only; several processes agree through JAX's own listener.
    yield stopping
    return
  before = signal.signal(signal.SIGTERM, stopping.ask)
  try:
    yield stopping
  finally:
    signal.signal(signal.SIGTERM, before)
