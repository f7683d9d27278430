"""The inputs of a prediction: files and folders that a person names become cases."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rfmedsam2_jax.base.buckets import staged
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.layouts import Case, check_unique
from rfmedsam2_jax.data.names import (
  ENDINGS,
  IMAGE_ENDINGS,
  LeftOut,
  ending_of,
  is_series_folder,
  is_volume_name,
  label_maps_by_name,
  listed,
  stem_of,
)
from rfmedsam2_jax.data.volumes import not_a_volume


def find_inputs(
  paths: Sequence[str | Path], channels: int = 1,
  leave_out: Callable[[LeftOut], None] = lambda what: None, studies: bool = False,
) -> list[Case]:
  """Finds the cases of a prediction in files and folders.

  `CASE_0000.nii.gz`, `CASE_0001.nii.gz`, ... are the channels of one case (nnU-Net): a name ends in
  a channel's number if that is below `channels`, or if `CASE_0000` lies beside it. Any other name
  is a case of its own: a 3D file, or a 4D file with all channels. A folder with a DICOM series
  counts as a file of the folder's name, and so does a .zip. With `studies` every folder that is
  named is one case, of whose series one is chosen. `leave_out` is told what is not taken of a
  folder.

  UserError: nothing there, a missing channel, one too many, two cases of one name.
  """
  beside = functools.cache(_beside)
  cases: dict[tuple[str, str], Case] = {}  # a channel, or a case, may be met several times
  for file in (file for path in paths for file in _files(staged(path), leave_out, studies)):
    case = _input_case(file, channels, beside)
    for image in case.images:
      if not image.exists():
        raise UserError(f"{image}: is a link to what does not exist ({os.readlink(image)}); "
                        "mend or remove it")
    cases.setdefault((case.identifier, os.path.realpath(case.images[0])), case)
  if not cases:
    raise UserError("no input given; name volumes or folders")
  check_unique(list(cases.values()))
  return list(cases.values())


def with_labels(cases: Sequence[Case], folder: str | Path) -> list[Case]:
  """The same cases with the label maps `IDENTIFIER` + one of `ENDINGS` of a folder."""
  maps, _ = label_maps_by_name(Path(folder))
  for case in cases:
    if case.identifier not in maps:
      raise UserError(f"{Path(folder) / case.identifier}{ENDINGS[0]}: does not exist; give a "
                      "folder with a label map for every input")
  return [dataclasses.replace(case, label=maps[case.identifier]) for case in cases]


def _files(path: Path, leave_out: Callable[[LeftOut], None], studies: bool) -> Iterator[Path]:
  """The volumes and series that a path stands for, by name."""
  if not path.exists():
    raise UserError(f"{path}: no such file or folder; check the path")
  if not path.is_dir() and ending_of(path).lower() not in IMAGE_ENDINGS:
    raise not_a_volume(path)
  if not path.is_dir() or studies or _is_series(path):
    yield path
    return
  listing = listed(path)
  left_out = listing.left_out()
  found = sorted([*listing.files, *listing.series])
  if not found:
    raise not_a_volume(path, *(what.message for what in left_out))
  for what in left_out:
    leave_out(what)
  yield from found


def _is_series(folder: Path) -> bool:
  try:
    return is_series_folder(folder)
  except OSError:
    return False  # `listed` says why it cannot be read


def _beside(folder: Path) -> dict[str, list[Path]]:
  """Volumes and folders in a folder by their names without endings."""
  found: dict[str, list[Path]] = {}
  for name in sorted(os.listdir(folder)):
    path = folder / name
    if is_volume_name(name):
      found.setdefault(stem_of(path), []).append(path)
    elif os.path.isdir(path):
      found.setdefault(name, []).append(path)
  return found


def _input_case(file: Path, channels: int, beside: Callable[[Path], dict[str, list[Path]]]
                ) -> Case:
  if file.name in ("", ".."):
    file = Path(os.path.abspath(file))  # "." has a name, too
  ending = "" if file.is_dir() else ending_of(file)
  stem = file.name.removesuffix(ending)
  numbered = re.fullmatch(r"(.+)_([0-9]{4})", stem)
  if numbered is None:
    return Case(stem, (file,))
  name, number = numbered[1], int(numbered[2])
  known = beside(file.parent)
  if number >= channels:
    if not (first := known.get(f"{name}_0000")):
      return Case(stem, (file,))
    expected = "one channel is" if channels == 1 else f"{channels} channels are"
    raise UserError(
      f"{file}: is channel {number} of case {name}, as {first[0].name} lies beside it, and "
      f"{expected} expected; move it elsewhere or, if it is a case of its own, rename both "
      f"({name}_0000_0000 and so on)")
  images = []
  for channel in range(channels):
    wanted = f"{name}_{channel:04d}"
    found = [file] if channel == number else known.get(wanted, [])
    found = [p for p in found if ending_of(p).lower() == ending.lower()] or found
    if not found:
      raise UserError(f"{file.with_name(wanted + ending)}: does not exist, but {file.name} is one "
                      f"of {channels} channels of case {name}; add it")
    if len(found) > 1:
      raise UserError(f"{found[1]}: is channel {channel} of case {name}, and so is "
                      f"{found[0].name}; remove one")
    images.append(found[0])
  return Case(name, tuple(images))
