"""The Python API: load runs, segment arrays and files, predict folders.

    model = rfmedsam2_jax.load("runs/hippocampus")
    rfmedsam2_jax.segment_file(model, "scan.nii.gz", "labels.nii.gz")
    labels = rfmedsam2_jax.segment(model, array, spacing=(3.0, 1.0, 1.0))
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

from rfmedsam2_jax.data.datasets import Case, find_inputs, read_case, with_labels
from rfmedsam2_jax.data.files import claim, read_json
from rfmedsam2_jax.data.preprocessing import Prepared
from rfmedsam2_jax.data.volumes import Geometry, Volume, load_image, load_label_map, write_label_map
from rfmedsam2_jax.errors import UserError
from rfmedsam2_jax.experiment import load_run
from rfmedsam2_jax.inference.segmenter import Segmenter, label_maps, segment_volume
from rfmedsam2_jax.refinement.sources import GivenPrompt

Models = Segmenter | Sequence[Segmenter]
Prompts = Literal["generated", "oracle", "given"]


def load(run: str | Path) -> Segmenter:
  """The segmenter of a finished run folder; UserError if there is none."""
  return load_run(run)


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
  array = np.asarray(array, np.float32)
  if array.ndim == 3:
    array = array[None]
  if array.ndim != 4 or 0 in array.shape:
    raise UserError(f"array: has shape {array.shape}; give [D, H, W] or [C, D, H, W]")
  if not np.isfinite(array).all():
    raise UserError("array: has voxels that are NaN or infinite; replace them")
  if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
    raise UserError(f"spacing: is {tuple(spacing)}; give three sizes in mm above 0")
  affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
  shape = (array.shape[3], array.shape[2], array.shape[1])
  header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine).header
  geometry = Geometry(Path("array"), header, affine, shape, (2, 1, 0), (False, False, False))
  a, b, c = (float(size) for size in spacing)
  return _label_maps(_models(model), Volume(array, (a, b, c), geometry))[-1]


def segment_file(
  model: Models, image: str | Path | Sequence[str | Path], out: str | Path | None = None
) -> np.ndarray:
  """Segments a NIfTI file (or one per channel).

  Args:
    out: where to write the label map on the file's own grid; None writes nothing.

  Returns:
    Label map in the file's own axis order.
  """
  models = _models(model)
  volume = load_image(image, len(models[0].plan.channels))
  labels = _label_maps(models, volume)[-1]
  if out is not None:
    write_label_map(out, labels, volume.geometry)
  return volume.geometry.to_native(labels)


def predict(
  model: Models,
  inputs: Sequence[str | Path],
  out: str | Path,
  prompts: Prompts = "generated",
  labels: str | Path | None = None,
  given: str | Path | None = None,
  save_stages: bool = False,
  overwrite: bool = False,
  progress: Callable[[str], None] = lambda line: None,
) -> list[Path]:
  """Segments files and folders into `out`/CASE.nii.gz.

  Args:
    prompts: "generated" (automatic), "oracle" (boxes from the truth in `labels`) or "given"
      (a person's, from `labels` and `given`, on top of the generator's).
    labels: folder of label maps, CASE.nii.gz; as given prompts, only slices with a label count.
    given: JSON of boxes and points, see `read_given`.
    save_stages: also write `out`/stage0, stage1, ...
    overwrite: replace label maps that exist.

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
  targets = [out / f"{case.identifier}.nii.gz" for case in cases]
  claim(out, targets, overwrite)
  for number, (case, target) in enumerate(zip(cases, targets, strict=True), 1):
    progress(f"{number}/{len(cases)} {case.identifier}")
    volume, maps = _predict_case(models, case, prompts, by_case, progress)
    if save_stages:
      for stage, found in enumerate(maps):
        write_label_map(out / f"stage{stage}" / target.name, found, volume.geometry)
    write_label_map(target, maps[-1], volume.geometry)
  return targets


def read_given(path: str | Path, model: Segmenter) -> dict[str, list[dict[str, Any]]]:
  """A person's boxes and points from a JSON file.

      {"CASE": [{"structure": "liver", "box": [[i, j, k], [i, j, k]]},
                {"structure": "liver", "points": [[i, j, k, 1], [i, j, k, 0]]}]}

  Coordinates are voxels of the input file; both corners of a box, and all points of an entry, lie
  on one slice. The last number of a point says whether it lies inside.
  """
  names = model.plan.labels.names
  content = read_json(path)
  if not isinstance(content, dict):
    raise UserError(f"{path}: must map case names to lists of prompts; correct the file")
  for case, entries in content.items():
    for entry in entries if isinstance(entries, list) else [entries]:
      where = f"{path}: case {case}"
      if not isinstance(entry, dict) or entry.get("structure") not in names:
        raise UserError(f"{where}: every prompt needs a structure, one of {', '.join(names)}")
      box, points = entry.get("box"), entry.get("points")
      if (box is None) == (points is None):
        raise UserError(f"{where}: every prompt needs either a box or points; correct it")
      rows: Any = box if box is not None else points
      width = 3 if box is not None else 4
      right = isinstance(rows, list) and len(rows) > 0 and all(
        isinstance(row, list) and len(row) == width
        and all(isinstance(v, int | float) for v in row) for row in rows
      )
      if not right or (box is not None and len(rows) != 2):
        raise UserError(f"{where}: a box is two corners [i, j, k], points are [i, j, k, 1 or 0]")
  return content


def _models(model: Models) -> list[Segmenter]:
  models = [model] if isinstance(model, Segmenter) else list(model)
  first = models[0].plan
  for other in models[1:]:
    if other.plan.labels != first.labels or len(other.plan.channels) != len(first.channels):
      raise UserError("runs: were trained for other structures or channels; average like with like")
    if other.stages != models[0].stages:
      raise UserError("runs: have unlike numbers of stages; average like with like")
  return models


def _label_maps(models: list[Segmenter], volume: Volume, **options: Any) -> list[np.ndarray]:
  """Label maps [z, y, x] of every stage, averaged over models."""
  return label_maps([segment_volume(model, volume, **options) for model in models])


def _predict_case(
  models: list[Segmenter], case: Case, prompts: Prompts, by_case: dict, progress
) -> tuple[Volume, list[np.ndarray]]:
  labels = models[0].plan.labels
  channels = len(models[0].plan.channels)
  if prompts == "oracle":
    volume, atoms = read_case(case, channels, labels)
    return volume, _label_maps(models, volume, truth_atoms=atoms, progress=progress)
  volume = load_image(case.images, channels)
  if prompts == "generated":
    return volume, _label_maps(models, volume, progress=progress)
  sparse = None
  if case.label is not None:
    sparse = load_label_map(case.label, volume.geometry)
    labels.to_atoms(sparse, case.label)  # says so if a value is unknown

  def given(model: Segmenter, prepared: Prepared) -> list[GivenPrompt]:
    found = list(_prompts_of_file(model, volume, prepared, by_case.get(case.identifier, [])))
    return found + list(_prompts_of_labels(model, prepared, sparse))

  return volume, _label_maps(models, volume, given=given, progress=progress)


def _prompts_of_file(
  model: Segmenter, volume: Volume, prepared: Prepared, entries: list[dict[str, Any]]
) -> Iterator[GivenPrompt]:
  """Boxes and points of a file's voxels, on the prepared grid and in pixels of SAM's square."""
  side = model.sam2.config.image_size
  depth, height, width = prepared.restore.prepared_shape
  geometry = volume.geometry
  to_canonical = np.linalg.inv(geometry.canonical_affine) @ geometry.affine
  for entry in entries:
    rows = np.array(entry.get("box") or entry["points"], float)
    voxels = rows[:, :3]
    if (voxels < 0).any() or (voxels > np.array(geometry.shape) - 1).any():
      raise UserError(
        f"{geometry.path}: a prompt for {entry['structure']} lies outside of its "
        f"{' x '.join(map(str, geometry.shape))} voxels; correct its coordinates"
      )
    canonical = voxels @ to_canonical[:3, :3].T + to_canonical[:3, 3]
    places = prepared.restore.native_to_prepared(canonical)
    slices = np.unique(np.clip(np.rint(places[:, 0]).astype(int), 0, depth - 1))
    if len(slices) > 1:
      raise UserError(
        f"{geometry.path}: a prompt for {entry['structure']} spans several slices; give one "
        "prompt per slice"
      )
    xy = places[:, 2:0:-1] * np.array([side / width, side / height])
    organ = model.plan.labels.names.index(entry["structure"])
    if "box" in entry:
      (x0, y0), (x1, y1) = xy.min(axis=0), xy.max(axis=0)
      yield GivenPrompt(organ, int(slices[0]), box=(x0, y0, x1, y1))
    else:
      points = tuple((x, y, bool(row[3])) for (x, y), row in zip(xy, rows, strict=True))
      yield GivenPrompt(organ, int(slices[0]), points=points)


def _prompts_of_labels(
  model: Segmenter, prepared: Prepared, sparse: np.ndarray | None
) -> Iterator[GivenPrompt]:
  """Masks of the slices that a sparse label map has labels on."""
  if sparse is None:
    return
  restore = prepared.restore
  # Sparse slices would be lost in resampling, so each is brought over by itself.
  moved = sparse[tuple(map(slice, restore.lower, restore.upper))].transpose(restore.order)
  for native in np.flatnonzero(moved.any(axis=(1, 2))):
    place = (native + 0.5) * restore.prepared_shape[0] / moved.shape[0] - 0.5
    at = int(np.clip(np.rint(place), 0, restore.prepared_shape[0] - 1))
    for organ, structure in enumerate(model.plan.labels.structures):
      mask = np.isin(moved[native], structure.values)
      if mask.any():
        yield GivenPrompt(organ, at, mask=mask)
