"""What a command says, and to whom: a person at a terminal, a log, or a program."""

import json
import sys
import time
from typing import Any


class Console:
  """Lines of progress and the result of one command.

  Args:
    quiet: leave out the lines of progress.
    as_json: every line is a JSON object with one of the keys "progress", "warning", "result" and
      "error".
  """

  def __init__(self, quiet: bool = False, as_json: bool = False):
    self._quiet, self._json = quiet, as_json

  def line(self, text: str) -> None:
    """A line of progress, with the time of day."""
    if self._quiet:
      return
    now = time.strftime("%H:%M:%S")
    self._print({"progress": text, "time": now} if self._json else f"[{now}] {text}")

  def result(self, text: str, values: dict[str, Any]) -> None:
    """What the command was for: `text` for a person, `values` for a program."""
    self._print({"result": values} if self._json else text)

  def warning(self, text: str) -> None:
    """What a person should know before trusting the result; said under --quiet too."""
    if self._json:
      self._print({"warning": text})
    else:
      print(f"rfmedsam2: warning: {text}", file=sys.stderr)

  def error(self, message: str, status: int) -> None:
    """Why the command did not do it, on standard error; to a program on standard output too."""
    if self._json:
      self._print({"error": message, "status": status})
    print(f"rfmedsam2: {message}", file=sys.stderr)

  def _print(self, content: str | dict[str, Any]) -> None:
    print(content if isinstance(content, str) else json.dumps(content, default=str), flush=True)
