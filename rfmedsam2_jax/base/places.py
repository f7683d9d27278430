"""Where files may lie: on this machine. An address such as gs://bucket is none of its folders."""

import re
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError

# `Path` makes one slash of two, and none at the end. One letter before the colon is a drive of
# Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/+(.*)|$)", re.DOTALL)


def check_place(path: str | Path) -> None:
  """UserError for an address, `scheme://...`, of which writing would make a folder of that name."""
  if found := _ADDRESS.match(str(path)):
    raise UserError(f"{found[1]}://{found[2] or ''}: is an address, and only files and folders of "
                    "this machine are opened; copy or mount it and give its path")
