"""Studies of DICOM: series that lie together, in a folder of folders or in a .zip; one is chosen.

In: a path and what a person said of the series. Out: a folder to read from, its files, the choice.
"""

import contextlib
import dataclasses
import itertools
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.data.files import DAMAGED_ZIP
from rfmedsam2_jax.data.itk import is_dicomdir
from rfmedsam2_jax.data.names import some

_LISTED = 8  # series in a line
# By the names of channels, as data sets have them.
_MODALITIES = {"ct": "CT", "mr": "MR", "mri": "MR", "t1": "MR", "t1w": "MR", "t2": "MR",
               "t2w": "MR", "flair": "MR", "pet": "PT", "pt": "PT"}
SEARCHED = 1000  # folders that are looked into
_LARGEST = 16 * 2**30  # bytes that an archive may hold


@dataclasses.dataclass(frozen=True)
class Series:
  """What the headers of a series' images say of it; "" for what they do not say."""

  uid: str
  number: str
  description: str
  modality: str
  files: tuple[Path, ...]

  def __str__(self) -> str:
    said = [f"'{self.description}'" if self.description else "", self.modality or "no modality",
            f"{len(self.files)} file{'s' * (len(self.files) != 1)}", self.uid]
    return " ".join([self.number or "without a number", "(" + ", ".join(filter(None, said)) + ")"])


def modality_of(channels: Sequence[str]) -> str | None:
  """DICOM's modality of images with one channel, by its name; None where that does not tell."""
  return _MODALITIES.get(channels[0].strip().casefold()) if len(channels) == 1 else None


def files_of(folder: Path, below: bool) -> list[Path]:
  """The files of a folder by name, and those of the folders `below` it; not what is hidden."""
  if not below:
    return sorted(path for path in folder.iterdir() if _counts(path.name) and path.is_file())
  found: list[Path] = []
  for place, folders, files in itertools.islice(os.walk(folder), SEARCHED):
    folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
    found += [Path(place, name) for name in sorted(files) if _counts(name)]
  return found


def _counts(name: str) -> bool:
  return not name.startswith(".") and not is_dicomdir(name)


def chosen(
  path: Path, headers: Mapping[Path, Any], asked: str | None, modality: str | None,
  advice: str = "",
) -> tuple[Series, str]:
  """The one series among the images of `path` that is meant, and a sentence if that was a choice.

  Args:
    headers: of the images, by file.
    asked: the series' UID, number, description (or a part of it that no other has) or modality.
    modality: what decides where nothing was asked for and one series alone has it.
    advice: what else a person can do.

  Raises:
    UserError: several series or none are meant; it lists them.
  """
  every = _by_uid(headers)
  if asked is not None:
    found = _asked(every, asked.strip())
    if len(found) == 1:
      return found[0], ""
    what = f"{len(found)} series" if found else "no series"
    raise UserError(f"{path}: has {what} that '{asked}' names; it has "
                    f"{some(every, _LISTED)}")
  if len(every) == 1:
    return every[0], ""
  alike = [one for one in every if modality and one.modality == modality]
  if len(alike) == 1:
    return alike[0], f"of {len(every)} series the one of {modality} is taken, {alike[0]}"
  raise UserError(f"{path}: has {len(every)} series, {some(every, _LISTED)}; choose one "
                  f"(series) by its number, UID, description or modality{advice}")


def _by_uid(headers: Mapping[Path, Any]) -> list[Series]:
  grouped: dict[str, list[Path]] = {}
  for path, header in headers.items():
    grouped.setdefault(str(header.get("SeriesInstanceUID")), []).append(path)
  found = []
  for uid, files in grouped.items():
    number, description, modality = (
      " ".join(str(headers[files[0]].get(name) or "").split())
      for name in ("SeriesNumber", "SeriesDescription", "Modality"))
    found.append(Series(uid, number, description, modality, tuple(files)))
  return sorted(found, key=lambda one: (len(one.number), one.number, one.uid))


def _asked(every: Sequence[Series], asked: str) -> list[Series]:
  """The series that a text names, by the first rule that finds some."""
  plain = asked.casefold()
  rules: tuple[Callable[[Series], bool], ...] = (
    lambda one: one.uid == asked,
    lambda one: one.number == asked,
    lambda one: one.description.casefold() == plain,
    lambda one: one.modality.casefold() == plain,
    lambda one: bool(plain) and plain in one.description.casefold())
  return next((found for rule in rules if (found := [one for one in every if rule(one)])), [])


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
  """The folder itself, or a temporary one with what an archive holds, which errors do not name.

  UserError for an archive that is damaged, locked, or holds more than 16 GiB.
  """
  if path.is_dir():
    yield path
    return
  with tempfile.TemporaryDirectory(prefix="rfmedsam2-") as place:
    try:
      with zipfile.ZipFile(path) as archive:
        _extract(path, archive, Path(place))
    except (*DAMAGED_ZIP, OSError) as error:
      raise UserError(f"{path}: cannot be read as a .zip ({first_line(error, 120)}); copy or pack "
                      "it again, without a password") from None
    try:
      yield Path(place)
    except UserError as error:
      raise UserError(str(error).replace(place, str(path))) from None


def claimed_bytes(path: Path) -> int:
  """What an archive says that its files have when they are unpacked; 0 if it cannot be read."""
  try:
    with zipfile.ZipFile(path) as archive:
      return sum(one.file_size for one in archive.infolist())
  except (*DAMAGED_ZIP, OSError):
    return 0


def _extract(path: Path, archive: zipfile.ZipFile, place: Path) -> None:
  members = [one for one in archive.infolist() if not one.is_dir()]
  size = sum(one.file_size for one in members)
  if size > _LARGEST:
    raise UserError(f"{path}: holds {size} bytes, more than {_LARGEST}; unpack it and give its "
                    "folder")
  for one in members:  # names that lead elsewhere are made harmless by zipfile
    if not any(part.startswith((".", "__MACOSX")) for part in one.filename.split("/")):
      archive.extract(one, place)
