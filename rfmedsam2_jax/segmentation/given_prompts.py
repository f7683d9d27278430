"""A person's prompts on top of the generator's: boxes and points of a file, masks of sparse slices.

In: JSON and label maps. Out: `GivenPrompt`s on the grid that a segmenter has prepared.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.files import is_row, read_json
from rfmedsam2_jax.data.preprocessing import Prepared
from rfmedsam2_jax.data.volumes import Volume
from rfmedsam2_jax.refinement.first_prompts import GivenPrompt
from rfmedsam2_jax.segmentation.segmenter import Segmenter


def read_given(path: str | Path, model: Segmenter) -> dict[str, list[dict[str, Any]]]:
  """A person's boxes and points from a JSON file.

      {"CASE": [{"structure": "liver", "box": [[i, j, k], [i, j, k]]},
                {"structure": "liver", "points": [[i, j, k, 1], [i, j, k, 0]]}]}

  Coordinates are voxels of the input file; both corners of a box, and all points of an entry, lie
  on one slice. The last number of a point says whether it lies inside.
  """
  names = model.plan.labels.names
  content = read_json(path)
  if not isinstance(content, dict):
    raise UserError(f"{path}: must map case names to lists of prompts; correct the file")
  for case, entries in content.items():
    for entry in entries if isinstance(entries, list) else [entries]:
      where = f"{path}: case {case}"
      if not isinstance(entry, dict) or entry.get("structure") not in names:
        raise UserError(f"{where}: every prompt needs a structure, one of {', '.join(names)}")
      box, points = entry.get("box"), entry.get("points")
      if (box is None) == (points is None):
        raise UserError(f"{where}: every prompt needs either a box or points; correct it")
      rows: Any = box if box is not None else points
      width = 3 if box is not None else 4
      right = isinstance(rows, list) and len(rows) > 0 and all(is_row(row, width) for row in rows)
      if not right or (box is not None and len(rows) != 2):
        raise UserError(f"{where}: a box is two corners [i, j, k], points are [i, j, k, 1 or 0]")
  return content


def prompts_of_file(
  model: Segmenter, volume: Volume, prepared: Prepared, entries: list[dict[str, Any]]
) -> Iterator[GivenPrompt]:
  """Boxes and points of a file's voxels, on the prepared grid and in pixels of SAM's square."""
  side = model.sam2.config.image_size
  depth, height, width = prepared.restore.prepared_shape
  geometry = volume.geometry
  to_canonical = np.linalg.inv(geometry.canonical_affine) @ geometry.affine
  for entry in entries:
    rows = np.array(entry.get("box") or entry["points"], float)
    voxels = rows[:, :3]
    if (voxels < 0).any() or (voxels > np.array(geometry.shape) - 1).any():
      raise UserError(
        f"{geometry.path}: a prompt for {entry['structure']} lies outside of its "
        f"{' x '.join(map(str, geometry.shape))} voxels; correct its coordinates"
      )
    canonical = voxels @ to_canonical[:3, :3].T + to_canonical[:3, 3]
    places = prepared.restore.native_to_prepared(canonical)
    slices = np.unique(np.clip(np.rint(places[:, 0]).astype(int), 0, depth - 1))
    if len(slices) > 1:
      raise UserError(
        f"{geometry.path}: a prompt for {entry['structure']} spans several slices; give one "
        "prompt per slice"
      )
    xy = places[:, 2:0:-1] * np.array([side / width, side / height])
    organ = model.plan.labels.names.index(entry["structure"])
    if "box" in entry:
      (x0, y0), (x1, y1) = xy.min(axis=0), xy.max(axis=0)
      yield GivenPrompt(organ, int(slices[0]), box=(x0, y0, x1, y1))
    else:
      points = tuple((x, y, bool(row[3])) for (x, y), row in zip(xy, rows, strict=True))
      yield GivenPrompt(organ, int(slices[0]), points=points)


def prompts_of_labels(
  model: Segmenter, prepared: Prepared, sparse: np.ndarray | None
) -> Iterator[GivenPrompt]:
  """Masks of the slices that a sparse label map has labels on."""
  if sparse is None:
    return
  restore = prepared.restore
  # Sparse slices would be lost in resampling, so each is brought over by itself.
  moved = sparse[tuple(map(slice, restore.lower, restore.upper))].transpose(restore.order)
  for native in np.flatnonzero(moved.any(axis=(1, 2))):
    place = (native + 0.5) * restore.prepared_shape[0] / moved.shape[0] - 0.5
    at = int(np.clip(np.rint(place), 0, restore.prepared_shape[0] - 1))
    for organ, structure in enumerate(model.plan.labels.structures):
      mask = np.isin(moved[native], structure.values)
      if mask.any():
        yield GivenPrompt(organ, at, mask=mask)
