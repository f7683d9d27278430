"""Automatic segmentation for the server: the runs that it was started with, by their names.

In: an open volume. Out: the label map and the details that `rfmedsam2 predict` would write.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Report
from rfmedsam2_jax.data.derived import Making
from rfmedsam2_jax.data.geometry import Geometry
from rfmedsam2_jax.data.segments import segments_of
from rfmedsam2_jax.data.volumes import Volume, load_label_map
from rfmedsam2_jax.segmentation.chosen import Choice, make_choice, value_names
from rfmedsam2_jax.segmentation.details import details_of
from rfmedsam2_jax.segmentation.segmenter import Segmenter, segment_volume

Models = Mapping[str, Segmenter]
LARGEST_LABEL = 255  # the page draws bytes


@dataclasses.dataclass(frozen=True, eq=False)
class LabelMap:
  """What a model found in a volume, or a file holds of it."""

  labels: np.ndarray  # uint8 [D, H, W], canonical
  names: Mapping[int, str]  # by value
  how: Making
  details: dict[str, Any] | None = None  # as in CASE.json


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
  """A request that was looked at and can be computed."""

  model: Segmenter
  choice: Choice
  fast: bool

  def of(self, volume: Volume, report: Report) -> LabelMap:
    """Segments a volume, as `predict` does."""
    model = self.model.faster() if self.fast else self.model
    found = details_of([segment_volume(model, volume, progress=report)], volume, report=report,
                       choice=self.choice)
    slices = {"slices": "half"} if self.fast else {}
    how = Making(True, model.inference.codes, {"runs": model.name, **slices})
    return LabelMap(found.final.astype(np.uint8), value_names(model.plan.labels, self.choice), how,
                    {"runs": [model.name], **found.as_dict()})


def read_labels(path: Path, geometry: Geometry) -> LabelMap:
  """The label map of a file on the grid of a volume.

  UserError as `load_label_map`, and for values that are none from 0 to `LARGEST_LABEL`.
  """
  labels = load_label_map(path, geometry)
  if (least := int(labels.min())) < 0 or (largest := int(labels.max())) > LARGEST_LABEL:
    raise UserError(f"{path}: has the label {least if least < 0 else largest}, and serve shows "
                    f"labels from 1 to {LARGEST_LABEL}; is it an image?")
  said = {segment.value: segment.name for segment in segments_of(path)}
  names = {value: said.get(value) or f"label {value}" for value in np.unique(labels).tolist()}
  names.pop(0, None)
  return LabelMap(labels.astype(np.uint8), names, Making())


def by_name(models: Sequence[Segmenter]) -> Models:
  """The models of a server; UserError for those that it cannot run, and for names used twice."""
  found: dict[str, Segmenter] = {}
  for model in models:
    channels = len(model.plan.channels)
    if channels > 1:
      raise UserError(f"--model {model.name}: reads images of {channels} channels, and serve opens "
                      "volumes of one; use predict")
    if (largest := max(model.plan.labels.output_values)) > LARGEST_LABEL:
      raise UserError(f"--model {model.name}: has the label {largest}, and serve shows labels up "
                      f"to {LARGEST_LABEL}; use predict")
    if model.name in found:
      raise UserError(f"--model {model.name}: is the name of two models; rename a folder")
    found[model.name] = model
  return found


def wanted(
  models: Models, name: str | None, structures: Sequence[str] | None,
  min_volume: float, fast: bool,
) -> Wanted:
  """UserError for a model or structures that are not there, and as `make_choice`."""
  if not models:
    raise UserError("the server has no model for automatic segmentation; start it with --model")
  if name is not None and name not in models:
    raise UserError(f"model {name}: is not one of the server's; choose from {', '.join(models)}")
  model = next(iter(models.values())) if name is None else models[name]
  return Wanted(model, make_choice(model.plan.labels, structures, min_volume), fast)
