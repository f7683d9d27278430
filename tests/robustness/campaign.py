"""Damaged and hostile inputs for every command: `python tests/robustness/campaign.py`.

Says of every kind how many cases were refused with one line and how many were read as what the
bytes say (frame.py defines both), as the table of docs/robustness.md. Ends with status 1 and the
list of mistakes if there is one. Needs what the tests need, and Linux.
"""

import argparse
import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cases import KINDS, all_cases
from frame import Case

SECONDS = 60.0  # of the processor that a case may take, its judgement included
WAITING = 300.0  # seconds until a case that computes nothing has hung
MEMORY = 2 << 30  # bytes that the process may grow by


@dataclasses.dataclass(frozen=True)
class End:
  """end: refused, read or wrong. reason: the line, or what is wrong. memory: bytes of growth."""

  case: Case
  end: str
  reason: str
  seconds: float
  memory: int


class Worker:
  """A process that runs cases; killed when one takes too long or too much, then started anew."""

  def __init__(self, place: Path, seed: int):
    self._command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(place),
                     str(seed)]
    self._process: subprocess.Popen | None = None
    self._held = 0

  def run(self, case: Case, number: int) -> End:
    if self._process is None:
      self._start()
    assert self._process is not None and self._process.stdin is not None
    self._process.stdin.write(f"{number}\n".encode())
    self._process.stdin.flush()
    answer, stopped, seconds = self._answer(SECONDS, WAITING)
    if answer is not None:
      return End(case, answer["end"], answer["reason"], answer["seconds"], answer["memory"])
    return End(case, "wrong", stopped, seconds, 0)

  def close(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.wait()
      self._process = None

  def _start(self) -> None:
    self._process = subprocess.Popen(
      self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    answer, stopped, _ = self._answer(300.0, 900.0)
    if answer is None:
      raise RuntimeError(f"the worker did not start: {stopped}")
    self._held = answer["memory"]

  def _answer(self, limit: float, waiting: float) -> tuple[dict | None, str, float]:
    """The next line, or why there is none; and seconds of the processor."""
    process = self._process
    assert process is not None and process.stdout is not None
    began, busy, line = time.monotonic(), _busy(process.pid), b""
    while True:
      seconds = _busy(process.pid) - busy
      if select.select([process.stdout], [], [], 0.1)[0]:
        part = process.stdout.read(65536)
        line += part
        if line.endswith(b"\n"):
          return json.loads(line), "", seconds
        if not part:
          status = process.wait()
          self._process = None
          return None, f"the process died ({_died(status)})", seconds
      elif seconds > limit or time.monotonic() - began > waiting:
        self.close()
        return None, f"hang: no end after {seconds:.0f} s of the processor", seconds
      elif self._held and _resident(process.pid) > self._held + MEMORY:
        self.close()
        return None, f"memory: more than {MEMORY >> 20} MiB", seconds


def _died(status: int) -> str:
  return signal.Signals(-status).name if status < 0 else f"status {status}"


def _busy(pid: int) -> float:
  """Seconds that all threads of a process have computed."""
  try:
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
  except (OSError, IndexError):
    return 0.0


def _resident(pid: int) -> int:
  try:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  except (OSError, IndexError):
    return 0


def run_cases(
  place: Path, seed: int, chosen: Sequence[int], workers: int = 1
) -> Iterator[End]:
  """Runs cases by their numbers in `all_cases()`, in processes side by side."""
  cases, waiting = all_cases(), queue.SimpleQueue[int]()
  for number in chosen:
    waiting.put(number)
  ends: queue.SimpleQueue[End | None] = queue.SimpleQueue()

  def work() -> None:
    worker = Worker(place, seed)
    try:
      while True:
        number = waiting.get_nowait()
        ends.put(worker.run(cases[number], number))
    except queue.Empty:
      pass
    finally:
      worker.close()
      ends.put(None)

  for _ in range(workers):
    threading.Thread(target=work, daemon=True).start()
  finished = 0
  while finished < workers:
    end = ends.get()
    if end is None:
      finished += 1
    else:
      yield end


def quick(share: int) -> list[int]:
  """Numbers of every `share`th case, and of the first one of every kind."""
  seen: dict[str, int] = {}
  numbers = []
  for number, case in enumerate(all_cases()):
    count = seen[case.kind] = seen.get(case.kind, -1) + 1
    if count % share == 0:
      numbers.append(number)
  return numbers


def table(ends: Sequence[End]) -> str:
  """Markdown: a row per kind, and the sum."""
  rows = ["| kind | cases | refused with one line | read as what the bytes say | mistakes | "
          "longest, s | most memory, MiB |", "|---|---|---|---|---|---|---|"]
  for name in [*KINDS, "all"]:
    mine = [end for end in ends if name in (end.case.kind, "all")]
    if mine:
      count = [sum(end.end == what for end in mine) for what in ("refused", "read", "wrong")]
      rows.append(f"| {name} | {len(mine)} | {count[0]} | {count[1]} | {count[2]} | "
                  f"{max(end.seconds for end in mine):.1f} | "
                  f"{max(end.memory for end in mine) / 2**20:.0f} |")
  return "\n".join(rows)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", action="append", metavar="TEXT",
                      help="kinds or cases (KIND/NAME) that hold this text")
  parser.add_argument("--quick", type=int, default=1, metavar="N", help="every Nth case of a kind")
  parser.add_argument("--out", type=Path, help="file for the table")
  parser.add_argument("--stage", type=Path, help="folder for what is damaged; kept and used again")
  parser.add_argument("--workers", type=int, default=1, help="processes side by side (1)")
  parser.add_argument("--verbose", action="store_true", help="print every line that was said")
  options = parser.parse_args()
  cases = all_cases()
  chosen = [n for n in quick(options.quick)
            if not options.only
            or any(t in f"{cases[n].kind}/{cases[n].name}" for t in options.only)]
  with tempfile.TemporaryDirectory() as temporary:
    place = options.stage or Path(temporary)
    place = place.absolute()
    if not (place / "run").is_dir():
      place.mkdir(parents=True, exist_ok=True)
      print(f"making what is to be damaged in {place}", flush=True)
      subprocess.run([sys.executable, str(Path(__file__).with_name("stage.py")), str(place)],
                     check=True, stderr=subprocess.DEVNULL)
    began, ends = time.monotonic(), []
    for end in run_cases(place, options.seed, chosen, options.workers):
      ends.append(end)
      if end.end == "wrong" or options.verbose:
        print(f"{end.end}: {end.case.kind}/{end.case.name}: {end.reason}", flush=True)
  text = table(ends)
  if options.out:
    options.out.write_text(text + "\n")
  wrong = sum(end.end == "wrong" for end in ends)
  print(f"\n{text}\n\n{len(ends)} cases, {wrong} mistakes, {time.monotonic() - began:.0f} s")
  return 1 if wrong else 0


if __name__ == "__main__":
  sys.exit(main())
