"""The folder of a run: who may write to it, and what lies where.

config.yaml, dataset facts (splits.json, fingerprint.json, plan.json), versions.json,
log.jsonl, preprocessed/, prompts/, generator/ and refiner/ (checkpoints and final params), where
it is trained apart mask_adapter/, validation.json.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rfmedsam2_jax.data.files import replacing
from rfmedsam2_jax.errors import UserError

LOCK = ".lock"


class RunFolder:
  """Paths of a run, and its log.

  Args:
    writes: whether this process writes; where there are several, one does.
  """

  def __init__(self, path: str | Path, writes: bool = True):
    self.path = Path(path)
    self.writes = writes

  def __truediv__(self, name: str) -> Path:
    return self.path / name

  @property
  def config(self) -> Path:
    return self.path / "config.yaml"

  def checkpoints(self, phase: str) -> Path:
    return self.path / phase / "checkpoints"

  def params(self, phase: str) -> Path:
    return self.path / phase / "params"

  def write(self, name: str, text: str) -> None:
    if not self.writes:
      return
    with replacing(self.path / name) as temporary:
      temporary.write_text(text, encoding="utf-8")

  def log(self, phase: str, step: int, values: dict[str, Any]) -> None:
    """Appends a line to log.jsonl."""
    if not self.writes:
      return
    line = {"phase": phase, "step": step, "time": round(time.time(), 1)} | values
    with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")

  def forget_after(self, phase: str, step: int) -> None:
    """Drops lines of the log that a resumed phase will write again, and a torn last line."""
    path = self.path / "log.jsonl"
    if not self.writes or not path.exists():
      return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
      try:
        entry = json.loads(line)
      except ValueError:
        continue  # cut off when the run was killed
      if entry["phase"] != phase or entry["step"] <= step:
        kept.append(line + "\n")
    self.write("log.jsonl", "".join(kept))


def versions() -> dict[str, str]:
  """What a run was made with."""
  packages = (
    "rfmedsam2-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"
  )
  machine = f"{platform.system()} {platform.machine()}"
  found = {"python": platform.python_version(), "machine": machine}
  for package in packages:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


@contextlib.contextmanager
def open_run(path: str | Path, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
  """The run's folder, held by an exclusive lock that ends with the process however it ends.

  Raises:
    UserError: it exists and neither `resume` nor `overwrite` says what to do, there is nothing to
      resume, or another process holds it.
  """
  path = Path(path)
  if resume and overwrite:
    raise UserError(f"{path}: --resume and --overwrite exclude each other; give one of them")
  exists = (path / "config.yaml").exists()
  if path.exists() and not path.is_dir():
    raise UserError(f"{path}: is a file; give a folder for the run")
  if resume and not exists:
    raise UserError(f"{path}: holds no run to resume; check the path or leave out --resume")
  filled = path.is_dir() and any(child.name != LOCK for child in path.iterdir())
  if filled and not (resume or overwrite):
    what = "holds a run" if exists else "is not empty"
    hint = "go on with --resume or start anew with --overwrite" if exists else "choose another"
    _refuse_if_locked(path)
    raise UserError(f"{path}: {what}; {hint}")
  if filled and overwrite and not exists:
    raise UserError(
      f"{path}: is not a run of this program, --overwrite leaves it; choose another folder"
    )
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / LOCK, "a")  # noqa: SIM115 - held for as long as the run
  except OSError as error:
    raise UserError(
      f"{path}: cannot be written ({error.strerror}); choose another folder"
    ) from None
  with lock:
    _lock(lock, path)
    if overwrite:
      for child in path.iterdir():
        if child.name != LOCK:
          shutil.rmtree(child) if child.is_dir() else child.unlink()
    yield RunFolder(path)


def _lock(file, path: Path) -> None:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    raise UserError(
      f"{path}: is in use by another process; wait for it or choose another folder"
    ) from None


def _refuse_if_locked(path: Path) -> None:
  lock = path / LOCK
  if lock.exists() and os.access(lock, os.W_OK):
    with open(lock, "a") as file:
      _lock(file, path)
