"""What is kept for this user by name: models that were installed, weights that were fetched.

Both lie in one folder, on shelves: `models/NAME` is like the folder of a run, `weights/NAME` a
checkpoint. A name is a text; a `Path` is always a path, and so is a text under which something
lies.
"""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from rfmedsam2_jax.base.buckets import staged
from rfmedsam2_jax.base.errors import UserError

Shelf = Literal["models", "weights"]
ENVIRONMENT = "RFMEDSAM2_HOME"  # moves the folder
# Also a file's name everywhere, and none that is hidden or could be an option.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def home() -> Path:
  """The folder of this user's models and weights, which need not exist yet."""
  if given := os.environ.get(ENVIRONMENT):
    return Path(given).expanduser().absolute()
  data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
  return Path(data).absolute() / "rfmedsam2_jax"


def shelf(kind: Shelf) -> Path:
  return home() / kind


def names(kind: Shelf) -> list[str]:
  """What is kept of a kind, in alphabetical order."""
  try:
    return sorted(x.name for x in shelf(kind).iterdir() if is_name(x.name) and x.is_dir())
  except OSError:
    return []


def is_name(text: object) -> bool:
  """Whether a text may be the name of something that is kept."""
  return isinstance(text, str) and _NAME.fullmatch(text) is not None


def check_name(text: str, said: str = "") -> None:
  """UserError unless a text may be a name; `said`: where it comes from."""
  if not is_name(text):
    raise UserError(f"{said}{text!r}: is no name of a model; give one of letters, digits, dots, "
                    "dashes and underscores")


def kept(source: str | Path, kind: Shelf) -> Path:
  """Where lies what a person names: at the path if anything is there, else by its name.

  Of an address in a bucket that is the copy, brought up to date.
  What is neither comes back as a path.
  """
  path = staged(source)
  if isinstance(source, str) and is_name(source) and not path.exists():
    found = shelf(kind) / source
    return found if found.is_dir() else path
  return path


def run_at(source: str | Path) -> Path:
  """The folder of a run: a path, or the name of an installed model."""
  return kept(source, "models")


def near(text: object, known: Iterable[str]) -> str | None:
  """The known name that is spelled most like a text, capitals or not; None if none is near."""
  found = difflib.get_close_matches(str(text).lower(), {x.lower(): x for x in known}, 1, 0.5)
  return next((x for x in known if found and x.lower() == found[0]), None)


def nearest(text: object, known: Iterable[str]) -> str:
  """"; the nearest known name is x", for the end of a line; empty for a path, or if none is near.
  """
  found = near(text, known) if is_name(text) else None
  return f"; the nearest known name is {found}" if found else ""


def no_run(source: str | Path) -> UserError:
  """The error about what is neither a run nor an installed model."""
  return UserError(f"{source}: is no run (it has no config.yaml); give a folder made by train, or "
                   f"an installed model{nearest(source, names('models'))}")
