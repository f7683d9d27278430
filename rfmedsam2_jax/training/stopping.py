"""SIGTERM, which preempted machines get: the run is saved, then left."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from rfmedsam2_jax.base import command


@contextlib.contextmanager
def listening() -> Iterator[Callable[[int], bool]]:
  """Gives a function that says whether to stop after a step, the same in every process."""
  if jax.process_count() > 1:  # they agree through JAX's own listener
    yield multihost_utils.reached_preemption_sync_point
    return
  asked: list[int] = []
  # Signals come to main threads, and other programs than a command keep their handler.
  if not command.running() or threading.current_thread() is not threading.main_thread():
    yield lambda step: False
    return
  before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
  try:
    yield lambda step: bool(asked)
  finally:
    signal.signal(signal.SIGTERM, before)
