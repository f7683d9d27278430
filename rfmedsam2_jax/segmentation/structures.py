"""What is known of a segmentation beside its label map: how sure each part of it was, and of what.

In: `Segmentation`s of one volume, the label map of every stage. Out: `StructureDetails`, which the
API gives and `predict` writes as CASE.json.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from rfmedsam2_jax.data.cuts import Cut
from rfmedsam2_jax.data.measures import joint_counts
from rfmedsam2_jax.data.volumes import Geometry
from rfmedsam2_jax.nn.boxes import boxes_from_square
from rfmedsam2_jax.refinement import Fused, StageResult
from rfmedsam2_jax.segmentation.chosen import owned_values
from rfmedsam2_jax.segmentation.measured import Numbers
from rfmedsam2_jax.segmentation.segmenter import Segmentation


@dataclasses.dataclass(frozen=True)
class BoxDetails:
  """What the last stage was prompted with on one slice, and what it said there.

  Attributes:
    box: first voxels along the two other axes, in their order, then the last ones, inclusive.
    predicted_iou, presence: of the slice's mask; None where no stage was run.
  """

  slice: int  # voxel along the slice axis
  box: tuple[int, int, int, int]
  predicted_iou: float | None
  presence: float | None


@dataclasses.dataclass(frozen=True)
class StageDetails:
  """One structure after one stage (0: the generator, which predicts neither IoU nor presence)."""

  stage: int
  volume_ml: float
  predicted_iou: float | None
  presence: float | None
  dice_with_last: float | None  # None if both are empty


@dataclasses.dataclass(frozen=True)
class StructureDetails:
  """One structure of one segmentation; None where there is no statement.

  Attributes:
    presence: of its slices, as the last stage gave it, weighted by the area of their masks; if
      every mask is empty, the largest of any slice; None if no slice was run.
    predicted_iou: likewise; None if every mask is empty.
    numbers: what a report says of it; None in files of earlier versions.
    probability: mean of the winning probability over its voxels; None if it has none.
    stages: each as it left the structure, whatever pieces are gone since.
    boxes: on the slices where the last stage had one.
  """

  label: int  # its value in the label map
  volume_ml: float
  numbers: Numbers | None = dataclasses.field(default=None, kw_only=True)
  presence: float | None
  predicted_iou: float | None
  probability: float | None
  stages: tuple[StageDetails, ...]
  boxes: tuple[BoxDetails, ...]


def structure_details(
  segmentations: Sequence[Segmentation], maps: Sequence[np.ndarray], last: Fused, geometry: Geometry
) -> dict[str, StructureDetails]:
  """Details of every structure, by name.

  Predicted IoU and presence are means over the segmentations; boxes are those of the first one.

  Args:
    maps: the label map [z, y, x] of every stage, generator first. last: the one that is given
      out, which is the last stage's or a part of it.
  """
  labels = segmentations[0].segmenter.plan.labels
  values = np.array(sorted({0, *labels.output_values}))
  # bool [K, V]: whether a voxel of that label belongs to structure k; regions may share it.
  member = np.array([np.isin(values, mine) for mine in owned_values(labels)])
  rank = np.zeros(values[-1] + 1, np.min_scalar_type(len(values)))
  rank[values] = np.arange(len(values))
  final = rank[maps[-1]]
  tables = [joint_counts([rank[found], final], len(values)) for found in maps]
  final = rank[last.labels]
  counts = joint_counts([final], len(values))
  planes = (np.bincount(ranks.ravel(), weights.ravel(), minlength=len(values))
            for ranks, weights in zip(final, last.winning, strict=True))
  probability = member @ sum(planes, np.zeros(len(values)))
  size = geometry.voxel_ml
  result = {}
  for organ, (name, mine) in enumerate(zip(labels.names, member, strict=True)):
    stages = []
    for stage, table in enumerate(tables):
      runs = segmentations if stage else ()
      said = [_of_cells(found.results[stage - 1], organ) for found in runs]
      iou, presence = _mean(iou for iou, _ in said), _mean(presence for _, presence in said)
      before, after = int(table[mine].sum()), int(table[:, mine].sum())
      both = int(table[np.ix_(mine, mine)].sum())
      dice = 2 * both / (before + after) if before + after else None
      stages.append(StageDetails(stage, before * size, iou, presence, dice))
    voxels = int(counts[mine].sum())
    sure = float(probability[organ]) / voxels if voxels else None
    result[name] = StructureDetails(
      int(labels.output_values[organ]), voxels * size, presence, iou, sure, tuple(stages),
      _boxes(segmentations[0], organ, geometry))
  return result


def _of_cells(result: StageResult, organ: int) -> tuple[float | None, float | None]:
  """Predicted IoU and presence of one organ, weighted by the area of its slices' masks."""
  mine = np.flatnonzero(result.cells[:, 0] == organ)
  if not len(mine):
    return None, None
  area = (result.logits[mine] > 0).sum(axis=(1, 2)).astype(np.float64)
  if not area.any():
    return None, float(result.presence[mine].max())
  iou, presence = (np.average(x[mine], weights=area) for x in (result.iou, result.presence))
  return float(iou), float(presence)


def _mean(found: Iterable[float | None]) -> float | None:
  """Over the runs that make a statement."""
  known = [x for x in found if x is not None]
  return float(np.mean(known)) if known else None


def _boxes(found: Segmentation, organ: int, geometry: Geometry) -> tuple[BoxDetails, ...]:
  """The box on every slice of the file whose nearest prepared slice has one."""
  # By prepared slice: box (pixels of the S x S image), predicted IoU and presence.
  prompted: dict[int, tuple[np.ndarray, float | None, float | None]]
  if found.results:
    last = found.results[-1]
    rows = np.flatnonzero((last.cells[:, 0] == organ) & last.has_box)
    prompted = {int(last.cells[row, 1]): (last.boxes[row], float(last.iou[row]),
                                          float(last.presence[row])) for row in rows}
  else:
    prompts = found.generated.prompts
    slices = np.flatnonzero(prompts.has_box[organ]).tolist()
    prompted = {z: (prompts.boxes[organ, z], None, None) for z in slices}
  axis, restore = found.segmenter.plan.slice_axis, found.prepared.restore
  natives = np.arange(restore.lower[axis], restore.upper[axis])
  points = np.zeros((len(natives), 3))
  points[:, axis] = natives
  nearest = np.rint(restore.native_to_prepared(points)[:, 0]).astype(int)
  nearest = np.clip(nearest, 0, restore.prepared_shape[0] - 1)
  cut = found.generated.cuts[organ]
  boxes = (BoxDetails(*_on_the_file(found, native, prompted[z][0], cut, geometry), *prompted[z][1:])
           for native, z in zip(natives.tolist(), nearest.tolist(), strict=True) if z in prompted)
  return tuple(sorted(boxes, key=lambda box: box.slice))


def _on_the_file(
  found: Segmentation, native: int, box: np.ndarray, cut: Cut, geometry: Geometry
) -> tuple[int, tuple[int, int, int, int]]:
  """A canonical native slice and a box on it, in pixels of its cut, as voxels of the file."""
  axis, restore = found.segmenter.plan.slice_axis, found.prepared.restore
  side = found.segmenter.sam2.config.image_size
  x0, y0, x1, y1 = boxes_from_square(box, *cut.shape, side) + np.tile([cut.left, cut.top], 2)
  # Outer edges of the voxels, which mean the same on every grid.
  edges = np.array([[0, y0 - 0.5, x0 - 0.5], [0, y1 + 0.5, x1 + 0.5]])
  low, high = restore.prepared_to_native(edges) + 0.5
  last = np.array(geometry.canonical_shape) - 1
  # What is narrower than a voxel may begin and end nearest to the same edge of one.
  middle = np.floor((low + high) / 2)
  low = np.clip(np.minimum(np.rint(low), middle), 0, last).astype(int)
  high = np.clip(np.maximum(np.rint(high) - 1, middle), low, last).astype(int)
  low[axis] = high[axis] = native
  flipped = np.array(geometry.flipped)
  low, high = np.where(flipped, last - high, low), np.where(flipped, last - low, high)
  order = np.argsort(geometry.axes)  # the canonical axis along each of the file's
  low, high, along = low[order], high[order], geometry.axes[axis]
  a, b = (i for i in range(3) if i != along)
  return int(low[along]), (int(low[a]), int(low[b]), int(high[a]), int(high[b]))
