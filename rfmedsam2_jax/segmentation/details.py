"""A segmented volume with all that is known of it: label maps, details, warnings, probabilities.

In: `Segmentation`s of one volume, one per run. Out: `Details`, for Python and for CASE.json.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Progress, Report, silent
from rfmedsam2_jax.data.volumes import Geometry, Volume
from rfmedsam2_jax.segmentation.chosen import Choice, with_structures, without_small
from rfmedsam2_jax.segmentation.measured import numbers_of
from rfmedsam2_jax.segmentation.notices import Notice, input_notices, stage_notices
from rfmedsam2_jax.segmentation.segmenter import Segmentation, fused
from rfmedsam2_jax.segmentation.structures import StructureDetails, structure_details


@dataclasses.dataclass(frozen=True, eq=False)
class Details:
  """What was found in a volume and how sure it is. Arrays have the input's own axes.

  Attributes:
    maps: label map of every stage, generator first, uint8 or uint16, canonical [z, y, x].
    final: likewise, that of the last stage without pieces that are too small.
    structures: by name, in the order of the plan; those that were chosen.
  """

  segmentations: Sequence[Segmentation]
  geometry: Geometry
  maps: tuple[np.ndarray, ...]
  final: np.ndarray
  min_volume: float  # ml
  structures: dict[str, StructureDetails]
  warnings: tuple[Notice, ...]

  @property
  def labels(self) -> np.ndarray:
    """The label map, uint8 or uint16."""
    return self.geometry.to_native(self.final)

  def stage(self, number: int) -> np.ndarray:
    """The label map after a stage, 0 for the generator's."""
    return self.geometry.to_native(self.maps[number])

  def probability(self, structure: str) -> np.ndarray:
    """Foreground probability of a structure after the last stage, float32.

    The mean over the runs, from which the label map is made.

    Raises:
      UserError: no structure of that name.
    """
    last = len(self.maps) - 1
    if structure not in self.structures:
      known = ", ".join(self.structures)
      raise UserError(f"{structure}: is no structure of this model; choose from {known}")
    organ = self.segmentations[0].segmenter.plan.labels.names.index(structure)
    total = functools.reduce(np.add, (run.probability(last, organ) for run in self.segmentations))
    return self.geometry.to_native(total / np.float32(len(self.segmentations)))

  @property
  def slice_axis(self) -> int:
    """The input's axis along which slices were refined; with several runs, the first one's."""
    return self.geometry.axes[self.segmentations[0].segmenter.plan.slice_axis]

  def as_dict(self) -> dict[str, Any]:
    """For JSON: numbers rounded to six digits, None where there is no statement."""
    first, own = self.segmentations[0], np.argsort(self.geometry.axes)
    plan, spacing = first.segmenter.plan, np.array(self.geometry.spacing)[own]
    grid = np.array(first.prepared.spacing)[np.argsort(plan.order)][own]
    return _rounded({
      "shape": list(self.geometry.shape), "spacing_mm": spacing.tolist(),
      "slice_axis": self.slice_axis, "fast": first.segmenter.fast, "grid_mm": grid.tolist(),
      "min_volume_ml": self.min_volume,
      "warnings": [dataclasses.asdict(notice) for notice in self.warnings],
      "stages": len(self.maps),
      "structures": {k: dataclasses.asdict(found) for k, found in self.structures.items()},
    })


def details_of(
  segmentations: Sequence[Segmentation], volume: Volume,
  watch: Callable[[int, np.ndarray], None] = lambda organ, probability: None,
  report: Report = silent, choice: Choice = Choice(),
) -> Details:
  """Label maps of every stage of `volume` and all that is known of them.

  `watch` takes the probability of every organ after the last stage, see `fuse`.
  """
  first = segmentations[0].segmenter
  labels = first.plan.labels
  stages, organs = first.stages, len(labels.structures)
  progress = Progress("label maps, structures", report)

  def seen(stage: int, organ: int, probability: np.ndarray) -> None:
    progress(stage * organs + organ, stages * organs)
    if stage == stages - 1:
      watch(organ, probability)

  watches = [functools.partial(seen, stage) for stage in range(stages)]
  # One after the other: what fuses a stage is as large as the volume.
  maps = [fused(segmentations, stage, watches[stage]).labels for stage in range(stages - 1)]
  last = fused(segmentations, stages - 1, watches[-1])
  maps.append(last.labels)
  maps = [with_structures(found, labels, choice) for found in maps]
  final, removed = without_small(maps[-1], labels, choice, volume.geometry.voxel_ml)
  last = last._replace(labels=final)
  known = structure_details(segmentations, maps, last, volume.geometry)
  channels = [channel.name for channel in first.plan.channels]
  numbers = numbers_of(final, labels, volume, channels, removed)
  structures = {name: dataclasses.replace(known[name], numbers=numbers[organ])
                for organ, name in enumerate(labels.names) if organ in choice.of(labels)}
  notices = [Notice("file", said) for said in volume.geometry.remarks]
  notices += [notice for found in segmentations
              for notice in input_notices(found.segmenter, found.prepared.restore, volume.array)]
  coarse = first.plan.generator_spacing is not None
  notices += stage_notices(structures, first.inference.warnings, coarse)
  # Runs that were trained on the same cases say the same.
  warnings = tuple(dict.fromkeys(notices))
  return Details(segmentations, volume.geometry, tuple(maps), final, choice.min_volume, structures,
                 warnings)


def _rounded(tree: Any) -> Any:
  if isinstance(tree, dict):
    return {key: _rounded(value) for key, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [_rounded(value) for value in tree]
  if isinstance(tree, float):
    return float(f"{tree:.6g}") if math.isfinite(tree) else None
  return tree
