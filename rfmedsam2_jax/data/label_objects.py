"""Label maps that are objects of DICOM: segmentations and structure sets, on the grid of an image.

In: a file and the grid that its image has. Out: label maps that may overlap, by layers, and what
the file calls their values.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.dicom import LABEL_MAP, SEGMENTATION, reading
from rfmedsam2_jax.data.geometry import Geometry, geometry_of
from rfmedsam2_jax.data.grids import GRID_TOLERANCE
from rfmedsam2_jax.data.itk import LPS_TO_RAS, is_dicom, optional
from rfmedsam2_jax.data.names import DICOM_LABEL_ENDINGS, ending_of
from rfmedsam2_jax.data.segmentation_objects import Part, Spread, frames_of, parts_of, spread_frames
from rfmedsam2_jax.data.structure_sets import STRUCTURE_SET, planes_of, rois_of, spread_contours

_KINDS = (SEGMENTATION, LABEL_MAP, STRUCTURE_SET)


class Segment(NamedTuple):
  """What a file says of one of its values, above or below 0, and the layer in which that lies."""

  name: str
  value: int
  layer: int = 0


def is_label_object(path: str | Path) -> bool:
  """Whether a file is one of DICOM by its name, or has no ending and is one by its content."""
  path = Path(path)
  ending = ending_of(path).lower()
  return ending in DICOM_LABEL_ENDINGS or (not ending and path.is_file() and is_dicom(path))


def names_of_object(path: str | Path) -> list[tuple[str, int]]:
  """Name and value of every structure of a file; UserError if it is no label map of DICOM."""
  return [(part.name, part.value) for part in _parts(_opened(Path(path), headers=True))]


def load_label_object(
  path: str | Path, like: Geometry, others: Collection[str] = ()
) -> tuple[list[np.ndarray], list[Segment]]:
  """The label maps of a file on an image's canonical grid, int32 [D, H, W], and what is in them.

  Structures that overlap lie in different layers; `others` are names that are left out.
  UserError: unreadable, no label map, of another frame of reference, or where the image has no
  voxels.
  """
  path = Path(path)
  dataset = _opened(path)
  frame = like.series[0].header.get("FrameOfReferenceUID") if like.series else None
  theirs = _frame_of_reference(dataset)
  if frame and theirs and frame != theirs:
    raise UserError(f"{path}: has another frame of reference than {like.path}, so their places "
                    "cannot be compared; give the label map of this image")
  onto = Spread(path, like)
  with reading(path):
    parts = [part for part in _parts(dataset) if part.name not in others]
    spread = spread_contours if _is_structure_set(dataset) else spread_frames
    layers: list[np.ndarray] = []
    segments = []
    for part, native in spread(dataset, parts, onto):
      layer = next((n for n, known in enumerate(layers) if not known[native].any()), len(layers))
      if layer == len(layers):
        layers.append(np.zeros(like.shape, np.int32))
      layers[layer][native] = part.value
      segments.append(Segment(part.name, part.value, layer))
  if not layers:
    layers = [np.zeros(like.shape, np.int32)]
  return [like.to_canonical(layer) for layer in layers], segments


def own_grid(path: Path, other: Path | None = None) -> Geometry:
  """The grid of a segmentation's frames, with those between them that are left out for being empty.

  Args:
    other: a second file of DICOM, whose places belong to it, too.

  Raises:
    UserError: no segmentation among them, frames that make no grid.
  """
  files = [path] if other is None else [path, other]
  datasets = [_opened(file, headers=True) for file in files]
  grids = [n for n, dataset in enumerate(datasets) if not _is_structure_set(dataset)]
  if not grids:
    raise UserError(f"{path}: is a structure set, which has outlines and no voxels"
                    + (f", and so is {other}" if other else "")
                    + "; give the other label map in a format with voxels")
  with reading(files[grids[0]]):
    frames = frames_of(datasets[grids[0]])
    first = frames[0]
    lengths = np.linalg.norm(first.steps, axis=0)
    normal = np.cross(*(first.steps / lengths).T)
    depths = np.unique([frame.origin @ normal for frame in frames])
    distance = _distance(files[grids[0]], frames, depths)
  everywhere = np.concatenate([depths, *(
    _depths(file, dataset, normal) for file, dataset in zip(files, datasets, strict=True))])
  numbers = np.rint((everywhere - first.origin @ normal) / distance)
  if np.abs((everywhere - first.origin @ normal) / distance - numbers).max() > GRID_TOLERANCE:
    raise UserError(f"{files[grids[0]]}: its frames, or those of the file beside it, are not "
                    f"{distance:.4g} mm or multiples of that apart; give the other label map in a "
                    "format with voxels")
  columns, rows = first.shape
  affine = np.eye(4)
  origin = first.origin + normal * distance * numbers.min()
  affine[:3] = LPS_TO_RAS @ np.column_stack([first.steps, normal * distance, origin])
  shape = columns, rows, int(numbers.max() - numbers.min()) + 1
  return geometry_of(files[grids[0]], shape, affine)


def _depths(path: Path, dataset: Any, normal: np.ndarray) -> np.ndarray:
  with reading(path):
    places: Iterable[np.ndarray] = (
      planes_of(dataset) if _is_structure_set(dataset)
      else [frame.origin for frame in frames_of(dataset)])
    return np.array([place @ normal for place in places])


def _distance(path: Path, frames: Sequence[Any], depths: np.ndarray) -> float:
  """mm between slices: what the file says, or else the smallest distance of frames."""
  said = frames[0].distance
  if said is None and len(depths) > 1:
    said = float(np.diff(depths).min())
  if not said or not said > 0:
    raise UserError(f"{path}: has one frame and no SpacingBetweenSlices, so its grid is not known; "
                    "give the other label map in a format with voxels")
  return said


def _opened(path: Path, headers: bool = False) -> Any:
  """The data set of a label map; UserError if it is something else."""
  pydicom = optional("pydicom", path)
  if not path.exists():
    raise UserError(f"{path}: does not exist; check the path")
  with reading(path):
    dataset = pydicom.dcmread(path, defer_size=1024 if headers else None)
    kind = dataset.get("SOPClassUID")
  if kind not in _KINDS:
    raise UserError(f"{path}: is a file of DICOM ({getattr(kind, 'name', 'of no kind')}), but "
                    "neither a segmentation nor a structure set; give one of these")
  return dataset


def _is_structure_set(dataset: Any) -> bool:
  return dataset.SOPClassUID == STRUCTURE_SET


def _frame_of_reference(dataset: Any) -> str | None:
  if not _is_structure_set(dataset):
    return dataset.get("FrameOfReferenceUID")
  said = {item.get("ReferencedFrameOfReferenceUID")
          for item in dataset.get("StructureSetROISequence") or ()} - {None, ""}
  return said.pop() if len(said) == 1 else None


def _parts(dataset: Any) -> list[Part]:
  return rois_of(dataset) if _is_structure_set(dataset) else parts_of(dataset)
