"""Who may write to the folder of a run: one process at a time."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.locking import hold
from rfmedsam2_jax.base.places import check_place
from rfmedsam2_jax.data.run_folder import RunFolder

LOCK = ".lock"
_OTHERWISE = " or choose another folder"


def check_folder(path: Path, resume: bool, overwrite: bool) -> None:
  """Sees to it that `open_run` will work.

  Raises:
    UserError: another process holds it, it exists and neither says what to do, nothing to resume,
      no place of this machine.
  """
  check_place(path)
  if resume and overwrite:
    raise UserError(f"{path}: either resume it or overwrite it")
  if path.exists() and not path.is_dir():
    raise UserError(f"{path}: is a file; give a folder for the run")
  if (path / LOCK).exists() and os.access(path / LOCK, os.W_OK):
    with open(path / LOCK, "a+") as file:
      # Who only looks does not get in another one's way.
      hold(file, path, _OTHERWISE, fcntl.LOCK_SH)
  exists = (path / "config.yaml").exists()
  if resume and not exists:
    raise UserError(f"{path}: holds no run to resume; check the path, or do not resume it")
  if path.is_dir() and any(child.name != LOCK for child in path.iterdir()):
    if overwrite and not exists:
      raise UserError(f"{path}: is not a run of this program and is not overwritten; choose "
                      "another folder")
    if not (resume or overwrite):
      raise UserError(f"{path}: holds a run; resume it or overwrite it" if exists else
                      f"{path}: is not empty; choose another")


@contextlib.contextmanager
def open_run(path: str | Path, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
  """The run's folder, held by an exclusive lock that ends with the process however it ends.

  Raises:
    UserError: see `check_folder`; or it cannot be written.
  """
  path = Path(path)
  check_folder(path, resume, overwrite)
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / LOCK, "a")  # noqa: SIM115 - held for as long as the run
  except OSError as error:
    raise UserError(
      f"{path}: cannot be written ({error.strerror}); choose another folder") from None
  with lock:
    hold(lock, path, _OTHERWISE)
    if overwrite:
      for child in path.iterdir():
        if child.name != LOCK:
          shutil.rmtree(child) if child.is_dir() else child.unlink()
    yield RunFolder(path)
