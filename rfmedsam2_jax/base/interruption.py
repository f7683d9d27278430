"""Ctrl-C, SIGTERM and a closed terminal end a command at once: one line, nothing half-written.

Not as exceptions: in an import or a callback of JAX they would be lost, and nothing arrives while
XLA compiles, for minutes. Unless a program `install`s it, the other functions do nothing.
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
_program: "_Program | None" = None


class _Program:
  """The program that ends when a signal comes; what it forks has an end of its own."""

  def __init__(self):
    self.process = os.getpid()
    self.unfinished: set[Path] = set()
    self.lock = threading.RLock()
    self.said = 2, "interrupted"  # file descriptor and line

  def end(self, number: int, frame: FrameType | None) -> None:
    if os.getpid() != self.process:
      os._exit(STATUS)
    self.lock.acquire()  # and never given back: nothing is begun any more
    for path in self.unfinished:
      if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
      else:
        path.unlink(missing_ok=True)
    if "multiprocessing" in sys.modules:
      import multiprocessing
      for child in multiprocessing.active_children():
        child.kill()
    to, line = self.said
    clear = "\r\x1b[2K" if to == 2 and os.isatty(2) else ""
    # Not by print: what was being printed when the signal came holds its lock.
    with contextlib.suppress(OSError):
      os.write(to, f"{clear}{line}\n".encode())
    os._exit(STATUS)

  def watch(self, reading: int) -> None:
    """Ends the program where its main thread does not get to it, inside of a compilation."""
    while True:
      number = os.read(reading, 1)[0]
      time.sleep(0.3)
      if signal.getsignal(number) == self.end:  # and not that of a training, which saves first
        self.end(number, None)


def install() -> None:
  """Takes the signals, except those that are ignored; for the main thread of a program."""
  global _program
  _program = _Program()
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  for number in SIGNALS:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, _program.end)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
  threading.Thread(target=_program.watch, args=(reading,), daemon=True, name="interruption").start()


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
  """A file or folder that goes if the program is ended within the block."""
  program = _program or _Program()  # of a library: one that no signal ends
  with program.lock:
    program.unfinished.add(path)
  try:
    yield
  finally:
    with program.lock:
      program.unfinished.discard(path)


def say(line: str, to: int) -> None:
  """What is said at the end, and the file descriptor."""
  if _program:
    _program.said = to, line


def finish() -> None:
  """The work is as good as done: from here on nothing interrupts it."""
  for number in SIGNALS:
    if _program and signal.getsignal(number) == _program.end:
      signal.signal(number, signal.SIG_IGN)
