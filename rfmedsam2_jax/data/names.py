"""Names of volumes, and what a folder holds: its volumes, and what is left out and why.

One rule for all commands: an ending counts in capitals too, a link has its own name and not that
of its target, and whatever is not taken is said in one line.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data import itk

NIFTI_ENDINGS = (".nii.gz", ".nii")
ENDINGS = (*NIFTI_ENDINGS, *itk.ENDINGS)
ARCHIVE = ".zip"  # of a DICOM series or study
IMAGE_ENDINGS = (*ENDINGS, ARCHIVE)
# Of files of DICOM with a label map. Slices may be named so too, but are never taken one by one.
DICOM_LABEL_ENDINGS = (*itk.DICOM_LABELS, ".dcm")
LABEL_ENDINGS = (*ENDINGS, *DICOM_LABEL_ENDINGS)
_KNOWN = (*IMAGE_ENDINGS, *DICOM_LABEL_ENDINGS)
_NO_VOLUME = "no volume by its name"


def ending_of(path: str | Path) -> str:
  """The ending of an image's or label map's name, capitals or not, as it is spelled; or ""."""
  name = Path(path).name
  length = next((len(e) for e in _KNOWN if name.lower().endswith(e)), 0)
  return name[len(name) - length :]


def own_name(path: str | Path) -> str:
  """The last name of a path, also of "."; that of a link and not of what it leads to."""
  return Path(os.path.abspath(path)).name


def stem_of(path: str | Path) -> str:
  """The name without the ending of a volume, which is the case's."""
  name = own_name(path)
  return name.removesuffix(ending_of(name))


def is_volume_name(path: str | Path) -> bool:
  """Whether the name ends as an image's does (`IMAGE_ENDINGS`) and is not hidden."""
  return _ends(path, IMAGE_ENDINGS)


def is_label_name(path: str | Path) -> bool:
  """Whether the name ends as a label map's does (`LABEL_ENDINGS`) and is not hidden."""
  return _ends(path, LABEL_ENDINGS)


def _ends(path: str | Path, endings: Sequence[str]) -> bool:
  return ending_of(path).lower() in endings and not Path(path).name.startswith(".")


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """What is not taken of a folder, for a person."""

  folder: Path
  message: str

  def __str__(self) -> str:
    return f"{self.folder}: {self.message}"


@dataclasses.dataclass(frozen=True)
class Listing:
  """What lies in a folder; `others` are names that are no volumes, by the reason."""

  folder: Path
  files: Sequence[Path]  #: volumes, by name
  series: Sequence[Path]  #: folders with a DICOM series, by name
  others: dict[str, list[str]]

  def taking(self, objection: Callable[[Path], str]) -> "Listing":
    """Without the files against which there is an objection; they become others."""
    others = {reason: list(names) for reason, names in self.others.items()}
    files = []
    for file in self.files:
      if reason := objection(file):
        others.setdefault(reason, []).append(file.name)
      else:
        files.append(file)
    return dataclasses.replace(self, files=files, others=others)

  def left_out(self, leave: Callable[[str], bool] = lambda name: False) -> list[LeftOut]:
    """One line about the others, or none; `leave` says which names nobody took for a volume."""
    kinds = {reason: kept for reason, names in self.others.items()
             if (kept := [name for name in names if not leave(name)])}
    if not kinds:
      return []
    count = sum(map(len, kinds.values()))
    return [LeftOut(self.folder, f"left out {count}: " + "; ".join(
      f"{some(names)} ({reason})" for reason, names in kinds.items()))]


def some(names: Sequence[Any], shown: int = 3) -> str:
  """The first names of many, and how many more there are."""
  more = f" and {len(names) - shown} more" if len(names) > shown else ""
  return ", ".join(map(str, names[:shown])) + more


def listed(folder: Path, is_volume: Callable[[str | Path], bool] = is_volume_name) -> Listing:
  """The volumes of a folder, by their names, and what else lies in it.

  UserError if there is none, or it cannot be read. A folder in it that cannot be read is one of
  the others.
  """
  files: list[Path] = []
  series: list[Path] = []
  others: dict[str, list[str]] = {}
  for path in _entries(folder):
    if path.name.startswith("."):
      others.setdefault("hidden", []).append(path.name)
    elif os.path.isdir(path):
      try:
        reason = "" if is_series_folder(path) else "a folder, but not of one DICOM series"
      except OSError as error:
        reason = f"a folder that cannot be read: {error.strerror}"
      if reason:
        others.setdefault(reason, []).append(path.name)
      else:
        series.append(path)
    elif is_volume(path):
      files.append(path)
    else:
      others.setdefault(_NO_VOLUME, []).append(path.name)
  if files and _NO_VOLUME in others and itk.is_series(folder):
    others["no volume by its name; a DICOM series needs a folder of its own"] = others.pop(
      _NO_VOLUME)
  return Listing(folder, files, series, others)


def is_series_folder(folder: Path) -> bool:
  """Whether a folder is taken as a DICOM series: it has DICOM files, and no volumes beside them."""
  with os.scandir(folder) as entries:
    if any(_ends(entry.name, ENDINGS) and not entry.is_dir() for entry in entries):
      return False
  return itk.is_series(folder)


def label_maps_by_name(folder: Path) -> tuple[dict[str, Path], Listing]:
  """The label maps of a folder by the case's name; UserError if two have one name."""
  listing = listed(folder, is_label_name)
  return by_name(listing.files), listing


def by_name(files: Sequence[Path]) -> dict[str, Path]:
  """Files by their names without endings; UserError if two have one name."""
  found: dict[str, Path] = {}
  for file in files:
    name = stem_of(file)
    if found.setdefault(name, file) != file:
      raise UserError(f"{file}: is {name}, and so is {found[name].name}; remove one")
  return found


def _entries(folder: Path) -> list[Path]:
  try:
    with os.scandir(folder) as entries:
      return sorted(folder / entry.name for entry in entries)
  except OSError as error:
    raise UserError(f"{folder}: cannot be read ({error.strerror}); give a folder of volumes that "
                    "you may read") from None
