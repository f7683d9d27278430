"""The numbers that reports need of every structure, and the table of them over all cases.

In: a label map and the intensities of its file, canonical. Out: `Numbers`, which the API gives and
`predict` writes as CASE.json and as numbers.csv.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import Labels
from rfmedsam2_jax.data.files import replacing
from rfmedsam2_jax.data.volumes import Volume
from rfmedsam2_jax.segmentation.chosen import TOUCHING, Removed, boxes_of, owned_values

TABLE_NAME = "numbers.csv"
_HEAD = b"case,structure,label,"

# Where the first and the last voxel of canonical z, y and x lie.
_SIDES = (("inferior", "superior"), ("anterior", "posterior"), ("right", "left"))
_COLUMNS = ("volume_ml", "pieces", "removed_pieces", "removed_ml", "touches")


@dataclasses.dataclass(frozen=True)
class Intensities:
  """Of one channel over the voxels of a structure, in the file's units; None if it has none."""

  mean: float | None = None
  std: float | None = None  # over all its voxels, not a sample of them
  p5: float | None = None
  p95: float | None = None


@dataclasses.dataclass(frozen=True)
class Numbers:
  """What a report says of one structure beside its volume.

  Attributes:
    pieces: that hang together by faces, edges or corners of voxels.
    removed_pieces, removed_ml: that were smaller than they had to be, and are no part of it.
    touches: sides of the image, by their nearest anatomical name, on which it has a voxel.
    intensities: by channel.
  """

  pieces: int
  removed_pieces: int
  removed_ml: float
  touches: tuple[str, ...]
  intensities: dict[str, Intensities]


def channel_titles(names: Sequence[str]) -> list[str]:
  """Names of channels, with their numbers where several have one name."""
  return [f"{name}_{number}" if names.count(name) > 1 else name
          for number, name in enumerate(names)]


def numbers_of(
  found: np.ndarray, labels: Labels, volume: Volume, channels: Sequence[str],
  removed: Sequence[Removed],
) -> list[Numbers]:
  """Numbers of every structure of a label map [D, H, W] on the grid of `volume`, as it was read."""
  owned, size, result = owned_values(labels), volume.geometry.voxel_ml, []
  titles = channel_titles(channels)
  for values, box, gone in zip(owned, boxes_of(found, owned), removed, strict=True):
    pieces, touches = 0, []
    intensities = {title: Intensities() for title in titles}
    if box is not None:
      mask = np.isin(found[box], values)
      pieces = int(ndimage.label(mask, TOUCHING)[1])
      # The box is tight, so it begins and ends where the structure does.
      for sides, part, length in zip(_SIDES, box, found.shape, strict=True):
        at = part.start == 0, part.stop == length
        touches += [side for side, there in zip(sides, at, strict=True) if there]
      intensities = {title: _intensities(image[box][mask])
                     for title, image in zip(titles, volume.array, strict=True)}
    result.append(Numbers(pieces, gone.pieces, gone.voxels * size, tuple(touches), intensities))
  return result


def _intensities(voxels: np.ndarray) -> Intensities:
  p5, p95 = np.percentile(voxels, (5, 95))
  return Intensities(float(voxels.mean(dtype=np.float64)), float(voxels.std(dtype=np.float64)),
                     float(p5), float(p95))


def table_rows(case: str, structures: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
  """Rows of the table, from `structures` of a CASE.json, so that both say the same."""
  for name, found in structures.items():
    numbers = found["numbers"]
    flat = found | numbers | {"touches": " ".join(numbers["touches"])}
    row = {"case": case, "structure": name, "label": found["label"]}
    row |= {column: flat[column] for column in _COLUMNS}
    for title, values in numbers["intensities"].items():
      row |= {f"{title}_{key}": value for key, value in values.items()}
    yield row


def write_table(folder: Path) -> None:
  """Writes the table of a folder: every case that has its CASE.json there, of whatever call."""
  rows: list[dict[str, Any]] = []
  for path in sorted(folder.glob("*.json")):
    try:
      found = json.loads(path.read_bytes())
      rows += table_rows(found["case"], found["structures"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # of others, or from before
      continue
  columns = dict.fromkeys(column for row in rows for column in row)
  text = io.StringIO()
  table = csv.DictWriter(text, list(columns), lineterminator="\n")
  table.writeheader()
  table.writerows(rows)
  with replacing(folder / TABLE_NAME) as temporary:
    # Names of files may hold bytes that are no text.
    temporary.write_text(text.getvalue(), encoding="utf-8", errors="backslashreplace", newline="")


def check_table(folder: Path) -> None:
  """UserError if what has the table's name in a folder is no such table, which would be lost."""
  path = folder / TABLE_NAME
  if path.exists() and not (path.is_file() and path.read_bytes().startswith(_HEAD)):
    raise UserError(f"{path}: exists and is no table of predict; move it away or --overwrite")
