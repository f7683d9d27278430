"""Who may write to the folder of a run: one process at a time."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.run_folder import RunFolder

LOCK = ".lock"


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
