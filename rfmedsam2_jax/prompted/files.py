"""Prompted tracking of files: a checkpoint of SAM 2, a NIfTI volume and prompts in, a folder out.

    prompted = rfmedsam2_jax.open_volume(image="ct.nii.gz", window=(40, 400))
    found = prompted.track([rfmedsam2_jax.VoxelPrompt(1, box=((60, 80, 90), (60, 140, 170)))])
    found = prompted.correct(found, [rfmedsam2_jax.VoxelPrompt(1, points=((75, 100, 120, True),))])
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.places import BUILTIN
from rfmedsam2_jax.data.datasets import Structure
from rfmedsam2_jax.data.derived import Making
from rfmedsam2_jax.data.files import claim, replacing
from rfmedsam2_jax.data.formats import FORMAT_ENDINGS, Format
from rfmedsam2_jax.data.measures import volumes_ml
from rfmedsam2_jax.data.names import stem_of
from rfmedsam2_jax.data.segmentations import check_format, write_segmentation
from rfmedsam2_jax.data.volumes import Volume, load_image
from rfmedsam2_jax.nn import SAM2, SAM2Config
from rfmedsam2_jax.prompted.slice_frame import Plane, SliceFrame, VoxelPrompt
from rfmedsam2_jax.prompted.tracked import DEFAULTS, PromptedVolume, TrackedVolume
from rfmedsam2_jax.report.contact_sheet import SheetCase, save_contact_sheet
from rfmedsam2_jax.tracking import TrackingConfig
from rfmedsam2_jax.weights.checkpoint import load_checkpoint, read_config


def open_volume(
  checkpoint: str | Path = BUILTIN, image: str | Path | Volume | None = None,
  plane: Plane = "axial", window: tuple[float, float] | None = None,
  image_size: int | None = None, config: TrackingConfig = DEFAULTS,
  progress: Callable[[int, int], None] = lambda done, total: None, zoom: float | None = None,
) -> PromptedVolume:
  """A volume that can be prompted: `open_volume(image="ct.nii.gz")`.

  Args:
    checkpoint: what `rfmedsam2 convert` made, `tracker/params` of a run, a name (see
      weights.named), or the text `builtin`: the small network that comes with the package.
    image: a NIfTI file, or one that is loaded. It has to be given; by name where no checkpoint
      stands before it.
    window: centre and width of the intensities that SAM sees; None: percentiles of the volume.
    image_size: side of the square that slices are squashed to; None: the checkpoint's.
    zoom: see PromptedVolume.

  Raises:
    UserError: no checkpoint, no volume, a side that is not divisible by 32.
    TypeError: no image.
  """
  if image is None:
    raise TypeError("no image; open_volume(image=...) takes the built-in weights, "
                    "open_volume(checkpoint, image) others")
  found = load_checkpoint(checkpoint)
  sam2 = at_side(found.config, image_size)
  volume = image if isinstance(image, Volume) else load_image(image)
  return PromptedVolume(SAM2(sam2), found.params, volume, config, plane, window, progress, zoom)


def check_prompts(
  checkpoint: str | Path, volume: Volume, prompts: list[VoxelPrompt], plane: Plane,
  image_size: int | None,
) -> None:
  """Raises what `open_volume` and the first `track` would, before the network is loaded."""
  side = at_side(read_config(checkpoint)[0], image_size).image_size
  SliceFrame(volume, plane, side).rounds(prompts)


def at_side(sam2: SAM2Config, image_size: int | None) -> SAM2Config:
  """The network at another side than the checkpoint's; UserError unless divisible by 32."""
  if image_size is None:
    return sam2
  if image_size < 64 or image_size % 32:
    raise UserError(f"image_size {image_size}: give a multiple of 32 from 64 on")
  return dataclasses.replace(sam2, image_size=image_size)


def write_tracked(
  out: str | Path, volume: Volume, found: TrackedVolume, about: dict[str, Any] | None = None,
  overwrite: bool = False, format: Format = "nifti", names: Mapping[int, str] = {},
) -> list[Path]:
  """Writes NAME.nii.gz on the input's grid, NAME.json of scores and NAME.png, a contact sheet.

  Args:
    format: of the label map; "nrrd" makes it NAME.seg.nrrd, a segmentation of 3D Slicer, and
      "dicom-..." DICOM for a volume that was read from DICOM.
    names: of labels; others are called by their number.

  Raises:
    UserError: results that exist already, unless `overwrite`; a folder that cannot be made.
  """
  check_format(format, volume.geometry)
  targets = result_paths(out, volume.geometry.path, overwrite, format)
  label_map, scores, picture = targets
  called = {value: names.get(value, f"label {value}") for value in found.structures}
  case = SheetCase(
    label_map.name.removesuffix(FORMAT_ENDINGS[format]), volume.array[0], None,
    {"tracked": found.labels}, volume.spacing, found.window, found.slice_axis,
  )
  structures = tuple(Structure(name, (value,)) for value, name in called.items())
  save_contact_sheet(picture, [case], structures, crop=False)
  content = {**(about or {}), "structures": _scores(volume, found)}
  with replacing(scores) as temporary:
    temporary.write_text(json.dumps(content, indent=1) + "\n")
  details = {key: str(value) for key, value in (about or {}).items()}
  write_segmentation(label_map, found.labels, volume.geometry, called, Making(details=details))
  return targets


def result_paths(out: str | Path, image: Path, overwrite: bool, format: Format) -> list[Path]:
  """The files that `write_tracked` writes; makes their folder, and refuses what exists."""
  check_format(format)
  name = stem_of(image)
  targets = [Path(out) / f"{name}{ending}" for ending in (FORMAT_ENDINGS[format], ".json", ".png")]
  if image.exists() and any(path.exists() and path.samefile(image) for path in targets):
    raise UserError(f"{image}: would be replaced by its own result; choose another folder")
  claim(out, targets, overwrite)
  return targets


def _scores(volume: Volume, found: TrackedVolume) -> dict[str, Any]:
  """Per structure: volume, and on every slice where it is, presence and predicted IoU."""
  ml = volumes_ml(found.labels, volume.geometry.voxel_ml)
  flipped = volume.geometry.flipped[found.slice_axis]
  last = found.labels.shape[found.slice_axis] - 1
  presence, iou, prompted, result = found.presence, found.iou, found.prompted, {}
  for track, value in enumerate(found.structures):
    slices = [
      {"slice": last - z if flipped else z, "presence": round(float(presence[track, z]), 4),
       "iou": round(float(iou[track, z]), 4), "prompted": (track, z) in prompted}
      for z in np.flatnonzero(presence[track] > 0.5).tolist()
    ]
    result[str(value)] = {"volume_ml": round(ml.get(value, 0.0), 3), "slices": slices}
  return result
