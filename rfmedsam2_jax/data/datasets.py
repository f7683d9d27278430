"""Data set folders in the layouts of the Decathlon and of nnU-Net v2 (raw): cases and their labels.

Also finds the inputs of a prediction. The volumes themselves are read by data.volumes.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.files import Stored, read_json
from rfmedsam2_jax.data.itk import is_series
from rfmedsam2_jax.data.volumes import (
  ENDINGS,
  Volume,
  is_volume_name,
  load_image,
  load_label_map,
  not_a_volume,
)

IGNORED = 255  # the atom of voxels that no loss and no score may see


@dataclasses.dataclass(frozen=True)
class Structure(Stored):
  """What is segmented as one object: an organ, or a region made of several label values."""

  name: str
  values: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Labels(Stored):
  """The meaning of a data set's label values.

  Atoms are the label values in use, numbered from 1 in the order in which the structures name
  them, 0 for background and `IGNORED`. Without regions, structure k is atom k + 1.
  """

  structures: tuple[Structure, ...]  #: in the order of the network's outputs
  regions: bool  #: structures may share values (nnU-Net's regions); then outputs are independent
  #: The value that is written for each; of regions, later ones overwrite (regions_class_order).
  output_values: tuple[int, ...]
  others: tuple[int, ...] = ()  #: values of the data set that are background here
  ignore: int | None = None  #: value of voxels without annotation

  def __post_init__(self):
    values = *self.output_values, *self.atom_values[1:]
    if len(self.output_values) != len(self.structures) or not all(0 < v < 2**31 for v in values):
      raise ValueError("every structure needs values from 1 to 2^31, and one that is written")

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(structure.name for structure in self.structures)

  @property
  def value_names(self) -> dict[int, str]:
    """What each value of a written label map is called, in the structures' order."""
    return dict(zip(self.output_values, self.names, strict=True))

  @property
  def atom_values(self) -> tuple[int, ...]:
    """The label value of each atom; background's 0 first."""
    return (0, *dict.fromkeys(v for structure in self.structures for v in structure.values))

  @functools.cached_property
  def membership(self) -> np.ndarray:
    """bool [A, K]: whether atom a belongs to structure k."""
    return np.array([[value in structure.values for structure in self.structures]
                     for value in self.atom_values])

  def to_atoms(self, labels: np.ndarray, path: str | Path = "label map") -> np.ndarray:
    """uint8 atoms of whole label values, any shape; UserError, with `path`, for unknown values."""
    known = {value: atom for atom, value in enumerate(self.atom_values)}
    known |= dict.fromkeys(self.others, 0)
    if self.ignore is not None:
      known[self.ignore] = IGNORED
    present = np.unique(labels)
    if unknown := [int(value) for value in present if int(value) not in known]:
      raise UserError(f"{path}: labels {', '.join(map(str, unknown[:8]))}"
                      f"{' and more' if len(unknown) > 8 else ''} are not in dataset.json "
                      f"(which has {_ranges(known)}); correct the label map or dataset.json")
    atoms = np.array([known[int(value)] for value in present], np.uint8)
    if present[-1] < 65536:
      table = np.zeros(int(present[-1]) + 1, np.uint8)
      table[present] = atoms
      return table[labels]
    return atoms[np.searchsorted(present, labels)]


@dataclasses.dataclass(frozen=True)
class Case:
  """One case's files; `images` has one file per channel or one for all of them."""

  identifier: str
  images: tuple[Path, ...]
  label: Path | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A training set: channel names as in dataset.json, and cases that all have a label."""

  name: str
  channels: tuple[str, ...]
  labels: Labels
  cases: tuple[Case, ...]


def read_dataset(folder: str | Path, structures: Sequence[str] | None = None) -> Dataset:
  """Reads the description of a data set; UserError for missing or contradictory files and entries.

  `structures` are the names to segment, in this order; all others become background. None: all.
  """
  folder = Path(folder)
  if not folder.is_dir():
    raise UserError(f"{folder}: is not a folder; give a data set folder with dataset.json")
  path = folder / "dataset.json"
  content = read_json(path)
  try:
    if "modality" in content:
      channels = _numbered(content["modality"])
      labels = _labels(path, {str(name): int(v) for v, name in content["labels"].items()}, None)
      cases = [
        Case(_stem(folder / entry["image"]), (folder / entry["image"],), folder / entry["label"])
        for entry in content["training"]]
    elif "channel_names" in content:
      channels = _numbered(content["channel_names"])
      labels = read_labels(content, path)
      cases = _nnunet_cases(folder, content, len(channels))
    else:
      raise UserError(f"{path}: has neither 'modality' (Decathlon) nor 'channel_names' (nnU-Net "
                      f"v2); add the one of your layout")
  except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
    raise UserError(f"{path}: missing or wrong entry ({type(error).__name__}: {error}); "
                    f"compare it with the layout's documentation") from None
  if not cases:
    raise UserError(f"{folder}: has no training cases; put images into imagesTr and labels of the "
                    f"same name into labelsTr")
  for case in cases:
    if "/" in case.identifier or case.identifier in ("", ".", ".."):
      raise UserError(f"{path}: case {case.identifier!r}: is no name of a file; rename it")
    for file in (*case.images, case.label):
      if file is not None and not file.is_file():
        raise UserError(f"{file}: does not exist but case {case.identifier} of {folder} needs it; "
                        f"add the file or remove the case")
  _check_unique(cases)
  if structures is not None:
    labels = _select(path, labels, structures)
  return Dataset(str(content.get("name", folder.name)), channels, labels, tuple(cases))


def read_labels(content: Mapping[str, Any], path: Path) -> Labels:
  """Labels of nnU-Net's dataset.json; UserError, with `path`, if they contradict each other.

  KeyError, TypeError and ValueError for entries that are missing or of another kind.
  """
  named = {name: tuple(map(int, value)) if isinstance(value, list) else int(value)
           for name, value in content["labels"].items()}
  return _labels(path, named, content.get("regions_class_order"))


def find_inputs(paths: Sequence[str | Path], channels: int = 1) -> list[Case]:
  """Finds the cases of a prediction in files and folders.

  `CASE_0000.nii.gz`, `CASE_0001.nii.gz`, ... are the channels of one case (nnU-Net); any other
  name is a case of its own: a 3D file, or a 4D file with all channels. A folder with a DICOM series
  counts as a file of the folder's name. UserError: nothing there, a missing channel, two cases of
  one name.
  """
  cases: dict[Path, Case] = {}  # by the first file: a channel may be met several times
  for path in map(Path, paths):
    files = [path]
    if not path.exists():
      raise UserError(f"{path}: no such file or folder; check the path")
    if path.is_dir() and not is_series(path):
      files = sorted(file for file in path.iterdir()
                     if (is_series if file.is_dir() else is_volume_name)(file))
      if not files:
        raise not_a_volume(path)
    elif not path.is_dir() and not path.name.endswith(ENDINGS):
      raise not_a_volume(path)
    for case in (_input_case(file, channels) for file in files):
      cases[case.images[0].resolve()] = case
  if not cases:
    raise UserError("no input given; name volumes or folders")
  _check_unique(list(cases.values()))
  return list(cases.values())


def with_labels(cases: Sequence[Case], folder: str | Path) -> list[Case]:
  """The same cases with the label maps `IDENTIFIER` + one of `ENDINGS` of a folder."""
  labelled = []
  for case in cases:
    files = [Path(folder) / (case.identifier + ending) for ending in ENDINGS]
    if not (found := list(filter(Path.is_file, files))):
      raise UserError(f"{files[0]}: does not exist; give a folder with a label map for every input")
    labelled.append(dataclasses.replace(case, label=found[0]))
  return labelled


def read_case(case: Case, channels: int, labels: Labels) -> tuple[Volume, np.ndarray | None]:
  """The image of a case, and the atoms (uint8 [D, H, W], canonical) of its label if it has one."""
  volume = load_image(case.images, channels)
  if case.label is None:
    return volume, None
  return volume, labels.to_atoms(load_label_map(case.label, volume.geometry), case.label)


def _ranges(values: Mapping[int, Any]) -> str:
  ordered = sorted(values)
  if len(ordered) > 1 and ordered == list(range(ordered[0], ordered[-1] + 1)):
    return f"{ordered[0]} to {ordered[-1]}"
  more = f" and {len(ordered) - 12} more" if len(ordered) > 12 else ""
  return ", ".join(map(str, ordered[:12])) + more


def _numbered(names: Mapping[str, str]) -> tuple[str, ...]:
  return tuple(str(names[key]) for key in sorted(names, key=int))


def _labels(path: Path, named: Mapping[str, int | tuple[int, ...]], order: Any) -> Labels:
  """Labels of {name: value or values}; `order` is nnU-Net's regions_class_order."""
  structures, ignore = [], None
  for name, value in named.items():
    values = value if isinstance(value, tuple) else (value,)
    if name == "ignore":
      if len(values) != 1:
        raise UserError(f"{path}: 'ignore' has several values; give it one")
      ignore = values[0]
    elif values != (0,):
      if not values or min(values) <= 0 or max(values) >= 2**31:
        raise UserError(f"{path}: label '{name}' has the values {list(values)}; "
                        f"values start at 1, 0 is the background")
      structures.append(Structure(name, values))
  if not structures:
    raise UserError(f"{path}: has no labels besides background; name what is to be segmented")
  regions = any(isinstance(value, tuple) for value in named.values())
  used = [v for structure in structures for v in structure.values]
  if ignore in used or ignore == 0:
    raise UserError(f"{path}: the ignore label {ignore} is also a structure's value; "
                    f"give it a value of its own")
  if regions and (order is None or len(order) != len(structures)):
    raise UserError(f"{path}: labels with lists are regions and need 'regions_class_order' with "
                    f"{len(structures)} values; add it")
  if not regions and len(set(used)) != len(used):
    raise UserError(f"{path}: two labels have the same value; give each its own")
  if len(set(used)) >= IGNORED:
    raise UserError(f"{path}: has {len(set(used))} label values; at most {IGNORED - 1} "
                    f"are possible, merge some")
  output = tuple(map(int, order if regions else used))
  return Labels(tuple(structures), regions, output, (), ignore)


def _select(path: Path, labels: Labels, names: Sequence[str]) -> Labels:
  missing = [name for name in names if name not in labels.names]
  if missing or not names:
    raise UserError(f"{path}: has no label {', '.join(missing) or '(none was asked for)'}; "
                    f"choose from {', '.join(labels.names)}")
  # Regions keep their order: it says which overwrites which.
  chosen = [labels.names.index(name) for name in dict.fromkeys(names)]
  chosen = sorted(chosen) if labels.regions else chosen
  structures = tuple(labels.structures[i] for i in chosen)
  used = {v for structure in structures for v in structure.values}
  return dataclasses.replace(
    labels, structures=structures, output_values=tuple(labels.output_values[i] for i in chosen),
    others=tuple(v for v in labels.atom_values if v and v not in used))


def _stem(path: Path) -> str:
  ending = next((ending for ending in ENDINGS if path.name.endswith(ending)), None)
  if ending is None:
    raise UserError(f"{path}: does not end in {', '.join(ENDINGS)}; convert it")
  return path.name.removesuffix(ending)


def _nnunet_cases(folder: Path, content: Mapping[str, Any], channels: int) -> list[Case]:
  if "dataset" in content:  # cases listed one by one, at any place
    return [
      Case(name, tuple(folder / image for image in entry["images"]), folder / entry["label"])
      for name, entry in content["dataset"].items()]
  ending = content["file_ending"]
  if ending not in ENDINGS:
    raise UserError(f"{folder / 'dataset.json'}: file_ending is {ending}; convert the volumes to "
                    f"one of {', '.join(ENDINGS)}")
  files = sorted((folder / "imagesTr").glob(f"*_[0-9][0-9][0-9][0-9]{ending}"))
  identifiers = dict.fromkeys(file.name.removesuffix(ending)[:-5] for file in files
                              if is_volume_name(file))
  for label in sorted((folder / "labelsTr").glob(f"*{ending}")):
    if identifiers and is_volume_name(label) and label.name.removesuffix(ending) not in identifiers:
      raise UserError(f"{label}: has no image in imagesTr; add it or remove the label map")
  return [
    Case(name, tuple(folder / "imagesTr" / f"{name}_{c:04d}{ending}" for c in range(channels)),
         folder / "labelsTr" / f"{name}{ending}") for name in identifiers]


def _input_case(file: Path, channels: int) -> Case:
  stem = file.resolve().name if file.is_dir() else _stem(file)
  numbered = re.fullmatch(r"(.+)_(\d{4})", stem)
  if numbered is None or int(numbered[2]) >= channels:
    return Case(stem, (file,))
  ending = file.name.removeprefix(stem)
  images = tuple(file.with_name(f"{numbered[1]}_{c:04d}{ending}") for c in range(channels))
  for image in images:
    if not image.exists():
      raise UserError(f"{image}: does not exist, but {file.name} is one of {channels} channels of "
                      f"case {numbered[1]}; add it")
  return Case(numbered[1], images)


def _check_unique(cases: Sequence[Case]) -> None:
  seen: dict[str, Case] = {}
  for case in cases:
    first = seen.setdefault(case.identifier, case)
    if first is not case:
      raise UserError(f"{case.images[0]}: is a second case named {case.identifier} beside "
                      f"{first.images[0]}; rename one")
