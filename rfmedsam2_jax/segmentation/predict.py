"""The Python API: load runs, segment arrays and files, predict folders.

    model = rfmedsam2_jax.load("runs/hippocampus")
    rfmedsam2_jax.segment_file(model, "scan.nii.gz", "labels.nii.gz")
    labels = rfmedsam2_jax.segment(model, array, spacing=(3.0, 1.0, 1.0))
    details = rfmedsam2_jax.segment_details(model, "scan.nii.gz")   # and how sure it is
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Passing, Report, TimeLeft, below, silent
from rfmedsam2_jax.data.datasets import Case, find_inputs, read_case, with_labels
from rfmedsam2_jax.data.files import claim, replacing
from rfmedsam2_jax.data.itk import simpleitk
from rfmedsam2_jax.data.preprocessing import Prepared
from rfmedsam2_jax.data.probabilities import probability_paths, write_probability
from rfmedsam2_jax.data.segmentations import (
  FORMAT_ENDINGS,
  ITKSNAP_NAME,
  Format,
  write_itksnap_labels,
  write_segmentation,
)
from rfmedsam2_jax.data.volumes import (
  Geometry,
  Volume,
  check_intensities,
  load_image,
  load_label_map,
)
from rfmedsam2_jax.refinement.first_prompts import GivenPrompt
from rfmedsam2_jax.segmentation.details import Details, examine
from rfmedsam2_jax.segmentation.given_prompts import prompts_of_file, prompts_of_labels, read_given
from rfmedsam2_jax.segmentation.segmenter import Segmentation, Segmenter, label_map, segment_volume

_logger = logging.getLogger(__name__)

Models = Segmenter | Sequence[Segmenter]
Prompts = Literal["generated", "oracle", "given"]


def _log_warning(case: str, message: str) -> None:
  _logger.warning("%s: %s", case, message)


def segment(model: Models, array: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
  """Segments an array.

  Args:
    model: from `load`; several are averaged.
    array: [D, H, W] or [C, D, H, W], axial slices first, rows from front to back, columns from the
      patient's right to left (LPS, as DICOM and SimpleITK give it), intensities as in the files
      that were trained on.
    spacing: mm along D, H, W.

  Returns:
    Label map uint8 or uint16 [D, H, W].
  """
  return _last_labels(_models(model), _volume_of(array, spacing))


def segment_file(
  model: Models, image: str | Path | Sequence[str | Path], out: str | Path | None = None
) -> np.ndarray:
  """Segments a file or a folder with a DICOM series (or one per channel).

  Args:
    out: where to write the label map on the file's own grid, .nii.gz, .nii or .seg.nrrd; None
      writes nothing.

  Returns:
    Label map in the file's own axis order.
  """
  models = _models(model)
  volume = load_image(image, len(models[0].plan.channels))
  labels = _last_labels(models, volume)
  if out is not None:
    write_segmentation(out, labels, volume.geometry, models[0].plan.labels.value_names)
  return volume.geometry.to_native(labels)


def segment_details(
  model: Models,
  image: np.ndarray | str | Path | Sequence[str | Path],
  spacing: tuple[float, float, float] | None = None,
) -> Details:
  """Segments an array or a file, and tells how sure each structure is and what is unusual.

  Args:
    image: an array as for `segment`, with its `spacing`; or a NIfTI file (or one per channel).

  Returns:
    Label maps, probabilities, predicted IoU, presence, volumes in ml and warnings.
  """
  models = _models(model)
  if isinstance(image, np.ndarray) or spacing is not None:
    if spacing is None:
      raise UserError("spacing: is missing; give three sizes in mm with an array")
    volume = _volume_of(image, spacing)
  else:
    volume = load_image(image, len(models[0].plan.channels))
  return examine([segment_volume(m, volume) for m in models], volume)


def predict(
  model: Models,
  inputs: Sequence[str | Path],
  out: str | Path,
  prompts: Prompts = "generated",
  labels: str | Path | None = None,
  given: str | Path | None = None,
  save_stages: bool = False,
  overwrite: bool = False,
  progress: Report = silent,
  probabilities: bool = False,
  warn: Callable[[str, str], None] = _log_warning,
  format: Format = "nifti",
) -> list[Path]:
  """Segments files and folders into `out`/CASE.nii.gz, with `out`/CASE.json of details.

  `out`/itksnap_labels.txt names the values, with colours, for ITK-SNAP.

  Args:
    prompts: "generated" (automatic), "oracle" (boxes from the truth in `labels`) or "given"
      (a person's, from `labels` and `given`, on top of the generator's).
    labels: folder of label maps, CASE.nii.gz; as given prompts, only slices with a label count.
    given: JSON of boxes and points, see `read_given`.
    save_stages: also write `out`/stage0, stage1, ...
    overwrite: replace results that exist.
    probabilities: also write `out`/probabilities/CASE, a file per structure.
    warn: takes a case and what is unusual about it.
    format: of label maps; "nrrd" writes CASE.seg.nrrd, a segmentation of 3D Slicer.

  Returns:
    The label maps written.
  """
  models = _models(model)
  channels = len(models[0].plan.channels)
  cases = find_inputs(inputs, channels)
  if prompts == "oracle" and labels is None:
    raise UserError("--prompts oracle: needs --labels, the folder of true label maps")
  if prompts == "given" and labels is None and given is None:
    raise UserError("--prompts given: needs --given FILE.json or --labels, sparse label maps")
  if prompts == "generated" and (labels is not None or given is not None):
    raise UserError("--labels and --given: are read with --prompts oracle or given; name one")
  by_case = read_given(given, models[0]) if given is not None else {}
  unknown = sorted(set(by_case) - {case.identifier for case in cases})
  if unknown:
    raise UserError(f"{given}: case {unknown[0]} is not among the inputs; correct its name")
  if labels is not None:
    cases = with_labels(cases, labels)
  out = Path(out)
  targets = [out / (case.identifier + FORMAT_ENDINGS[format]) for case in cases]
  if format == "nrrd":
    simpleitk("--format nrrd")  # said now if it is missing
  names = models[0].plan.labels.value_names
  claim(out, [*targets, *(out / f"{case.identifier}.json" for case in cases)], overwrite)
  left = TimeLeft(compiles=True)
  for number, (case, target) in enumerate(zip(cases, targets, strict=True), 1):
    heading = f"{number}/{len(cases)} {case.identifier}"
    begins = f"{heading}{left(number - 1, len(cases))}"
    progress(begins if len(cases) > 1 else Passing(begins))
    report = below(progress, f"{heading}: ")
    files: dict[str, Any] = {"labels": target.name, "stages": [], "probabilities": None}
    segmentations, volume = _predict_case(models, case, prompts, by_case, report)
    if probabilities:
      files["probabilities"] = probability_paths(case.identifier, models[0].plan.labels)
    paths = list((files["probabilities"] or {}).values())

    def keep(organ: int, probability: np.ndarray, paths=paths, geometry=volume.geometry) -> None:
      if paths:
        write_probability(out / paths[organ], probability, geometry)

    found = examine(segmentations, volume, keep, report)
    if save_stages:
      for stage, labels_of_stage in enumerate(found.maps):
        files["stages"].append(f"stage{stage}/{target.name}")
        write_segmentation(out / files["stages"][-1], labels_of_stage, found.geometry, names)
    for notice in found.warnings:
      warn(case.identifier, notice.message)
    about = {
      "case": case.identifier,
      "inputs": [image.name for image in case.images],
      "runs": [m.name for m in models],
    }
    with replacing(out / f"{case.identifier}.json") as temporary:
      text = json.dumps({**about, **found.as_dict(), "files": files}, indent=1, allow_nan=False)
      temporary.write_text(text + "\n", encoding="utf-8")
    write_segmentation(target, found.maps[-1], found.geometry, names)
  write_itksnap_labels(out / ITKSNAP_NAME, names)
  return targets


def _models(model: Models) -> list[Segmenter]:
  models = [model] if isinstance(model, Segmenter) else list(model)
  first = models[0].plan
  for other in models[1:]:
    if other.plan.labels != first.labels or len(other.plan.channels) != len(first.channels):
      raise UserError("runs: were trained for other structures or channels; average like with like")
    if other.stages != models[0].stages:
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
  depth, height, width = array.shape[1:]
  none = (False, False, False)
  geometry = Geometry(Path("array"), header, affine, (depth, height, width), (0, 1, 2), none)
  return Volume(array, (a, b, c), geometry)


def _last_labels(models: list[Segmenter], volume: Volume) -> np.ndarray:
  """The label map [z, y, x] after the last stage, averaged over models."""
  return label_map([segment_volume(m, volume) for m in models], models[0].stages - 1)


def _predict_case(
  models: list[Segmenter], case: Case, prompts: Prompts, by_case: dict, progress
) -> tuple[list[Segmentation], Volume]:
  labels = models[0].plan.labels
  channels = len(models[0].plan.channels)
  options: dict[str, Any] = {"progress": progress}
  if prompts == "oracle":
    volume, options["truth_atoms"] = read_case(case, channels, labels)
  else:
    volume = load_image(case.images, channels)
  if prompts == "given":
    sparse = None
    if case.label is not None:
      sparse = load_label_map(case.label, volume.geometry)
      labels.to_atoms(sparse, case.label)  # says so if a value is unknown

    def given(model: Segmenter, prepared: Prepared) -> list[GivenPrompt]:
      found = list(prompts_of_file(model, volume, prepared, by_case.get(case.identifier, [])))
      return found + list(prompts_of_labels(model, prepared, sparse))

    options["given"] = given
  return [segment_volume(m, volume, **options) for m in models], volume
