"""Which value of a label map is which structure, where the file itself says so.

Segmentations of 3D Slicer (NRRD) name their values and may have several layers, in which segments
overlap. NIfTI files may have a table of labels in an extension of the header, as Connectome
Workbench and TotalSegmentator write it. Segmentations and structure sets of DICOM name all.
"""

import html
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data import itk
from rfmedsam2_jax.data.label_objects import (
  Segment,
  is_label_object,
  load_label_object,
  names_of_object,
)
from rfmedsam2_jax.data.names import NIFTI_ENDINGS, ending_of, some
from rfmedsam2_jax.data.volumes import Geometry, load_layers, open_nifti

_LOG = logging.getLogger(__name__)
_FIELD = re.compile(r"Segment(\d+)_(ID|Name|LabelValue|Layer)")
_LABEL = re.compile(rb'<Label\b[^>]*\bKey="(-?\d{1,10})"[^>]*>\s*(<!\[CDATA\[)?(.*?)(?:\]\]>)?\s*'
                    rb"</Label>", re.DOTALL)
_TABLE_CODES = (0, 30)  # of extensions: unspecified, and caret
# Names that number their segment and say nothing of it; `label N` is what `track` calls value N.
_NUMBERED = re.compile(r"(?:segment(?:ation)?|class|region|value)?\s*\d*")
_LABEL_N = re.compile(r"label (\d{1,9})")


def segments_of(path: str | Path) -> tuple[Segment, ...]:
  """What a label map's header says of its values; empty if nothing. UserError if that is wrong."""
  path, ending = Path(path), ending_of(path).lower()
  if is_label_object(path):
    return tuple(Segment(name, value) for name, value in names_of_object(path))
  found = _of_nifti(path) if ending in NIFTI_ENDINGS else _of_slicer(path)
  seen: dict[tuple[int, int], str] = {}
  for segment in found:
    first = seen.setdefault((segment.layer, segment.value), segment.name)
    if first != segment.name:
      raise UserError(f"{path}: calls value {segment.value} both '{first}' and '{segment.name}'; "
                      "give each segment a value of its own")
  return tuple(segment for segment in found if segment.value)


def load_by_name(
  path: str | Path, like: Geometry, values: Mapping[str, int], exclusive: bool = True,
  of_data_set: bool = False,
) -> np.ndarray:
  """A label map on an image's canonical grid, int32 [D, H, W], in the values of a data set.

  A value that the file names as the data set names a structure becomes that structure's; capitals
  and what stands between words do not count. Others stay as they are.

  Args:
    values: of the structures, by name, in the order in which they overwrite each other.
    exclusive: no voxel belongs to two structures, and every value is one; else they are regions.
    of_data_set: of DICOM, what `values` do not name is left out: structure sets have outlines of
      the body and of targets beside those of organs.

  Raises:
    UserError: see `load_layers`; a value that the file calls otherwise than the data set does, two
      that become one, structures that overlap where they may not; none of the data set's.
  """
  layers, segments = _read(path, like, values if of_data_set else None)
  if len(layers) > 1 and not segments:
    raise UserError(f"{path}: has {len(layers)} layers where a 3D label map is expected, and does "
                    "not name its segments; give one volume of whole numbers")
  names = {(segment.layer, segment.value): segment.name for segment in segments}
  present = [np.unique(layer) for layer in layers]
  targets: dict[tuple[int, int], int] = {}
  for number, found in enumerate(present):
    for value in map(int, found[found != 0]):
      name = names.get((number, value), "")
      targets[number, value] = _target(path, name, value, values, exclusive)
  _check_apart(path, targets, names)
  if len(layers) == 1:
    new = np.array([targets.get((0, int(value)), 0) for value in present[0]], np.int32)
    same = np.array_equal(new, present[0])
    return layers[0] if same else new[np.searchsorted(present[0], layers[0])]
  order = list(values.values())
  result = np.zeros_like(layers[0])
  for (number, value), target in sorted(
      targets.items(), key=lambda item: order.index(item[1]) if item[1] in order else -1):
    mask = layers[number] == value
    if exclusive and (overlap := int(np.count_nonzero(result[mask]))):
      raise UserError(f"{path}: '{names.get((number, value), value)}' overlaps other segments in "
                      f"{overlap} voxels, which a label map cannot hold; separate them")
    result[mask] = target
  return result


def load_masks(path: str | Path, like: Geometry) -> list[tuple[int, str, np.ndarray]]:
  """The value, the name ("" if the file has none) and the mask, bool [D, H, W], of every segment.

  UserError: see `load_layers`; two segments of one value, on two layers.
  """
  layers, segments = _read(path, like)
  names = {(segment.layer, segment.value): segment.name for segment in segments}
  keys = [(number, int(value)) for number, layer in enumerate(layers)
          for value in np.unique(layer) if value]
  targets = {key: _target(path, names.get(key, ""), key[1], {}, False) for key in keys}
  _check_apart(path, targets, names)
  said = {key: name for key, name in names.items() if not _says_nothing(name)}
  return [(target, said.get(key, ""), layers[key[0]] == key[1])
          for key, target in sorted(targets.items(), key=lambda item: item[1])]


def _read(path: str | Path, like: Geometry, values: Mapping[str, int] | None = None
          ) -> tuple[list[np.ndarray], Sequence[Segment]]:
  """The layers of a file, and what it says of their values; of DICOM those that `values` name."""
  if not is_label_object(path):
    return load_layers(path, like), segments_of(path)
  known = {_plain(name) for name in values or ()}
  names = [name for name, _ in names_of_object(path)]
  others = [name for name in names
            if values is not None and _plain(name) not in known and not _says_nothing(name)]
  if others and len(others) == len(names):
    raise UserError(f"{path}: has the structures {some(names)}, none of which the data set names; "
                    f"it has {some(list(values or ()))}; give them one name")
  if others:
    _LOG.warning("%s: left out %s, which the data set does not name", path, some(others))
  return load_label_object(path, like, others)


def names_values(path: str | Path) -> bool:
  """Whether a file calls one of its values something that says more than a number."""
  return any(not _says_nothing(segment.name) for segment in segments_of(path))


def _check_apart(
  path: str | Path, targets: Mapping[tuple[int, int], int], names: Mapping[tuple[int, int], str]
) -> None:
  """UserError if two of a file's values, by (layer, value), become one."""
  taken: dict[int, tuple[int, int]] = {}
  for key, target in targets.items():
    first = taken.setdefault(target, key)
    if first != key:
      one, other = (f"'{names[k]}'" if k in names else f"value {k[1]}" for k in (first, key))
      raise UserError(f"{path}: {one} and {other} would both be the value {target}; give each "
                      "segment the name and the value that it has in the data set")


def _target(
  path: str | Path, name: str, value: int, values: Mapping[str, int], exclusive: bool
) -> int:
  if name in values:
    return values[name]
  alike = [known for known in values if _plain(known) == _plain(name)]
  if len(alike) == 1 and _plain(name):
    return values[alike[0]]
  if numbered := _LABEL_N.fullmatch(_plain(name)):
    return int(numbered[1])
  if exclusive and not _says_nothing(name) and value in values.values():
    owner = next(known for known, mine in values.items() if mine == value)
    if _says_nothing(owner):  # `label 6` may be anything
      return value
    raise UserError(f"{path}: calls value {value} '{name}', and in the data set it is '{owner}'; "
                    "name the segment as there, or correct its value")
  return value


def _plain(name: str) -> str:
  return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _says_nothing(name: str) -> bool:
  return bool(_NUMBERED.fullmatch(_plain(name)) or _LABEL_N.fullmatch(_plain(name)))


def _of_slicer(path: Path) -> list[Segment]:
  segments: dict[int, dict[str, str]] = {}
  for key, text in itk.header_fields(path).items():
    if match := _FIELD.fullmatch(key):
      segments.setdefault(int(match[1]), {})[match[2]] = text
  try:
    # Before version 4.11 every segment was a layer of ones.
    return [Segment(fields.get("Name", fields.get("ID", "")), int(fields.get("LabelValue", 1)),
                    int(fields.get("Layer", 0 if "LabelValue" in fields else number)))
            for number, fields in sorted(segments.items())]
  except ValueError as error:
    raise UserError(f"{path}: its header has a segment whose value or layer is no number ({error});"
                    " save the segmentation again") from None


def _of_nifti(path: Path) -> list[Segment]:
  tables: Sequence[bytes] = [
    extension.content for extension in open_nifti(path).header.extensions
    if extension.get_code() in _TABLE_CODES and b"<LabelTable" in extension.content]
  found = []
  for key, verbatim, text in (match for table in tables for match in _LABEL.findall(table)):
    name = text.decode("utf-8", errors="replace").strip()
    found.append(Segment(name if verbatim else html.unescape(name), int(key)))
  return found
