"""Where files may lie: on this machine. An address such as gs://bucket is none of its folders.

For a checkpoint the word `builtin` may stand, which is no place: the weights of the package."""

import re
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError

# `Path` makes one slash of two, and none at the end. One letter before the colon is a drive of
# Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/+(.*)|$)", re.DOTALL)


BUILTIN = "builtin"  # as text; a `Path` of this name is a path, and so is the text ./builtin


def word_or_path(text: str) -> str | Path:
  """A checkpoint as a person types it: the word `builtin` as it is, anything else as a path."""
  return text if text == BUILTIN else Path(text)


def check_place(path: str | Path) -> None:
  """UserError for an address, `scheme://...`, of which writing would make a folder of that name."""
  if found := _ADDRESS.match(str(path)):
    raise UserError(f"{found[1]}://{found[2] or ''}: is an address, and only files and folders of "
                    "this machine are opened; copy or mount it and give its path")
