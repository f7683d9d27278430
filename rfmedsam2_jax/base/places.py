"""Where files may lie: on this machine. An address such as gs://bucket is none of its folders.

For a checkpoint the word `builtin` may stand, which is no place: the weights of the package; for it
and for a run also the name of what is kept (base.kept)."""

import re
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.kept import is_name

# `Path` makes one slash of two, and none at the end. One letter before the colon is a drive of
# Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/+(.*)|$)", re.DOTALL)


BUILTIN = "builtin"  # as text; a `Path` of this name is a path, and so is the text ./builtin


def word_or_path(text: str) -> str | Path:
  """A checkpoint or a run as a person types it: `builtin` and names as text, else a path.

  A name under which a file or folder lies is that path; `builtin` is always the word.
  """
  named = text == BUILTIN or (is_name(text) and not Path(text).exists())
  return text if named else Path(text)


def check_place(path: str | Path) -> None:
  """UserError for an address, `scheme://...`, of which writing would make a folder of that name."""
  if found := _ADDRESS.match(str(path)):
    raise UserError(f"{found[1]}://{found[2] or ''}: is an address, and only files and folders of "
                    "this machine are opened; copy or mount it and give its path")
