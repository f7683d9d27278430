"""A person's prompts on top of the generator's: boxes and points of a file, masks of sparse slices.

In: entries (data.prompt_entries), label maps. Out: `GivenPrompt`s on a segmenter's prepared grid.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import Labels
from rfmedsam2_jax.data.preprocessing import Prepared, Restore
from rfmedsam2_jax.data.prompt_entries import PromptEntry
from rfmedsam2_jax.data.volumes import Geometry
from rfmedsam2_jax.refinement.first_prompts import GivenPrompt
from rfmedsam2_jax.segmentation.segmenter import Segmenter


def prompts_by_hand(
  geometry: Geometry, entries: Sequence[PromptEntry], sparse: np.ndarray | None, model: Segmenter,
  prepared: Prepared,
) -> list[GivenPrompt]:
  """What a person says of a volume, in entries and a sparse label map int [z, y, x]."""
  found = list(_of_entries(model, geometry, prepared, entries))
  if sparse is not None:
    found += _of_labels(model.plan.labels, prepared.restore, sparse)
  return found


def _of_entries(
  model: Segmenter, geometry: Geometry, prepared: Prepared, entries: Sequence[PromptEntry]
) -> Iterator[GivenPrompt]:
  """Boxes and points of a file's voxels, on the prepared grid and in pixels of SAM's square."""
  side = model.sam2.config.image_size
  depth, height, width = prepared.restore.prepared_shape
  labels = model.plan.labels
  for entry in entries:
    voxels = np.concatenate([entry.box, entry.points])
    where = f"{geometry.path}: a prompt for {entry.structure}"
    if (voxels < 0).any() or (voxels > np.array(geometry.shape) - 1).any():
      size = " x ".join(map(str, geometry.shape))
      raise UserError(f"{where} lies outside of its {size} voxels; correct its coordinates")
    places = prepared.restore.native_to_prepared(geometry.canonical_points(voxels))
    slices = np.unique(np.clip(np.rint(places[:, 0]).astype(int), 0, depth - 1))
    if len(slices) > 1:
      raise UserError(f"{where} spans several slices; give one prompt per slice")
    xy = places[:, 2:0:-1] * np.array([side / width, side / height])
    corners, clicks = xy[: len(entry.box)], xy[len(entry.box) :]
    box = (*corners.min(axis=0), *corners.max(axis=0)) if len(corners) else None
    points = tuple((x, y, inside) for (x, y), inside in zip(clicks, entry.inside, strict=True))
    by_name = isinstance(entry.structure, str)
    known: Sequence[str | int] = labels.names if by_name else labels.output_values
    yield GivenPrompt(known.index(entry.structure), int(slices[0]), box, points)


def _of_labels(labels: Labels, restore: Restore, sparse: np.ndarray) -> Iterator[GivenPrompt]:
  """Masks of the slices that a sparse label map has labels on."""
  # Sparse slices would be lost in resampling, so each is brought over by itself.
  moved = sparse[tuple(map(slice, restore.lower, restore.upper))].transpose(restore.order)
  for native in np.flatnonzero(moved.any(axis=(1, 2))):
    place = (native + 0.5) * restore.prepared_shape[0] / moved.shape[0] - 0.5
    at = int(np.clip(np.rint(place), 0, restore.prepared_shape[0] - 1))
    for organ, structure in enumerate(labels.structures):
      mask = np.isin(moved[native], structure.values)
      if mask.any():
        yield GivenPrompt(organ, at, mask=mask)
