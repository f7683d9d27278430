"""What a person, a log and a program are told while something takes long."""

import json
import os
import pty
import subprocess
import sys

import jax
import pytest

from rfmedsam2_jax.base import progress
from rfmedsam2_jax.base.progress import Lines, Passing, Progress
from rfmedsam2_jax.cli.console import CLEAR, Console


@pytest.fixture
def clock(monkeypatch):
  """A clock that the test turns."""
  now = [1000.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def test_time_left_is_steady_and_does_not_count_a_compilation(clock):
  said = []
  program = jax.jit(lambda x: x)
  work = Progress("slices", said.append, progress.compiling("a test", program, 3, said.append))
  work(0, 10)
  for done, seconds in enumerate([60, 2, 2, 2], 1):
    clock[0] += seconds
    work(done, 10)
  assert said == [
    "compiling a test", "slices: 0/10", "slices: 1/10", "slices: 2/10, 0:16 left",
    "slices: 3/10, 0:14 left", "slices: 4/10, 0:12 left",
  ]
  clock[0] += 1
  said.clear()
  for done in range(3):  # the same work again, now compiled
    work(done, 10)
    clock[0] += 4
  assert said == ["slices: 0/10", "slices: 1/10, 0:36 left", "slices: 2/10, 0:32 left"]


def test_a_compilation_is_said_once_for_every_program_and_size():
  said = []
  one, other = jax.jit(lambda x: x), jax.jit(lambda x: x)
  asked = [(one, 3), (one, 3), (one, 4), (other, 3), (one, 4)]
  assert [progress.compiling("it", *each, said.append) for each in asked] == [1, 0, 1, 1, 0]
  assert len(said) == 3


def test_work_that_goes_on_is_not_counted_from_its_beginning(clock):
  said = []
  work = Progress("step", said.append)
  work(90, 100)
  clock[0] += 5
  work(91, 100)
  assert said[-1] == "step: 91/100, 0:45 left"


def test_a_log_gets_few_passing_lines_and_all_others(clock):
  said = []
  lines = Lines(said.append)
  for second in range(3600):
    lines(Passing(f"{second}"))
    clock[0] += 1
  assert 50 < len(said) < 150
  assert said[:3] == ["3", "6", "9"]
  lines("done")
  assert said[-1] == "done"


SCRIPT = """
import sys
from rfmedsam2_jax.cli.console import Console
from rfmedsam2_jax.base.progress import Passing
console = Console({options})
console.line("reading")
console.line(Passing("slices: 1/9" + "." * 500))
console.line(Passing("slices: 2/9"))
console.warning("odd")
console.detail("half")
console.result("all", {{"all": 1}})
"""


def said_by(options: str, terminal: bool) -> tuple[str, str]:
  """Standard output, and the standard error of a terminal or of a pipe."""
  command = [sys.executable, "-c", SCRIPT.format(options=options)]
  if not terminal:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr
  ours, theirs = pty.openpty()
  done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True)
  os.close(theirs)
  shown = os.read(ours, 65536).decode().replace("\r\n", "\n")
  os.close(ours)
  return done.stdout, shown


def test_a_terminal_has_one_line_that_is_rewritten():
  out, shown = said_by("", terminal=True)
  assert out == "half\nall\n"
  first, _, rest = shown.partition("\n")
  assert first.endswith("] reading")
  passing = rest.split(CLEAR)
  assert passing[1].startswith("slices: 1/9") and len(passing[1]) < 200  # does not wrap
  assert passing[2:] == ["slices: 2/9", "rfmedsam2: warning: odd\n"]


def test_a_log_has_whole_lines():
  out, error = said_by("", terminal=False)
  assert out == "half\nall\n"
  assert error.splitlines()[0].endswith("] reading")
  assert error.splitlines()[1:] == ["rfmedsam2: warning: odd"]
  assert "\r" not in error


def test_quiet_leaves_the_result_and_warnings():
  assert said_by("quiet=True", terminal=False) == ("all\n", "rfmedsam2: warning: odd\n")


def test_json_is_nothing_but_json(capsys):
  out, error = said_by("as_json=True", terminal=False)
  assert not error
  said = [json.loads(line) for line in out.splitlines()]
  assert [sorted(line)[0] for line in said] == ["progress", "warning", "detail", "result"]
  Console(as_json=True).error("no", 2)
  captured = capsys.readouterr()
  assert json.loads(captured.out) == {"error": "no", "status": 2} and not captured.err
