"""Writing that is never half done: a temporary name beside the target, renamed at the end."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rfmedsam2_jax import interruption
from rfmedsam2_jax.errors import UserError


def check_target(path: Path, overwrite: bool, is_ours: bool) -> None:
  """Refuses to write over what is there, unless told to and unless it is something else.

  Args:
    is_ours: what lies at `path` is of the kind that would be written.

  Raises:
    UserError: it exists and may not be replaced, or its folder cannot be made or written.
  """
  if path.exists() and not overwrite:
    raise UserError(f"{path}: exists; replace it with --overwrite or choose another name")
  if path.exists() and not is_ours:
    raise UserError(
      f"{path}: was not made by this command, --overwrite leaves it; choose another name"
    )
  there = next(parent for parent in path.absolute().parents if parent.exists())
  if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
    raise UserError(f"{there}: cannot be written into; choose another folder")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """Gives a name that becomes `path` (file or folder) if the block ends without an error.

  It lies in a hidden folder of its own, which takes away whatever a writer left when it failed.
  """
  workshop = path.absolute().with_name(f".{os.getpid()}.{path.name}")
  with interruption.unfinished(workshop):
    workshop.mkdir(parents=True)
    try:
      made = workshop / path.name
      yield made
      interruption.finish()
      if path.is_dir():
        # A folder cannot be renamed over another; the old one goes once the new one is there.
        os.rename(path, workshop / "old")
      os.replace(made, path)
    finally:
      shutil.rmtree(workshop, ignore_errors=True)
