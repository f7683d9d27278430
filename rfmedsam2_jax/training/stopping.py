"""SIGTERM, which preempted machines get: the run is saved, then left."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from rfmedsam2_jax.errors import Stopped


class Stopping:
  """Whether the run has been asked to stop."""

  def __init__(self):
    self._asked = False
    self._deferred = False

  def _handle(self, number: int, _) -> None:
    self._asked = True
    if not self._deferred:
      raise Stopped("stopped by SIGTERM; what was finished is kept, go on with --resume")

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """Here the signal only sets `asked`; what cannot be finished halfway is finished first."""
    before, self._deferred = self._deferred, True
    try:
      yield
    finally:
      self._deferred = before

  def asked(self, step: int) -> bool:
    """Whether to stop after `step`: the same answer, at the same step, in every process."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked


@contextlib.contextmanager
def listening() -> Iterator[Stopping]:
  """Listens to SIGTERM as long as it lasts."""
  stopping = Stopping()
  if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
    # Signals come to main threads only; several processes agree through JAX's own listener.
    yield stopping
    return
  before = signal.signal(signal.SIGTERM, stopping._handle)
  try:
    yield stopping
  finally:
    signal.signal(signal.SIGTERM, before)
