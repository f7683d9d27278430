"""Boxes, points and lines that a person has written into a JSON file.

Entries are {"structure": NAME} or {"label": VALUE} with "box": [[i, j, k], [i, j, k]], "points":
[[i, j, k, 1], [i, j, k, 0]], "lines": [{"path": [[i, j, k], ...], "inside": true}] or several of
them. Coordinates are voxels of the image file from 0, corners are inclusive, and an entry lies on
one slice; the last number of a point says whether it lies inside. A line becomes a few points
(data.scribbles). "round" is tracking's: entries of a later round correct what was found before.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import Labels
from rfmedsam2_jax.data.files import read_json
from rfmedsam2_jax.data.scribbles import points_of_line

_KEYS = ("box", "label", "lines", "points", "round", "structure")
_FURTHEST = 1e9  # voxels or mm


@dataclasses.dataclass(frozen=True, eq=False)
class PromptEntry:
  """What is said of one structure."""

  structure: str | int  #: its name, or its value in label maps
  box: np.ndarray  #: corners, float64 [2, 3], in the file's own coordinates; [0, 3] without a box
  points: np.ndarray  #: float64 [n, 3], likewise; also those that lines became
  inside: tuple[bool, ...]  #: of each point
  round: int
  source: str  #: what is named if something is wrong with it


def read_entries(path: str | Path) -> list[PromptEntry]:
  """The entries of a file for one volume, at least one; their structures are label values."""
  content = read_json(path)
  if not isinstance(content, list) or not content:
    raise UserError(f"{path}: must hold a list of prompts, one at least; correct the file")
  return [_entry(entry, f"{path}: prompt {i}", None) for i, entry in enumerate(content)]


def read_entries_by_case(path: str | Path, labels: Labels) -> dict[str, list[PromptEntry]]:
  """The entries of a file with a list for every case; structures are those of `labels`."""
  content = read_json(path)
  if not isinstance(content, dict):
    raise UserError(f"{path}: must map case names to lists of prompts; correct the file")
  found = {}
  for case, entries in content.items():
    if not isinstance(entries, list):
      raise UserError(f"{path}: case {case}: must have a list of prompts; correct the file")
    found[case] = [_entry(entry, f"{path}: case {case}: prompt {i}", labels)
                   for i, entry in enumerate(entries)]
  return found


def _entry(entry: Any, source: str, labels: Labels | None) -> PromptEntry:
  if not isinstance(entry, dict) or not set(entry) <= set(_KEYS):
    raise UserError(f"{source}: has keys besides {', '.join(_KEYS)}; correct it")
  number = entry.get("round", 0)
  if type(number) is not int or number < 0:
    raise UserError(f"{source}: needs a whole number as round; correct it")
  structure = _structure(entry, source, labels)
  box, points, lines = (entry.get(key) or [] for key in ("box", "points", "lines"))
  if not (_are_rows(box, 3) and _are_rows(points, 4) and len(box) in (0, 2) and _are_lines(lines)
          and (box or points or lines)):
    raise UserError(f"{source}: a box is two corners [i, j, k], points are [i, j, k, 1 or 0], "
                    'lines are {"path": [[i, j, k], ...], "inside": true or false}')
  drawn = [(*place, line.get("inside", True))
           for line in lines for place in points_of_line(line["path"])]
  places = np.array([*points, *drawn], float).reshape(-1, 4)
  return PromptEntry(structure, np.array(box, float).reshape(-1, 3), places[:, :3],
                     tuple(map(bool, places[:, 3])), number, source)


def _structure(entry: dict[str, Any], source: str, labels: Labels | None) -> str | int:
  name, label = entry.get("structure"), entry.get("label")
  if labels is None:
    if type(label) is not int or name is not None:
      raise UserError(f"{source}: needs a whole number as label, and no name; correct it")
    return label
  if name in labels.names and label is None:
    return str(name)
  if type(label) is int and label in labels.output_values and name is None:
    return label
  raise UserError(f"{source}: needs a structure, one of {', '.join(labels.names)}, or its label")


def _are_lines(lines: Any) -> bool:
  return isinstance(lines, list) and all(
    isinstance(line, dict) and {"path"} <= set(line) <= {"path", "inside"} and line["path"]
    and _are_rows(line["path"], 3) and line.get("inside", True) in (True, False) for line in lines)


def _are_rows(rows: Any, width: int) -> bool:
  """Whether JSON has rows of numbers, none of them NaN or too large for a coordinate."""
  return isinstance(rows, list) and all(
    isinstance(row, list) and len(row) == width
    and all(isinstance(v, int | float) and abs(v) < _FURTHEST for v in row) for row in rows)
