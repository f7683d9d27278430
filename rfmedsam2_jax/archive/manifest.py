"""What lies in a model's archive: `model.json`, which names every other file with its SHA-256."""

import dataclasses
import hashlib
import json
from pathlib import PurePosixPath
from typing import Any

import pydantic

from rfmedsam2_jax.data.files import Stored

FORMAT = 1
NAME = "model.json"
CARD, LICENCE = "README.md", "LICENSE.txt"


@dataclasses.dataclass(frozen=True)
class Entry(Stored):
  """One file of an archive."""

  bytes: int
  sha256: str  #: hexadecimal digits


@dataclasses.dataclass(frozen=True)
class Manifest(Stored):
  """networks: with weights: generator, refiner, tracker. channels, structures: by name, empty for a
  tracker alone. licence: a name or the first line of its text. files: by their paths.
  """

  format: int
  name: str
  networks: tuple[str, ...]
  channels: tuple[str, ...]
  structures: tuple[str, ...]
  licence: str
  files: dict[str, Entry]

  def __post_init__(self):
    if not self.licence.isprintable():  # it is shown on terminals
      raise ValueError("licence is no line of text")
    for name in self.files:
      check_inside(name)


def check_inside(name: str) -> None:
  """ValueError for a path in an archive that could lead out of a folder, or that is hidden."""
  path = PurePosixPath(name)
  plain = name.isprintable() and not {"\\", ":"} & set(name)
  if not plain or path.is_absolute() or str(path) != name or any(
      part.startswith(".") or not part for part in path.parts):
    raise ValueError(f"{name!r} is no plain path below the model's folder")


def entry_of(content: bytes) -> Entry:
  return Entry(len(content), hashlib.sha256(content).hexdigest())


def read_manifest(content: bytes) -> Manifest:
  """What a model.json says; ValueError for another format than this version's, or none."""
  try:
    found = pydantic.TypeAdapter(Manifest).validate_json(content)
  except pydantic.ValidationError as error:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    raise ValueError(f"its {NAME}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
  if found.format != FORMAT:
    raise ValueError(f"its format is {found.format}, this version reads {FORMAT}")
  return found


def json_bytes(value: Any) -> bytes:
  """A JSON file of an archive, of a dataclass or of plain values."""
  plain = pydantic.TypeAdapter(type(value)).dump_python(value, mode="json")
  return (json.dumps(plain, indent=1, ensure_ascii=False) + "\n").encode()
