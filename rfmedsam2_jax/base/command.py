"""What a command does to its process: it silences libraries, and training takes signals.

Without `begin`, a library, it leaves loggers, hooks, standard error and signals alone.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

_running = False
_LEVELS = {
  "absl": logging.ERROR, "orbax": logging.ERROR, "jax": logging.ERROR,
  # Of a damaged folder Orbax's tasks fail by the dozen; the first is raised, others are logged.
  "asyncio": logging.CRITICAL,
  # Of a damaged header nibabel writes to standard error what it then raises.
  "nibabel.global": logging.CRITICAL + 1,
  "pydicom": logging.CRITICAL + 1,  # likewise
}


def begin() -> None:
  """From here on this process runs commands, which say in a line what libraries print and raise."""
  global _running
  for name, level in _LEVELS.items():
    logging.getLogger(name).setLevel(level)
  if _running:
    return
  _running = True
  # The first file that cannot be read ends Orbax's event loop while TensorStore's threads still
  # read others: nobody waits for their answers any more.
  warnings.filterwarnings("ignore", r"coroutine '\w+Handler\.", RuntimeWarning)
  before = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      before(unraisable)

  sys.unraisablehook = hook


def running() -> bool:
  """Whether this process runs a command, and is not somebody else's program."""
  return _running


@contextlib.contextmanager
def native_errors() -> Iterator[None]:
  """Keeps a block of C++ from standard error: MetaIO and zlib write there what ITK then raises."""
  if not _running:
    yield
    return
  sys.stderr.flush()
  with open(os.devnull, "w") as nothing:
    kept = os.dup(2)
    os.dup2(nothing.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(kept, 2)
      os.close(kept)
