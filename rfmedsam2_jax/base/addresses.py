"""Addresses of buckets, gs://bucket/path and s3://bucket/path, and where their copies lie.

What a command reads or writes in a bucket has a copy on this machine, whose path says the address:
all else of the program sees paths. `base.buckets` moves what is in them.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Literal

from rfmedsam2_jax.base.errors import UserError

SCHEMES = ("gs", "s3")
ENVIRONMENT = "RFMEDSAM2_BUCKETS"  # moves the folder of the copies
# What is read, and what is written. They are apart, so that reading a run does not change the copy
# that is being trained in.
Shelf = Literal["read", "written"]

# `Path` makes one slash of two, and none at the end. One letter before the colon is a drive of
# Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/+(.*)|$)", re.DOTALL)


def address_of(place: str | Path) -> str | None:
  """The address that a text or a `Path` made of it is, or whose copy lies at a path; else None.

  UserError for one that is not supported, of which writing would make a folder of that name.
  """
  if found := _ADDRESS.match(str(place)):
    scheme, rest = found[1], (found[2] or "").rstrip("/")
    if scheme not in SCHEMES:
      raise UserError(f"{scheme}://{found[2] or ''}: is an address that cannot be opened; copy or "
                      "mount what is there, or put it into a bucket, gs:// or s3://")
    bucket, *parts = rest.split("/")
    if not bucket or not {"", ".", ".."}.isdisjoint(parts):
      raise UserError(f"{scheme}://{found[2] or ''}: is no address in a bucket; give {scheme}://"
                      "BUCKET/PATH")
    return f"{scheme}://{rest}"
  path = Path(os.path.abspath(place))
  if not path.is_relative_to(root()):
    return None
  shelf, scheme, *names = (*path.relative_to(root()).parts, "", "")
  names = [name for name in names if name]
  known = shelf in ("read", "written") and scheme in SCHEMES and names
  return f"{scheme}://{'/'.join(names)}" if known else None


def copy_of(place: str | Path, shelf: Shelf) -> Path:
  """Where the copy of an address lies, which need not exist; any path as it is, a copy's too."""
  if _ADDRESS.match(str(place)) is None:
    return Path(place)
  scheme, _, rest = str(address_of(place)).partition("://")
  return root() / shelf / scheme / rest


def check_for_orbax(place: str | Path) -> None:
  """UserError for an address to which Orbax writes no checkpoints: it knows gs:// and disks."""
  if (address := address_of(place)) and not address.startswith("gs://"):
    raise UserError(f"{address}: checkpoints are written by Orbax, to gs:// and to disks only; "
                    "choose another folder")


def is_copy(place: str | Path, shelf: Shelf) -> bool:
  """Whether a path is of a copy on this shelf."""
  named = _ADDRESS.match(str(place)) is not None
  return not named and Path(os.path.abspath(place)).is_relative_to(root() / shelf)


def check_place(place: str | Path) -> None:
  """UserError for an address that is not supported."""
  address_of(place)


def unique(place: str | Path) -> PurePosixPath:
  """A path that two names of one place have in common: of the address, or on this machine."""
  address = address_of(place)
  return PurePosixPath(address or Path(place).absolute().as_posix())


def root() -> Path:
  """The folder of all copies, which need not exist; it can be removed while no command runs."""
  if given := os.environ.get(ENVIRONMENT):
    return Path(os.path.abspath(Path(given).expanduser()))
  cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  return Path(os.path.abspath(cache)) / "rfmedsam2_jax" / "buckets"


def shown(text: str) -> str:
  """A line that says the addresses in place of the copies' paths."""
  folder = str(root())
  if folder not in text:
    return text
  return re.sub(rf"{re.escape(folder)}/(?:read|written)/({'|'.join(SCHEMES)})/", r"\1://", text)
