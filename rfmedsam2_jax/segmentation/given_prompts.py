"""A person's prompts on top of the generator's: boxes and points of a file, masks of sparse slices.

In: entries (data.prompt_entries), label maps. Out: `GivenPrompt`s on the prepared grid.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.cuts import bounds
from rfmedsam2_jax.data.datasets import Labels, load_labels
from rfmedsam2_jax.data.preprocessing import Prepared, Restore
from rfmedsam2_jax.data.prompt_entries import PromptEntry
from rfmedsam2_jax.data.resampling import antialiased_matrix, apply_separable
from rfmedsam2_jax.data.volumes import Geometry
from rfmedsam2_jax.refinement.first_prompts import GivenPrompt


def prompts_by_hand(
  labels: Labels, geometry: Geometry, entries: Sequence[PromptEntry], label_map: Path | None
) -> Callable[[Prepared], list[GivenPrompt]]:
  """What `segment_volume` asks for a person's prompts: of entries and a sparse label map's file."""
  sparse = None
  if label_map is not None:
    sparse = load_labels(label_map, geometry, labels)
    labels.to_atoms(sparse, label_map)  # says so if a value is unknown

  def by_hand(prepared: Prepared) -> list[GivenPrompt]:
    restore = prepared.restore
    found = [_of_entry(entry, labels, geometry, restore) for entry in entries]
    return found if sparse is None else [*found, *_of_labels(labels, restore, sparse)]

  return by_hand


def _of_entry(
  entry: PromptEntry, labels: Labels, geometry: Geometry, restore: Restore
) -> GivenPrompt:
  """Boxes and points of a file's voxels, on the prepared grid."""
  depth = restore.prepared_shape[0]
  voxels = np.concatenate([entry.box, entry.points])
  where = f"{geometry.path}: a prompt for {entry.structure}"
  if (voxels < 0).any() or (voxels > np.array(geometry.shape) - 1).any():
    size = " x ".join(map(str, geometry.shape))
    raise UserError(f"{where} lies outside of its {size} voxels; correct its coordinates")
  canonical = geometry.canonical_points(voxels)
  corners, clicks = np.rint(canonical[: len(entry.box)]), canonical[len(entry.box) :]
  places = restore.native_to_prepared(np.concatenate([corners, clicks]))
  slices = np.unique(np.clip(np.rint(places[:, 0]).astype(int), 0, depth - 1))
  if len(slices) > 1:
    raise UserError(f"{where} spans several slices; give one prompt per slice")
  box = None
  if len(corners):
    # Outer edges of the voxels, which mean the same on every grid.
    edges = np.array([corners.min(axis=0) - 0.5, corners.max(axis=0) + 0.5])
    (_, y0, x0), (_, y1, x1) = restore.native_to_prepared(edges)
    box = np.array([x0 + 0.5, y0 + 0.5, x1 - 0.5, y1 - 0.5])
  xy = places[len(corners) :, 2:0:-1]
  points = tuple((x, y, inside) for (x, y), inside in zip(xy, entry.inside, strict=True))
  by_name = isinstance(entry.structure, str)
  known: Sequence[str | int] = labels.names if by_name else labels.output_values
  return GivenPrompt(known.index(entry.structure), int(slices[0]), box, points)


def _of_labels(labels: Labels, restore: Restore, sparse: np.ndarray) -> Iterator[GivenPrompt]:
  """Masks of the slices that a sparse label map int [z, y, x] has labels on."""
  # Sparse slices would be lost in resampling, so each is brought over by itself.
  moved = sparse[tuple(map(slice, restore.lower, restore.upper))].transpose(restore.order)
  matrices = [None if a == b else antialiased_matrix(a, b) for a, b in zip(
    moved.shape[1:], restore.prepared_shape[1:], strict=True)]
  scale = np.divide(restore.prepared_shape[1:], moved.shape[1:])
  for native in np.flatnonzero(moved.any(axis=(1, 2))):
    place = (native + 0.5) * restore.prepared_shape[0] / moved.shape[0] - 0.5
    at = int(np.clip(np.rint(place), 0, restore.prepared_shape[0] - 1))
    for organ, structure in enumerate(labels.structures):
      mask = np.isin(moved[native], structure.values)
      if (found := bounds([mask])) is not None:
        # Outer edges of the voxels, which mean the same on every grid.
        (y0, x0), (y1, x1) = found[0] * scale, (found[1] + 1) * scale - 1
        yield GivenPrompt(organ, at, np.array([x0, y0, x1, y1]),
                          mask=apply_separable(mask.astype(np.float32), matrices))
