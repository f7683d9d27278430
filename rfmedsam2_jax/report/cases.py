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
from rfmedsam2_jax.data.volumes import ENDINGS, NIFTI_ENDINGS, Geometry, load_image, load_label_map
from rfmedsam2_jax.evaluation.metrics import Score, known_mean
from rfmedsam2_jax.evaluation.scores import evaluate_arrays, structures_of
from rfmedsam2_jax.report.layers import viewer_layers
from rfmedsam2_jax.report.predictions import Prediction, noted
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

  @property
  def sure(self) -> float | None:
    """Dice, or without a reference the predicted IoU."""
    found = self.details.predicted_iou if self.details else None
    return known_mean([self.score.dice if self.score else found])


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
    return known_mean([row.score.dice for row in self.rows if row.score])

  @property
  def hd95(self) -> float | None:
    return known_mean([row.score.hd95 for row in self.rows if row.score])

  @property
  def predicted_iou(self) -> float | None:
    return known_mean([row.details.predicted_iou for row in self.rows if row.details])

  @property
  def worst(self) -> StructureRow | None:
    """The structure with the lowest Dice, or without a reference the lowest predicted IoU."""
    known = [row for row in self.rows if row.sure is not None]
    return min(known, key=lambda row: row.sure or 0.0, default=None)


@dataclasses.dataclass(frozen=True, eq=False)
class _Maps:
  """The label maps of a case, int32 [D, H, W], canonical, on the grid of the prediction.

  Attributes:
    stages: by number of the stage. final: the one whose label map the prediction is, None if none.
  """

  geometry: Geometry
  prediction: np.ndarray
  reference: np.ndarray | None
  stages: dict[int, np.ndarray]
  final: int | None

  @property
  def by_title(self) -> dict[str, np.ndarray]:
    """All of them as the viewer lists them, each once."""
    title = "prediction" if self.final is None else f"prediction ({_title(self.final)})"
    return {
      title: self.prediction,
      **({} if self.reference is None else {"reference": self.reference}),
      **{_title(number): found for number, found in self.stages.items() if number != self.final},
    }


def report_case(
  prediction: Prediction, page: str, labels: Labels | None, reference: Path | None,
  image: Path | None, voxels: int,
) -> tuple[CaseReport, dict[str, Any] | None]:
  """Reads a case's volumes once, scores them, and makes the layers of its viewer.

  Args:
    page: name of its files in the report.
    labels: names of the values; None names them by themselves.
    voxels: that the viewer shows at most; 0 makes no layers.

  Returns:
    the case, and the layers, None without a readable label map or with `voxels` 0.
  """
  problems, details = list(prediction.problems), prediction.details
  structures: tuple[Structure, ...] = ()
  scores: dict[int, dict[str, Score]] = {}
  volumes: dict[str, float] = {}
  layers = None
  if maps := _read_maps(prediction, reference, problems):
    known = [maps.prediction, *([] if maps.reference is None else [maps.reference])]
    structures = structures_of(labels, *known)
    scores = _score_stages(maps, structures, labels.ignore if labels else None)
    voxel = voxel_ml(maps.geometry.spacing)
    volumes = {
      s.name: float(np.isin(maps.prediction, s.values).sum()) * voxel for s in structures
    }
    if voxels:
      names = labels.value_names if labels else {v: s.name for s in structures for v in s.values}
      pixels = None if image is None else _read_image(image, maps.geometry, problems)
      layers = viewer_layers(maps.geometry, names, pixels, maps.by_title, details, voxels)
  rows = _rows(structures, details.structures if details else {}, volumes, scores.get(LAST, {}))
  warnings = details.warnings if details else ()
  return CaseReport(prediction.name, page, rows, scores, warnings, tuple(problems)), layers


def _read_maps(
  prediction: Prediction, reference: Path | None, problems: list[str]
) -> _Maps | None:
  """Reads what there is; None without a readable prediction."""
  if (file := prediction.labels) is None:
    return None
  guess = None
  with noted(problems, file.parent):
    geometry = load_image(file).geometry
    labels = load_label_map(file, geometry)
    if (count := len(np.unique(labels))) > _MOST_VALUES:
      raise UserError(f"{file}: has {count} values; is it an image, not a label map?")
    guess = labels
  if guess is None:
    return None
  found: dict[int, np.ndarray] = {}
  for number, path in {LAST: reference, **prediction.stages}.items():
    if path is not None:
      with noted(problems, path.parent, file.parent):
        found[number] = load_label_map(path, geometry)
  truth = found.pop(LAST, None)
  if prediction.details is not None and prediction.details.shape != geometry.shape:
    problems.append(
      f"{prediction.name}.json: is of a volume of {prediction.details.shape} voxels, the label map "
      f"has {geometry.shape}; predict the case again"
    )
  # The last stage's label map is the prediction, once more.
  final = max(found, default=None)
  if final is not None and not np.array_equal(found[final], guess):
    final = None
  return _Maps(geometry, guess, truth, found, final)


def _score_stages(
  maps: _Maps, structures: tuple[Structure, ...], ignore: int | None
) -> dict[int, dict[str, Score]]:
  """By number of the stage, `LAST` for the prediction; empty without a reference."""
  if maps.reference is None:
    return {}
  scores: dict[int, dict[str, Score]] = {}
  for number, found in {LAST: maps.prediction, **maps.stages}.items():
    scores[number] = scores[LAST] if number == maps.final else evaluate_arrays(
      found, maps.reference, maps.geometry.spacing, structures, ignore
    )
  return scores


def _title(stage: int) -> str:
  return f"stage {stage}" if stage else "generator"


def find_image(folder: Path, prediction: Prediction) -> Path | None:
  """The first channel of a case's input in a folder, by the names that CASE.json has or its own."""
  inputs = prediction.details.inputs if prediction.details else ()
  names = [Path(name).name for name in inputs[:1]]
  names += [f"{prediction.name}{end}" for end in ("", *(f"_0000{e}" for e in ENDINGS), *ENDINGS)]
  return next((folder / name for name in names if name and (folder / name).exists()), None)


def _read_image(path: Path, like: Geometry, problems: list[str]) -> np.ndarray | None:
  """The first channel, float32 [D, H, W]; None if it cannot be read or is on another grid."""
  with noted(problems, path.parent):
    image = load_image(path, _channels(path))
    if image.geometry.canonical_shape != like.canonical_shape:
      raise UserError(f"{path}: is not the image of this label map (its grid is another)")
    return image.array[0]
  return None


def _channels(path: Path) -> int:
  """How many channels a file has; 1 if it cannot be read, about which load_image says more."""
  if path.is_file() and path.name.endswith(NIFTI_ENDINGS):
    with contextlib.suppress(nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError):
      image = nib.load(path)
      if isinstance(image, nib.Nifti1Image) and len(image.shape) == 4:
        return image.shape[3]
  return 1


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
