"""A process that runs cases one after the other: numbers come in on standard input, ends go out.

`python worker.py STAGE SEED`. JAX is imported and the networks are compiled once for all cases.
"""

import contextlib
import json
import os
import resource
import shutil
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import stage as staging
from cases import all_cases
from frame import Case, Wrong, judge, snapshot

MORE = 4 << 30  # bytes of address space beyond what the warm process has


def main() -> None:
  answers = os.fdopen(os.dup(1), "w")
  stage, seed = staging.Stage(Path(sys.argv[1])), int(sys.argv[2])
  cases = all_cases()
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(stage.place / "cache")
  with captured(stage.place / f"warm-{os.getpid()}"):
    warm(stage)
  size = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (size + MORE, size + MORE))
  print(json.dumps({"memory": status_bytes("VmRSS")}), file=answers, flush=True)
  for line in sys.stdin:
    print(json.dumps(run(cases[int(line)], seed, stage)), file=answers, flush=True)


def warm(stage) -> None:
  import jax

  from rfmedsam2_jax.cli import main as rfmedsam2

  jax.config.update("jax_disable_most_optimizations", True)
  out = str(stage.place / f"warm-out-{os.getpid()}")
  for arguments in (
    ["predict", str(stage.run), str(stage.scan), "--out", out, "--overwrite"],
    ["track", str(stage.scan), "--checkpoint", str(stage.checkpoint), "--out", out, "--overwrite",
     "--prompts", str(stage.place / "prompts.json")],
  ):
    assert rfmedsam2(arguments) == 0
  # The run that no case damages is loaded once.
  from rfmedsam2_jax import model

  load, whole = model.load, stage.model
  model.load = lambda path: whole if Path(path) == stage.run else load(path)


def run(case: Case, seed: int, stage) -> dict:
  """The end of one case: {"end": refused, read or wrong, "reason", "seconds", "memory"}."""
  folder = stage.place / "cases" / str(os.getpid())
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  os.chdir(folder)
  said = stage.place / f"said-{os.getpid()}"
  seconds, memory = 0.0, 0
  try:
    attempt = case.make(folder, case.rng(seed), stage)
    before = snapshot(attempt.out)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held, began = status_bytes("VmRSS"), time.process_time()
    status, message = call(attempt, said)
    seconds, memory = time.process_time() - began, status_bytes("VmHWM") - held
    error = said.read_text(errors="replace") + message
    return {"end": judge(attempt, status, error, before), "reason": error.strip(),
            "seconds": seconds, "memory": memory}
  except Wrong as wrong:
    return {"end": "wrong", "reason": str(wrong), "seconds": seconds, "memory": memory}
  except Exception:
    return {"end": "wrong", "reason": f"the campaign failed: {traceback.format_exc()}",
            "seconds": seconds, "memory": memory}
  finally:
    os.chdir(stage.place)


def call(attempt, said: Path) -> tuple[int | None, str]:
  """Exit status, and the message of a UserError of the API."""
  from rfmedsam2_jax.base.errors import UserError

  with captured(said):
    try:
      return attempt.call(), ""
    except UserError as error:
      return 2, f"rfmedsam2: {error}"
    except SystemExit as left:
      raise Wrong(f"argparse left with {left.code}") from None
    except BaseException as error:
      where = traceback.extract_tb(error.__traceback__)
      ours = next((f for f in reversed(where) if "rfmedsam2_jax" in f.filename
                   or "/convert/" in f.filename), where[-1])
      raise Wrong(f"crash: {type(error).__name__}: {str(error)[:300]} "
                  f"({Path(ours.filename).name}:{ours.lineno})") from None


@contextlib.contextmanager
def captured(path: Path):
  """Standard error into a file, of C++ libraries too, every warning of Python's every time."""
  sys.stdout.flush(), sys.stderr.flush()
  kept = os.dup(1), os.dup(2)
  said = bytearray()
  # A pipe: what is written to it is no file, whose size a case may limit.
  reading, writing = os.pipe()
  listening = threading.Thread(target=_listen, args=(reading, said))
  listening.start()
  with open(os.devnull, "w") as nothing:
    os.dup2(nothing.fileno(), 1), os.dup2(writing, 2)
    os.close(writing)
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("always")
        for ignored in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
          warnings.simplefilter("ignore", ignored)  # as for a user
        yield
    finally:
      sys.stdout.flush(), sys.stderr.flush()
      os.dup2(kept[0], 1), os.dup2(kept[1], 2)
      os.close(kept[0]), os.close(kept[1])
      listening.join()
      path.write_bytes(said)


def _listen(reading: int, said: bytearray) -> None:
  with open(reading, "rb", buffering=0) as stream:
    while part := stream.read(65536):
      said += part


def status_bytes(name: str) -> int:
  for line in Path("/proc/self/status").read_text("utf-8").splitlines():
    if line.startswith(name + ":"):
      return int(line.split()[1]) << 10
  raise KeyError(name)


if __name__ == "__main__":
  main()
