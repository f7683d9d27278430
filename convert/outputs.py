"""What may be written to: looked at before anything that takes long."""

import os
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError


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
