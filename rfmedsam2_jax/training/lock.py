"""Who may write to the folder of a run: one process at a time."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rfmedsam2_jax.base import command
from rfmedsam2_jax.base.addresses import address_of, check_for_orbax, copy_of, shown
from rfmedsam2_jax.base.buckets import large_later, names, outlined, remove
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.leases import held
from rfmedsam2_jax.base.locking import hold
from rfmedsam2_jax.base.progress import Report, silent
from rfmedsam2_jax.base.storage import LEASE
from rfmedsam2_jax.data.run_folder import RunFolder

LOCK = ".lock"
# What Orbax reads where it lies, and what is only added to.
NOT_BROUGHT = r"(.+/)?(checkpoints|params)/|tensorboard/|profile/|pictures/"
_OTHERWISE = " or choose another folder"


def check_folder(place: str | Path, resume: bool, overwrite: bool) -> None:
  """Sees to it that `open_run` will work.

  Raises:
    UserError: another process holds it, it exists and neither says what to do, nothing to resume,
      no place that a run can lie in.
  """
  path = copy_of(place, "written")
  if resume and overwrite:
    raise UserError(f"{path}: either resume it or overwrite it")
  check_for_orbax(path)
  if address_of(path) is None:
    _check_disk(path)
  there = names(path) - {LOCK, LEASE}
  exists = "config.yaml" in there
  if resume and not exists:
    raise UserError(f"{path}: holds no run to resume; check the path, or do not resume it")
  if there:
    if overwrite and not exists:
      raise UserError(f"{path}: is not a run of this program and is not overwritten; choose "
                      "another folder")
    if not (resume or overwrite):
      raise UserError(f"{path}: holds a run; resume it or overwrite it" if exists else
                      f"{path}: is not empty; choose another")


def _check_disk(path: Path) -> None:
  if path.exists() and not path.is_dir():
    raise UserError(f"{path}: is a file; give a folder for the run")
  if (path / LOCK).exists() and os.access(path / LOCK, os.W_OK):
    with open(path / LOCK, "a+") as file:
      # Who only looks does not get in another one's way.
      hold(file, path, _OTHERWISE, fcntl.LOCK_SH)


@contextlib.contextmanager
def open_run(
  place: str | Path, resume: bool, overwrite: bool, report: Report = silent
) -> Iterator[RunFolder]:
  """The run's folder, held by a lock that ends with the process however it ends.

  In a bucket that is a lease, and the folder the copy that this machine works in.

  Raises:
    UserError: see `check_folder`; or it cannot be written.
  """
  run = RunFolder(place)
  check_folder(run.path, resume, overwrite)
  with _leased(run, report) if address_of(run.path) else _locked(run.path):
    if overwrite:
      for name in names(run.path) - {LOCK, LEASE}:
        remove(run.path / name)
    bring_run(run.path)
    yield run


def bring_run(path: Path) -> None:
  """Brings the copy of a run that is trained in a bucket up to date.

  Of prepared cases and prompts the arrays come when they are read.
  """
  outlined(path, "written", lambda name, size: name.endswith(".npy") or large_later(name, size),
           NOT_BROUGHT)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / LOCK, "a")  # noqa: SIM115 - held for as long as the run
  except OSError as error:
    raise UserError(
      f"{path}: cannot be written ({error.strerror}); choose another folder") from None
  with lock:
    hold(lock, path, _OTHERWISE)
    yield


@contextlib.contextmanager
def _leased(run: RunFolder, report: Report) -> Iterator[None]:
  def lost(line: str) -> None:
    run.lost = f"{line}; this process ends, the other one goes on"
    if command.running():  # at once: the main thread may be in a step, or save next
      print(f"rfmedsam2: {shown(run.lost)}", file=sys.stderr, flush=True)
      os._exit(2)

  with held(str(address_of(run.path)), report, lost):
    yield
