"""One case of a report: its scores, how sure each structure is, and what its viewer shows.

In: a `Prediction` and where its image and reference lie. Out: a `CaseReport`, and the viewer's
layers.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.measures import voxel_ml
from rfmedsam2_jax.data.volumes import ENDINGS, NIFTI_ENDINGS, Volume, load_image, load_label_map
from rfmedsam2_jax.evaluation.metrics import Score
from rfmedsam2_jax.evaluation.scores import evaluate_arrays
from rfmedsam2_jax.report.layers import viewer_layers
from rfmedsam2_jax.report.predictions import Prediction, without_folders
from rfmedsam2_jax.segmentation.notices import Notice
from rfmedsam2_jax.segmentation.structures import StructureDetails

_MOST_VALUES = 1000  # of a label map
LAST = -1  # stands for the final label map among the numbers of stages


@dataclasses.dataclass(frozen=True)
class StructureRow:
  """One structure of one case; None where nothing is known."""

  name: str
  volume_ml: float | None
  score: Score | None
  details: StructureDetails | None


@dataclasses.dataclass(frozen=True)
class CaseReport:
  """One case.

  Attributes:
    page: name of its files in the report, without an ending.
    stage_scores: by number of the stage, `LAST` for the label map; empty without a reference.
    problems: what is missing or damaged, in sentences.
  """

  name: str
  page: str
  rows: tuple[StructureRow, ...]
  stage_scores: dict[int, dict[str, Score]]
  warnings: tuple[Notice, ...]
  problems: tuple[str, ...]
  has_viewer: bool = False

  @property
  def dice(self) -> float | None:
    """Mean over its structures; None without a reference."""
    return _mean([row.score.dice for row in self.rows if row.score])

  @property
  def hd95(self) -> float | None:
    return _mean([row.score.hd95 for row in self.rows if row.score])

  @property
  def predicted_iou(self) -> float | None:
    return _mean([row.details.predicted_iou for row in self.rows if row.details])

  @property
  def worst(self) -> StructureRow | None:
    """The structure with the lowest Dice, or without a reference the lowest predicted IoU."""
    def sure(row: StructureRow) -> float | None:
      if row.score:
        return None if np.isnan(row.score.dice) else row.score.dice
      return row.details.predicted_iou if row.details else None

    known = [(value, row) for row in self.rows if (value := sure(row)) is not None]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def examine_case(
  prediction: Prediction,
  page: str,
  labels: Labels | None,
  reference: Path | None,
  image: Path | None,
  voxels: int,
) -> tuple[CaseReport, dict[str, Any] | None]:
  """Reads a case's volumes once, scores them, and makes the layers of its viewer.

  Args:
    page: name of its files in the report.
    labels: names of the values; None names them by themselves.
    voxels: that the viewer shows at most; 0 makes no layers.

  Returns:
    the case, and the layers, None without a readable label map or with `voxels` 0.
  """
  problems = list(prediction.problems)
  details = prediction.details
  by_name = details.structures if details else {}
  warnings = details.warnings if details else ()
  if prediction.labels is None:
    rows = _rows((), by_name, {}, {})
    return CaseReport(prediction.name, page, rows, {}, warnings, tuple(problems)), None
  try:
    geometry = load_image(prediction.labels).geometry
    guess = load_label_map(prediction.labels, geometry)
    count = len(np.unique(guess))
    if count > _MOST_VALUES:
      raise UserError(f"{prediction.labels}: has {count} values; is it an image, not a label map?")
  except UserError as error:
    problems.append(without_folders(error, prediction.labels.parent))
    rows = _rows((), by_name, {}, {})
    return CaseReport(prediction.name, page, rows, {}, warnings, tuple(problems)), None

  def beside(path: Path) -> np.ndarray | None:
    try:
      return load_label_map(path, geometry)
    except UserError as error:
      problems.append(without_folders(error, path.parent, geometry.path.parent))
      return None

  truth = beside(reference) if reference else None
  found = {number: beside(path) for number, path in prediction.stages.items()}
  stages = {number: array for number, array in found.items() if array is not None}
  if details is not None and details.shape != geometry.shape:
    problems.append(
      f"{prediction.name}.json: is of a volume of {details.shape} voxels, the label map has "
      f"{geometry.shape}; predict the case again"
    )
  # The last stage's label map is the prediction, once more.
  final = max(stages, default=None)
  if final is not None and not np.array_equal(stages[final], guess):
    final = None
  structures = _structures(labels, [guess, *([] if truth is None else [truth])])
  scores: dict[int, dict[str, Score]] = {}
  if truth is not None:
    ignore = labels.ignore if labels else None
    scores[LAST] = evaluate_arrays(guess, truth, geometry.spacing, structures, ignore)
    for number, array in stages.items():
      scores[number] = scores[LAST] if number == final else evaluate_arrays(
        array, truth, geometry.spacing, structures, ignore
      )
  volumes = {
    s.name: float(np.isin(guess, s.values).sum()) * voxel_ml(geometry.spacing) for s in structures
  }
  rows = _rows(structures, by_name, volumes, scores.get(LAST, {}))
  layers = None
  if voxels:
    pixels = None
    if image is not None:
      try:
        pixels = _first_channel(image)
        if pixels.geometry.canonical_shape != geometry.canonical_shape:
          raise UserError(f"{image}: is not the image of this label map (its grid is another)")
      except UserError as error:
        problems.append(without_folders(error, image.parent))
        pixels = None
    names = labels.value_names if labels else {
      value: s.name for s in structures for value in s.values
    }
    maps = {"prediction" if final is None else f"prediction ({_title(final)})": guess}
    if truth is not None:
      maps["reference"] = truth
    maps |= {_title(number): array for number, array in stages.items() if number != final}
    layers = viewer_layers(
      geometry, names, None if pixels is None else pixels.array[0], maps, details, voxels
    )
  return CaseReport(prediction.name, page, rows, scores, warnings, tuple(problems)), layers


def _title(stage: int) -> str:
  return f"stage {stage}" if stage else "generator"


def find_image(folder: Path, prediction: Prediction) -> Path | None:
  """The first channel of a case's input in a folder, by the names that CASE.json has or its own."""
  inputs = prediction.details.inputs if prediction.details else ()
  names = [Path(name).name for name in inputs[:1]]
  names += [f"{prediction.name}{end}" for end in ("", *(f"_0000{e}" for e in ENDINGS), *ENDINGS)]
  return next((folder / name for name in names if name and (folder / name).exists()), None)


def _first_channel(path: Path) -> Volume:
  """The image that is shown, with all channels that its file has."""
  channels = 1
  if path.is_file() and path.name.endswith(NIFTI_ENDINGS):
    # load_image says what is wrong with a file that cannot be read.
    with contextlib.suppress(nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError):
      image = nib.load(path)
      if isinstance(image, nib.Nifti1Image) and len(image.shape) == 4:
        channels = image.shape[3]
  return load_image(path, channels)


def _structures(labels: Labels | None, maps: list[np.ndarray]) -> tuple[Structure, ...]:
  if labels is not None:
    return labels.structures
  values = sorted({int(v) for found in maps for v in np.unique(found)} - {0})
  return tuple(Structure(str(value), (value,)) for value in values)


def _rows(
  structures: tuple[Structure, ...], details: dict[str, StructureDetails],
  volumes: dict[str, float], scores: dict[str, Score],
) -> tuple[StructureRow, ...]:
  names = [s.name for s in structures]
  names += [name for name in details if name not in names]
  return tuple(
    StructureRow(
      name,
      # Of regions the label map alone does not tell where one lies under another.
      details[name].volume_ml if name in details else volumes.get(name),
      scores.get(name),
      details.get(name),
    )
    for name in names
  )


def _mean(values: list[float | None]) -> float | None:
  known = [value for value in values if value is not None and not np.isnan(value)]
  return float(np.mean(known)) if known else None
