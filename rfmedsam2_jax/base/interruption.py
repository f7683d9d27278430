"""Ctrl-C, SIGTERM and a closed terminal end a command at once: one line, nothing half-written.

Not as exceptions: what arrives in an import or in a callback of JAX would be taken for something
else or lost, and nothing arrives while XLA compiles, which can take minutes.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

STATUS = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_unfinished: set[Path] = set()
_lock = threading.RLock()
_process = 0  # that has installed it: its children have their own end
_said = 2, "interrupted"


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
  """A file or folder that goes if the command is ended within the block."""
  with _lock:
    _unfinished.add(path)
  try:
    yield
  finally:
    with _lock:
      _unfinished.discard(path)


def install() -> None:
  """Takes the signals, except those that are ignored; for the main thread of a program."""
  global _process
  _process = os.getpid()
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  for number in SIGNALS:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, _end)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
  threading.Thread(target=_watch, args=(reading,), daemon=True, name="interruption").start()


def block() -> None:
  """Lets signals wait for the program that replaces this one, which will `install`."""
  signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def say(line: str, to: int) -> None:
  """What is said at the end, and the file descriptor."""
  global _said
  _said = to, line


def finish() -> None:
  """The work is as good as done: from here on nothing interrupts it."""
  for number in SIGNALS:
    if signal.getsignal(number) is _end:
      signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
  if os.getpid() != _process:
    os._exit(STATUS)
  _lock.acquire()  # and never given back: nothing is begun any more
  for path in _unfinished:
    if path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)
  if "multiprocessing" in sys.modules:
    import multiprocessing

    for child in multiprocessing.active_children():
      child.kill()
  to, line = _said
  # Not by print: what was being printed when the signal came holds its lock.
  terminal = to == 2 and os.isatty(2)
  with contextlib.suppress(OSError):
    os.write(to, ("\r\x1b[2K" if terminal else "").encode() + line.encode() + b"\n")
  os._exit(STATUS)


def _watch(reading: int) -> None:
  """Ends the program where its main thread does not get to it, inside of a compilation."""
  while True:
    number = os.read(reading, 1)[0]
    time.sleep(0.3)
    if signal.getsignal(number) is _end:  # and not that of a training, which saves first
      _end(number, None)
