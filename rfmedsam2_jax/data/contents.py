"""What a run's cases hold, so that it is resumed with the data it began with, wherever that lies.

cases.json has a digest of each case's files, and the channels and labels of dataset.json. What the
file system says has not changed since it was read is not read again.
"""

import dataclasses
import hashlib
import time
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data import itk
from rfmedsam2_jax.data.datasets import Dataset, Labels, fetch_case
from rfmedsam2_jax.data.files import Stored
from rfmedsam2_jax.data.layouts import Case
from rfmedsam2_jax.data.names import ending_of
from rfmedsam2_jax.data.studies import files_of

_DETACHED = (".nhdr", ".mhd")  # headers that name the file of their voxels
_SETTLED = 2_000_000_000  # ns; a later change could have the same time


@dataclasses.dataclass(frozen=True)
class FileState(Stored):
  """A file when it was read; times in ns, `changed` 0 where it does not tell."""

  path: str
  size: int
  modified: int
  changed: int  #: its data, its name or who may read it


@dataclasses.dataclass(frozen=True)
class CaseContent(Stored):
  """The digest of one case's images and label map, and their files."""

  digest: str
  files: tuple[FileState, ...]


@dataclasses.dataclass(frozen=True)
class Contents(Stored):
  """Of the cases of a run."""

  channels: tuple[str, ...]
  labels: Labels
  cases: dict[str, CaseContent]


def case_content(case: Case, before: CaseContent | None = None) -> CaseContent:
  """What a case holds; its files are read unless they are still as they were `before`."""
  fetch_case(case)
  given = [file for file in (*case.images, case.label) if file is not None]
  # Of a DICOM series every file counts.
  files = [file for one in given for file in (files_of(one, False) if one.is_dir() else [one])]
  states = tuple(map(_state, files))
  if before is not None and before.files == states and all(state.changed for state in states):
    return before
  whole = hashlib.blake2b(digest_size=16)
  for file in files:
    whole.update(_digest(file))
  return CaseContent(whole.hexdigest(), states)


def check_description(
  dataset: Dataset, channels: tuple[str, ...], labels: Labels, source: str | Path
) -> None:
  """UserError unless channels and labels are those with which a run was made; `source`: the set."""
  advice = "put it back as it was, or train into another folder"
  if dataset.channels != channels:
    raise UserError(f"{source}: has the channels {', '.join(dataset.channels)}, the run was made "
                    f"with {', '.join(channels)}; {advice}")
  if dataset.labels != labels:
    now, then = _described(dataset.labels), _described(labels)
    what = next(name for name in now | then if now.get(name) != then.get(name))
    raise UserError(f"{source}: has {what} {now.get(what, 'none')}, the run was made with "
                    f"{then.get(what, 'none')}; {advice}")


def check_case(case: Case, now: CaseContent, before: CaseContent | None) -> None:
  """UserError unless a case holds what it held before."""
  if before is not None and now.digest != before.digest:
    raise UserError(f"{case.images[0]}: case {case.identifier} holds something else than when the "
                    "run was made (its images or its label map); put it back as it was, or train "
                    "into another folder")


def _described(labels: Labels) -> dict[str, str]:
  """Labels as a person reads them, by what is said."""
  values = {f"label {structure.name}:": ", ".join(map(str, structure.values))
            for structure in labels.structures}
  others = ", ".join(map(str, labels.others))
  return values | {
    "ignore label": "none" if labels.ignore is None else str(labels.ignore),
    "labels in the order": ", ".join(labels.names),
    "regions_class_order": ", ".join(map(str, labels.output_values)),
    "regions:": str(labels.regions), "values of no structure:": others or "none"}


def _state(file: Path) -> FileState:
  found = file.stat()
  tells = (ending_of(file).lower() not in _DETACHED
           and time.time_ns() - max(found.st_ctime_ns, found.st_mtime_ns) > _SETTLED)
  return FileState(str(file.absolute()), found.st_size, found.st_mtime_ns,
                   found.st_ctime_ns if tells else 0)


def _digest(file: Path) -> bytes:
  if ending_of(file).lower() in _DETACHED:
    native, affine = itk.read_file(file)
    return hashlib.blake2b(native.tobytes() + affine.tobytes(), digest_size=16).digest()
  with open(file, "rb") as stream:
    return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest()
