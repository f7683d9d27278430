"""A data set: what its cases and label values are, as dataset.json of one of the layouts says.

Where the files lie is data.layouts', the inputs of a prediction are data.inputs'.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2_jax.base.buckets import fetched, outlined
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.files import Stored, read_json, whole
from rfmedsam2_jax.data.layouts import (
  Case,
  check_count,
  check_unique,
  decathlon_cases,
  nnunet_cases,
)
from rfmedsam2_jax.data.names import ENDINGS, LeftOut, ending_of, some
from rfmedsam2_jax.data.segments import load_by_name
from rfmedsam2_jax.data.volumes import Geometry, Volume, load_image

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
  #: What `others` are called, in their order; empty where these are parts of regions.
  other_names: tuple[str, ...] = dataclasses.field(default=(), compare=False)

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
  def named_values(self) -> dict[str, int]:
    """The value of every name that is known, in the order in which regions overwrite each other."""
    others = {"background": 0} | dict(zip(self.other_names, self.others, strict=False))
    ignored = {} if self.ignore is None else {"ignore": self.ignore}
    return others | dict(zip(self.names, self.output_values, strict=True)) | ignored

  @property
  def known_values(self) -> set[int]:
    """The values that a label map may have."""
    ignored = () if self.ignore is None else (self.ignore,)
    return {*self.atom_values, *self.others, *ignored}

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
      raise UserError(f"{path}: labels {some(unknown, 8)} are not in dataset.json (which has "
                      f"{_ranges(known)}); correct the label map or dataset.json")
    atoms = np.array([known[int(value)] for value in present], np.uint8)
    if present[-1] < 65536:
      table = np.zeros(int(present[-1]) + 1, np.uint8)
      table[present] = atoms
      return table[labels]
    return atoms[np.searchsorted(present, labels)]


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A training set: channel names as in dataset.json, and cases that all have a label."""

  name: str
  channels: tuple[str, ...]
  labels: Labels
  cases: tuple[Case, ...]
  left_out: tuple[LeftOut, ...] = ()  #: of its folders, what is no case


def read_dataset(folder: str | Path, structures: Sequence[str] | None = None) -> Dataset:
  """Reads the description of a data set; UserError for missing or contradictory files and entries.

  `structures` are the names to segment, in this order; all others become background. None: all.
  Of a bucket the names of volumes come now, what is in them with `fetch_case`.
  """
  folder = outlined(folder, "read", later=lambda name, _: ending_of(name).lower() in ENDINGS)
  if not folder.is_dir():
    raise UserError(f"{folder}: is not a folder; give a data set folder with dataset.json")
  path = folder / "dataset.json"
  content = read_json(path)
  try:
    if "modality" in content:
      channels = _channels(path, content["modality"])
      values = {name: value for value, name in content["labels"].items()}
      if len(values) < len(content["labels"]):
        raise UserError(f"{path}: has a label twice, under two values; give each a name of its own")
      labels = _labels(path, {str(name): value for name, value in values.items()}, None)
      cases, left_out = decathlon_cases(folder, content["training"])
    elif "channel_names" in content:
      channels = _channels(path, content["channel_names"])
      labels = read_labels(content, path)
      cases, left_out = nnunet_cases(folder, content, len(channels))
    else:
      raise UserError(f"{path}: has neither 'modality' (Decathlon) nor 'channel_names' (nnU-Net "
                      f"v2); add the one of your layout")
  except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
    raise UserError(f"{path}: missing or wrong entry ({type(error).__name__}: {error}); "
                    f"compare it with the layout's documentation") from None
  if not cases:
    raise UserError(f"{folder}: has no training cases; put images into imagesTr and labels of the "
                    f"same name into labelsTr")
  check_count(path, content, cases)
  for case in cases:
    if len(case.images) not in (1, len(channels)):
      raise UserError(f"{path}: case {case.identifier}: has {len(case.images)} images where "
                      f"{len(channels)} channels are named; correct it")
    if "/" in case.identifier or case.identifier in ("", ".", ".."):
      raise UserError(f"{path}: case {case.identifier!r}: is no name of a file; rename it")
    for file in (*case.images, case.label):
      if file is not None and not (file.is_file() or file in case.images and file.is_dir()):
        raise UserError(f"{file}: does not exist but case {case.identifier} of {folder} needs it; "
                        f"add the file or remove the case")
  check_unique(cases)
  if structures is not None:
    labels = _select(path, labels, structures)
  return Dataset(str(content.get("name", folder.name)), channels, labels, tuple(cases),
                 tuple(left_out))


def read_labels(content: Mapping[str, Any], path: Path) -> Labels:
  """Labels of nnU-Net's dataset.json; UserError, with `path`, if they contradict each other.

  KeyError, TypeError and ValueError for entries that are missing or of another kind.
  """
  return _labels(path, content["labels"], content.get("regions_class_order"))


def read_case(
  case: Case, channels: int, labels: Labels, series: str | None = None, modality: str | None = None
) -> tuple[Volume, np.ndarray | None]:
  """The image of a case, and the atoms (uint8 [D, H, W], canonical) of its label if it has one.

  `series` and `modality` choose among several of a study, see `load_image`.
  """
  fetch_case(case)
  volume = load_image(case.images, channels, series, modality)
  if case.label is None:
    return volume, None
  return volume, labels.to_atoms(load_labels(case.label, volume.geometry, labels), case.label)


def fetch_case(case: Case) -> None:
  """Brings the files of a case to this machine, if they lie in a bucket."""
  for file in (*case.images, case.label):
    if file is not None:
      fetched(file)


def load_labels(path: str | Path, like: Geometry, labels: Labels) -> np.ndarray:
  """A label map in the values of `labels`, by name where the file names its own; see segments."""
  return load_by_name(path, like, labels.named_values, not labels.regions, of_data_set=True)


def _ranges(values: Mapping[int, Any]) -> str:
  ordered = sorted(values)
  if len(ordered) > 1 and ordered == list(range(ordered[0], ordered[-1] + 1)):
    return f"{ordered[0]} to {ordered[-1]}"
  return some(ordered, 12)


def _channels(path: Path, names: Mapping[str, str]) -> tuple[str, ...]:
  numbered = {whole(path, "the number of a channel", key): str(name)
              for key, name in names.items()}
  if not names or sorted(numbered) != list(range(len(names))):
    raise UserError(f"{path}: has channels {', '.join(names) or '(none)'}; number them from 0 on")
  return tuple(numbered[channel] for channel in range(len(names)))


def _labels(path: Path, named: Mapping[str, Any], order: Any) -> Labels:
  """Labels of {name: value or list of values}; `order` is nnU-Net's regions_class_order."""
  structures, ignore, background = [], None, ""
  for name, given in named.items():
    listed_values = given if isinstance(given, list) else [given]
    values = tuple(whole(path, f"label '{name}'", value) for value in listed_values)
    if len(set(values)) < len(values):
      raise UserError(f"{path}: label '{name}' has a value twice, {list(values)}; remove one")
    if name == "ignore":
      if len(values) != 1:
        raise UserError(f"{path}: 'ignore' has several values; give it one")
      ignore = values[0]
    elif values == (0,):
      if background:
        raise UserError(f"{path}: labels '{background}' and '{name}' both have the value 0, the "
                        "background; give the structure another one")
      background = name
    elif not values or min(values) <= 0 or max(values) >= 2**31 or name == "background":
      raise UserError(f"{path}: label '{name}' has the values {list(values)}; "
                      f"values start at 1, 0 is the background")
    else:
      structures.append(Structure(name, values))
  if not structures:
    raise UserError(f"{path}: has no labels besides background; name what is to be segmented")
  regions = any(isinstance(value, list) for value in named.values())
  used = [v for structure in structures for v in structure.values]
  if ignore in used or ignore == 0:
    raise UserError(f"{path}: the ignore label {ignore} is also a structure's value; "
                    f"give it a value of its own")
  if regions and (not isinstance(order, list) or len(order) != len(structures)):
    raise UserError(f"{path}: labels with lists are regions and need 'regions_class_order' with "
                    f"{len(structures)} values; add it")
  if not regions and len(set(used)) != len(used):
    raise UserError(f"{path}: two labels have the same value; give each its own")
  if len(set(used)) >= IGNORED:
    raise UserError(f"{path}: has {len(set(used))} label values; at most {IGNORED - 1} "
                    f"are possible, merge some")
  output = tuple(used)
  if regions:
    output = tuple(whole(path, "regions_class_order", value) for value in order)
    if len(set(output)) < len(output):
      raise UserError(f"{path}: regions_class_order has a value twice, {list(output)}; two regions "
                      "would be written as one; give each its own")
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
  others = tuple(v for v in labels.atom_values if v and v not in used)
  called = {} if labels.regions else {v: name for v, name in labels.value_names.items()}
  return dataclasses.replace(
    labels, structures=structures, output_values=tuple(labels.output_values[i] for i in chosen),
    others=others, other_names=tuple(called[v] for v in others if v in called))
