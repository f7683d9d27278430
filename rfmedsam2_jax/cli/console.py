"""What a command says, and to whom: a person at a terminal, a log, or a program."""

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rfmedsam2_jax.base import interruption
from rfmedsam2_jax.base.addresses import shown
from rfmedsam2_jax.base.errors import UserError, printable
from rfmedsam2_jax.base.progress import Lines, Passing

CLEAR = "\r\x1b[2K"  # the line that the terminal's cursor is on


class Console:
  """Progress and the result of one command: the result on standard output, all else on the other.

  Args:
    quiet: leave out progress and details.
    as_json: every line, on standard output, is a JSON object with one of the keys "progress",
      "detail", "warning", "result" and "error"; the last one has "result" or "error".
    name: of the program, before warnings and errors.
  """

  def __init__(self, quiet: bool = False, as_json: bool = False, name: str = "rfmedsam2"):
    self._quiet, self._json, self._name = quiet, as_json, name
    self._terminal = not as_json and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    self._passing = False  # whether the terminal's last line is to be rewritten
    self._lines = Lines(self._timed)

  def line(self, text: str) -> None:
    """Progress. On a terminal a line that is `Passing` is rewritten by the next one."""
    if self._quiet:
      return
    if self._terminal and isinstance(text, Passing):
      width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
      print(f"{CLEAR}{printable(shown(text))[: width - 1]}", end="", file=sys.stderr, flush=True)
      self._passing = True
    else:
      self._lines(text)

  def detail(self, text: str) -> None:
    """Part of the result that is known before its end."""
    if not self._quiet:
      self._say(text, {"detail": text})

  def result(self, text: str, values: dict[str, Any]) -> None:
    """What the command was for: `text` for a person, `values` for a program."""
    self._say(text, {"result": values})

  def warning(self, text: str) -> None:
    """What a person should know before trusting the result; said under --quiet too."""
    self._say(f"{self._name}: warning: {printable(text)}", {"warning": text}, sys.stderr)

  def error(self, message: str, status: int) -> None:
    """Why the command did not do it."""
    values = {"error": message, "status": status}
    self._say(f"{self._name}: {printable(message)}", values, sys.stderr)

  def on_interruption(self, message: str) -> None:
    """What is said if a signal ends the program."""
    values = json.dumps({"error": message, "status": interruption.STATUS})
    line = values if self._json else f"{self._name}: {printable(message)}"
    interruption.say(line, 1 if self._json else 2)

  def _timed(self, text: str) -> None:
    now, text = time.strftime("%H:%M:%S"), printable(text)
    self._say(f"[{now}] {text}", {"progress": text, "time": now}, sys.stderr)

  def _say(self, text: str, values: dict[str, Any], stream: Any = None) -> None:
    """A line for a person, or the same for a program."""
    if self._passing:
      print(CLEAR, end="", file=sys.stderr, flush=True)
      self._passing = False
    if self._json:
      text, stream = json.dumps(values, default=str), None
    # Names of files may hold bytes that are no text.
    said = shown(text).encode(errors="backslashreplace").decode()
    print(said, file=stream or sys.stdout, flush=True)


def place_line(error: OSError, unnamed: str) -> str:
  """The line about a file that cannot be read or written; raises what is no such error."""
  if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
    raise error
  # A full disk names no file.
  return f"{error.filename or unnamed}: {error.strerror}; free it or choose another place"


def exists(path: Path) -> UserError:
  """The error about a result that is there already."""
  return UserError(f"{path}: exists already; choose another --out or replace it: --overwrite")


@contextlib.contextmanager
def named_options() -> Iterator[None]:
  """Names the options that help where a result exists already."""
  from rfmedsam2_jax.data.files import ResultExists
  try:
    yield
  except ResultExists as error:
    raise exists(error.path) from None
