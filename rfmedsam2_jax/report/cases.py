"""One case of a report: its scores, how sure each structure is, and what its viewer shows.

In: a `Prediction` and where its image and reference lie. Out: a `CaseReport` and viewer layers.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import Labels, Structure, load_labels
from rfmedsam2_jax.data.label_objects import is_label_object
from rfmedsam2_jax.data.names import NIFTI_ENDINGS, ending_of, is_volume_name, stem_of
from rfmedsam2_jax.data.volumes import Geometry, load_grid, load_image, load_label_map, open_nifti
from rfmedsam2_jax.evaluation.metrics import Score, known_mean
from rfmedsam2_jax.evaluation.scores import evaluate_arrays, structures_of
from rfmedsam2_jax.report.layers import viewer_layers
from rfmedsam2_jax.report.predictions import Prediction, noted
from rfmedsam2_jax.segmentation.notices import Notice
from rfmedsam2_jax.segmentation.structures import StructureDetails

_MOST_VALUES = 1000  # of a label map
LAST = -1  # stands for the final label map among the numbers of stages


class StructureRow(NamedTuple):
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
  """One case; means are over its structures, None where nothing is known.

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
  problems: list[str]
  has_viewer: bool

  @property
  def dice(self) -> float | None:
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


class _Maps(NamedTuple):
  """The label maps of a case, int32 [D, H, W], canonical, on the grid of the prediction."""

  geometry: Geometry
  prediction: np.ndarray
  reference: np.ndarray | None
  stages: dict[int, np.ndarray]  # by number
  final: int | None  # the stage whose label map the prediction is


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
  if maps := _read_maps(prediction, labels, reference, image, problems):
    geometry, guess, truth, stages, final = maps
    structures = structures_of(labels, guess, *([] if truth is None else [truth]))
    ignore = labels.ignore if labels else None
    if truth is not None:
      for number, found in {LAST: guess, **stages}.items():
        scores[number] = scores[LAST] if number == final else evaluate_arrays(
          found, truth, geometry.voxel_steps, structures, ignore
        )
    volumes = {s.name: float(np.isin(guess, s.values).sum()) * geometry.voxel_ml
               for s in structures}
    if voxels:
      names = labels.value_names if labels else {v: s.name for s in structures for v in s.values}
      pixels = None if image is None else _read_image(image, geometry, problems)
      layers = viewer_layers(geometry, names, pixels, _by_title(maps), details, voxels)
  known = details.structures if details else {}
  rows = tuple(
    StructureRow(
      name,
      # Of regions the label map alone does not tell where one lies under another.
      known[name].volume_ml if name in known else volumes.get(name),
      scores.get(LAST, {}).get(name), known.get(name),
    )
    for name in dict.fromkeys([*(s.name for s in structures), *known])
  )
  warnings, viewer = details.warnings if details else (), layers is not None
  return CaseReport(prediction.name, page, rows, scores, warnings, problems, viewer), layers


def _read_maps(
  prediction: Prediction, labels: Labels | None, reference: Path | None, image: Path | None,
  problems: list[str],
) -> _Maps | None:
  """Reads what there is; None without a readable prediction."""
  def load(path: Path) -> np.ndarray:
    return load_labels(path, geometry, labels) if labels else load_label_map(path, geometry)

  if (file := prediction.labels) is None:
    return None
  with noted(problems, file.parent):
    geometry = _grid(file, image)
    guess = load(file)
    if (count := len(np.unique(guess))) > _MOST_VALUES:
      raise UserError(f"{file}: has {count} values; is it an image, not a label map?")
    found: dict[int, np.ndarray] = {}
    for number, path in {LAST: reference, **prediction.stages}.items():
      if path is not None:
        with noted(problems, path.parent, file.parent):
          found[number] = load(path)
    truth = found.pop(LAST, None)
    if prediction.details is not None and prediction.details.shape != geometry.shape:
      problems.append(
        f"{prediction.name}.json: is of a volume of {prediction.details.shape} voxels, the label "
        f"map has {geometry.shape}; predict the case again"
      )
    # The last stage's label map is the prediction, once more.
    final = max(found, default=None)
    if final is not None and not np.array_equal(found[final], guess):
      final = None
    return _Maps(geometry, guess, truth, found, final)
  return None


def _grid(file: Path, image: Path | None) -> Geometry:
  """That of a label map; of DICOM that of its image, as slices without a structure are left out."""
  if not is_label_object(file):
    return load_grid(file)
  if image is None:
    raise UserError(f"{file}: is of DICOM, which leaves out empty slices; give the images, too")
  return load_image(image).geometry


def _by_title(maps: _Maps) -> dict[str, np.ndarray]:
  """All label maps as the viewer lists them, each once."""
  titles = {number: f"stage {number}" if number else "generator" for number in maps.stages}
  title = "prediction" if maps.final is None else f"prediction ({titles.pop(maps.final)})"
  truth = {} if maps.reference is None else {"reference": maps.reference}
  stages = {name: maps.stages[number] for number, name in titles.items()}
  return {title: maps.prediction, **truth, **stages}


def find_image(folder: Path, prediction: Prediction) -> Path | None:
  """The first channel of a case's input in a folder, by the names that CASE.json has or its own."""
  inputs = prediction.details.inputs if prediction.details else ()
  names = [Path(name).name for name in (*inputs[:1], prediction.name)]
  if there := [folder / name for name in names if name and (folder / name).exists()]:
    return there[0]
  known = {stem_of(file): file for file in sorted(folder.iterdir()) if is_volume_name(file)}
  return known.get(f"{prediction.name}_0000", known.get(prediction.name))


def _read_image(path: Path, like: Geometry, problems: list[str]) -> np.ndarray | None:
  """The first channel, float32 [D, H, W]; None if it cannot be read or is on another grid."""
  channels = 1
  if path.is_file() and ending_of(path).lower() in NIFTI_ENDINGS:
    # What cannot be read load_image says.
    with contextlib.suppress(nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError):
      image = open_nifti(path)
      if isinstance(image, nib.Nifti1Image) and len(image.shape) == 4:
        channels = image.shape[3]
  with noted(problems, path.parent):
    volume = load_image(path, channels)
    if volume.geometry.canonical_shape != like.canonical_shape:
      raise UserError(f"{path}: is not the image of this label map (its grid is another)")
    return volume.array[0]
  return None
