"""The Python API: load runs, segment arrays and files, predict folders.

    model = rfmedsam2_jax.load("runs/hippocampus")
    labels = rfmedsam2_jax.segment(model, array, spacing=(3.0, 1.0, 1.0))
    details = rfmedsam2_jax.segment_details(model, "scan.nii.gz")   # and how sure it is
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Passing, Report, TimeLeft, below, silent
from rfmedsam2_jax.data.datasets import read_case
from rfmedsam2_jax.data.derived import Making
from rfmedsam2_jax.data.files import replacing
from rfmedsam2_jax.data.probabilities import probability_paths, write_probability
from rfmedsam2_jax.data.segmentations import (
  ITKSNAP_NAME,
  check_format,
  write_itksnap_labels,
  write_segmentation,
)
from rfmedsam2_jax.data.studies import modality_of
from rfmedsam2_jax.data.volumes import Geometry, Volume, check_intensities, load_image
from rfmedsam2_jax.segmentation.chosen import (
  Choice,
  make_choice,
  value_names,
  with_structures,
  without_small,
)
from rfmedsam2_jax.segmentation.details import Details, details_of
from rfmedsam2_jax.segmentation.given_prompts import prompts_by_hand
from rfmedsam2_jax.segmentation.measured import write_table
from rfmedsam2_jax.segmentation.request import Format, Prompts, Request, check_alike, make_request
from rfmedsam2_jax.segmentation.segmenter import Segmenter, label_map, segment_volume

Models = Segmenter | Sequence[Segmenter]


def _log_warning(case: str, message: str) -> None:
  logging.getLogger(__name__).warning("%s: %s", case, message)


def segment(
  model: Models, array: np.ndarray, spacing: tuple[float, float, float],
  structures: Sequence[str] | None = None, min_volume: float = 0.0, fast: bool = False,
) -> np.ndarray:
  """Segments an array.

  Args:
    model: from `load`; several are averaged.
    array: [D, H, W] or [C, D, H, W], axial slices first, rows from front to back, columns from the
      patient's right to left (LPS, as DICOM and SimpleITK give it), intensities as in the files
      that were trained on.
    spacing: mm along D, H, W.
    structures, min_volume, fast: as for `predict`.

  Returns:
    Label map uint8 or uint16 [D, H, W].
  """
  models = _models(model, fast)
  choice = make_choice(models[0].plan.labels, structures, min_volume)
  return _label_map(models, _volume_of(array, spacing), choice)


def segment_file(
  model: Models, image: str | Path | Sequence[str | Path], out: str | Path | None = None,
  structures: Sequence[str] | None = None, min_volume: float = 0.0, fast: bool = False,
) -> np.ndarray:
  """Segments a file or a DICOM folder (or one per channel); the label map has the file's own axes.

  Args:
    out: where to write it, too, on the file's own grid: .nii.gz, .nii, .seg.nrrd, or of a DICOM
      series .seg.dcm, .labelmap.dcm or .rtstruct.dcm.
    structures, min_volume, fast: as for `predict`.
  """
  models = _models(model, fast)
  choice = make_choice(models[0].plan.labels, structures, min_volume)
  volume = load_image(image, len(models[0].plan.channels))
  labels = _label_map(models, volume, choice)
  if out is not None:
    write_segmentation(out, labels, volume.geometry, value_names(models[0].plan.labels, choice),
                       _making(models, "generated"))
  return volume.geometry.to_native(labels)


def segment_details(
  model: Models, image: np.ndarray | str | Path | Sequence[str | Path],
  spacing: tuple[float, float, float] | None = None, structures: Sequence[str] | None = None,
  min_volume: float = 0.0, fast: bool = False,
) -> Details:
  """Segments an array or a file, and tells how sure each structure is and what is unusual.

  Args:
    image: an array as for `segment`, with its `spacing`; or a NIfTI file (or one per channel).
    structures, min_volume, fast: as for `predict`.
  """
  models = _models(model, fast)
  choice = make_choice(models[0].plan.labels, structures, min_volume)
  if spacing is not None:
    volume = _volume_of(image, spacing)
  elif isinstance(image, np.ndarray):
    raise UserError("spacing: is missing; give three sizes in mm with an array")
  else:
    volume = load_image(image, len(models[0].plan.channels))
  return details_of([segment_volume(m, volume) for m in models], volume, choice=choice)


def predict(
  model: Models, inputs: Sequence[str | Path], out: str | Path, prompts: Prompts = "generated",
  labels: str | Path | None = None, given: str | Path | None = None, save_stages: bool = False,
  overwrite: bool = False, progress: Report = silent, probabilities: bool = False,
  warn: Callable[[str, str], None] = _log_warning, format: Format = "nifti",
  series: str | None = None, structures: Sequence[str] | None = None, min_volume: float = 0.0,
  fast: bool = False,
) -> list[Path]:
  """Segments files and folders into `out`/CASE.nii.gz, which it gives, with CASE.json of details.

  `out`/numbers.csv has volume, pieces and intensities of every structure of every case in `out`,
  `out`/itksnap_labels.txt names the values, with colours, for ITK-SNAP.

  Args:
    prompts: "generated" (automatic), "oracle" (boxes from the truth in `labels`) or "given"
      (a person's, from `labels` and `given`, on top of the generator's).
    labels: folder of label maps, CASE.nii.gz; as given prompts, only slices with a label count.
    given: JSON of boxes and points by case, see data.prompt_entries.
    save_stages: also write `out`/stage0, stage1, ...
    overwrite: replace results that exist.
    probabilities: also write `out`/probabilities/CASE, a file per structure.
    warn: takes a case and what is unusual about it, or a folder and what of it is no input.
    format: of label maps; "nrrd" writes CASE.seg.nrrd, a segmentation of 3D Slicer, "dicom-seg",
      "dicom-labelmap" and "dicom-rtstruct" write DICOM for what was read from DICOM.
    series: which of the series of a study, by its UID, number, description or modality; every
      folder among the inputs is a study then. Without it the run's modality may choose.
    structures: names of those that are given out; a voxel of another one is background. The others
      are still segmented, as they decide where these end. None: all.
    min_volume: ml; pieces that are smaller become background (of a region, what is around it), and
      CASE.json counts them. Stages and probabilities are as they were.
    fast: at half the resolution across slices, see `Segmenter.faster`; CASE.json says so.

  Raises:
    UserError: see `make_request`; a volume or label map that cannot be read.
  """
  models = _models(model, fast)
  request = make_request(models[0].plan, inputs, out, prompts, labels, given, overwrite, format,
                         series, structures, min_volume)
  for what in request.left_out:
    warn(str(what.folder), what.message)
  left, count = TimeLeft(compiles=True), len(request.cases)
  for number, case in enumerate(request.cases, 1):
    heading = f"{number}/{count} {case.identifier}"
    begins = f"{heading}{left(number - 1, count)}"
    progress(begins if count > 1 else Passing(begins))
    report = below(progress, f"{heading}: ")
    found = _predict_case(models, request, number - 1, save_stages, probabilities, report)
    for notice in found["warnings"]:
      warn(case.identifier, notice["message"])
  write_table(request.out)
  names = value_names(models[0].plan.labels, request.choice)
  write_itksnap_labels(request.out / ITKSNAP_NAME, names)
  return list(request.targets)


def _models(model: Models, fast: bool) -> list[Segmenter]:
  models = [model] if isinstance(model, Segmenter) else list(model)
  models = [m.faster() for m in models] if fast else models
  check_alike([m.plan for m in models])
  if any(m.stages != models[0].stages for m in models):
    raise UserError("runs: have unlike numbers of stages; average like with like")
  return models


def _volume_of(array: Any, spacing: Sequence[float]) -> Volume:
  """An array as a volume whose own axes are the canonical ones."""
  try:
    array = np.asarray(array)
    if array.dtype.kind not in "buifO":
      raise TypeError(f"its type is {array.dtype}")
    with np.errstate(over="ignore"):
      array = array.astype(np.float32, copy=False)
    shape = array.shape
    if array.ndim == 3:
      array = array[None]
    if array.ndim != 4 or 0 in shape:
      raise UserError(f"array: has shape {shape}; give [D, H, W] or [C, D, H, W]")
    check_intensities("array", array)
  except (TypeError, ValueError) as error:
    raise UserError(f"array: is none of real numbers ({error}); give [D, H, W]") from None
  except MemoryError:
    raise UserError("array: is too large for the memory; give a smaller one") from None
  try:
    a, b, c = (float(size) for size in spacing)
    if not all(np.isfinite(s) and s > 0 for s in (a, b, c)):
      raise ValueError
  except (TypeError, ValueError):
    raise UserError(f"spacing: is {spacing!r}; give three sizes in mm above 0") from None
  affine = np.zeros((4, 4))  # from (z, y, x) of LPS+ to (x, y, z) of RAS+
  affine[[2, 1, 0, 3], range(4)] = a, -b, -c, 1.0
  header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine).header
  geometry = Geometry(Path("array"), header, affine, array.shape[1:], (0, 1, 2), (False,) * 3)
  return Volume(array, (a, b, c), geometry)


def _predict_case(
  models: list[Segmenter], request: Request, number: int, save_stages: bool, probabilities: bool,
  report: Report,
) -> dict[str, Any]:
  """Segments one case of a request, writes all that is known of it and gives its CASE.json."""
  case, target, out = request.cases[number], request.targets[number], request.out
  labels, channels = models[0].plan.labels, len(models[0].plan.channels)
  names = value_names(labels, request.choice)
  atoms = by_hand = None
  modality = modality_of([channel.name for channel in models[0].plan.channels])
  if request.prompts == "oracle":
    volume, atoms = read_case(case, channels, labels, request.series, modality)
  else:
    volume = load_image(case.images, channels, request.series, modality)
  check_format(request.format, volume.geometry)
  how = _making(models, request.prompts)
  if request.prompts == "given":
    entries = request.entries.get(case.identifier, [])
    by_hand = prompts_by_hand(labels, volume.geometry, entries, case.label)
  segmentations = [segment_volume(m, volume, atoms, by_hand, report) for m in models]
  paths = probability_paths(case.identifier, names) if probabilities else None

  def keep(organ: int, probability: np.ndarray) -> None:
    if paths is not None and (name := labels.names[organ]) in paths:
      write_probability(out / paths[name], probability, volume.geometry)

  found = details_of(segmentations, volume, keep, report, request.choice)
  stages = []
  for stage, labels_of_stage in enumerate(found.maps if save_stages else ()):
    stages.append(f"stage{stage}/{target.name}")
    write_segmentation(out / stages[-1], labels_of_stage, found.geometry, names, how)
  content = {
    "case": case.identifier, "inputs": [image.name for image in case.images],
    "runs": [m.name for m in models], **found.as_dict(),
    "files": {"labels": target.name, "stages": stages, "probabilities": paths},
  }
  with replacing(out / f"{case.identifier}.json") as temporary:
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
  write_segmentation(target, found.final, found.geometry, names, how)
  return content


def _label_map(models: list[Segmenter], volume: Volume, choice: Choice) -> np.ndarray:
  """What is given out of a volume, canonical [z, y, x]."""
  labels = models[0].plan.labels
  found = label_map([segment_volume(m, volume) for m in models], models[0].stages - 1)
  found = with_structures(found, labels, choice)
  return without_small(found, labels, choice, volume.geometry.voxel_ml)[0]


def _making(models: list[Segmenter], prompts: Prompts) -> Making:
  codes = models[0].inference.codes
  details = {"runs": " ".join(m.name for m in models)}
  details |= {"slices": "half"} if models[0].fast else {}
  return Making(prompts == "generated", codes, details)
