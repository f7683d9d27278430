"""Small files of a run: strict JSON of frozen dataclasses, and writing that is never half done."""

import contextlib
import hashlib
import json
import os
import re
import reprlib
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from rfmedsam2_jax.base import buckets, interruption
from rfmedsam2_jax.base.addresses import copy_of, is_copy
from rfmedsam2_jax.base.errors import UserError, first_line

# Of archives that are damaged, locked, or packed in a way that zipfile does not know.
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError)

T = TypeVar("T")


class Stored:
  """A dataclass that is stored as JSON: an unknown key is an error."""

  __pydantic_config__ = pydantic.ConfigDict(extra="forbid")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
  """Gives a temporary name beside `path` that becomes `path` if the block ends without an error.

  The name is hidden and keeps the ending, by which writers choose the format. What will be the copy
  of a bucket's file is uploaded first.
  """
  path = copy_of(path, "written")
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{os.getpid()}.{path.name}")
  with interruption.unfinished(temporary):
    try:
      yield temporary
      buckets.upload(temporary, path)
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_whole(path: str | Path) -> Iterator[Path]:
  """As `replacing`, of a file or a folder; what lies at `path` is replaced, whatever it is.

  The name lies in a hidden folder of its own, which goes with what a writer left when it failed.
  """
  # Absolute, as also of "." there is a name and a folder beside.
  path = Path(os.path.abspath(copy_of(path, "written")))
  workshop = path.with_name(f".{os.getpid()}.{path.name}")
  with interruption.unfinished(workshop):
    shutil.rmtree(workshop, ignore_errors=True)  # of a process that was killed
    workshop.mkdir(parents=True)
    made, old = workshop / path.name, workshop / f"{path.name}.old"
    try:
      yield made
      interruption.finish()
      buckets.upload(made, path)
      if path.is_dir():
        # A folder cannot be renamed over another; the old one goes once the new one is there.
        os.replace(path, old)
      os.replace(made, path)
    finally:
      if old.exists() and not path.exists():
        os.replace(old, path)
      shutil.rmtree(workshop, ignore_errors=True)


class ResultExists(UserError):
  """A result, `path`, exists and may not be replaced."""

  def __init__(self, path: Path):
    super().__init__(f"{path}: exists already; choose another folder, or let it be overwritten")
    self.path = path


def claim(folder: str | Path, targets: Sequence[Path], overwrite: bool) -> None:
  """Makes a folder of results, or UserError; ResultExists if one of `targets` must not go."""
  if not is_copy(folder, "written"):
    buckets.outlined(folder, "written")  # if it is an address
  there = [target for target in targets if copy_of(target, "written").exists()]
  if there and not overwrite:
    raise ResultExists(there[0])
  try:
    copy_of(folder, "written").mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from None


def read_json(path: str | Path) -> Any:
  """The content of a JSON file; UserError if it is missing or not JSON."""
  try:
    return json.loads(buckets.fetched(path).read_text(encoding="utf-8"), object_pairs_hook=_object)
  except FileNotFoundError:
    raise UserError(f"{path}: does not exist; check the path") from None
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path}: is not readable JSON ({first_line(error, 120)}); correct the file"
                    ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
  return found


def whole(path: Path, what: str, value: Any) -> int:
  """A whole number of JSON, which some write as 2.0 or "2"; UserError for any other value."""
  if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value):
    value = int(value)
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if type(value) is not int:
    raise UserError(f"{path}: {what} is {reprlib.repr(value)}; give a whole number")
  return value


def sha256_of(path: str | Path) -> str:
  """SHA-256 of a file, as hexadecimal digits."""
  with open(path, "rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def save_json(path: str | Path, value: Any) -> None:
  """Writes a dataclass (or what consists of them) as JSON."""
  text = pydantic.TypeAdapter(type(value)).dump_json(value, indent=1)
  with replacing(path) as temporary:
    temporary.write_bytes(text + b"\n")


def load_json(path: str | Path, kind: type[T]) -> T:
  """Reads what `save_json` wrote; UserError for unknown or missing keys and wrong types."""
  try:
    return pydantic.TypeAdapter(kind).validate_python(read_json(path))
  except pydantic.ValidationError as error:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    raise UserError(f"{path}: {where}: {first['msg']}; it was not written by this version, make it "
                    f"anew") from None
