"""Files that one process holds at a time: locks that end with the process however it ends."""

import fcntl
from typing import IO

from rfmedsam2_jax.base.errors import UserError


def hold(file: IO[str], what: object, otherwise: str = "", kind: int = fcntl.LOCK_EX) -> None:
  """Locks an open file until it is closed; UserError that names `what` if another process does.

  otherwise: what else to do than wait, for the error.
  """
  try:
    fcntl.flock(file, kind | fcntl.LOCK_NB)
  except OSError:
    raise UserError(f"{what}: is in use by another process; wait for it{otherwise}") from None
