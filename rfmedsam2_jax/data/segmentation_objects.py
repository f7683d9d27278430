"""Segmentations of DICOM, frame by frame: where each lies, and its pixels on the grid of an image.

Coordinates are DICOM's: LPS+, mm. PS3.3, C.8.20 and C.7.6.16.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.geometry import Geometry
from rfmedsam2_jax.data.grids import GRID_TOLERANCE
from rfmedsam2_jax.data.itk import LPS_TO_RAS

# What stands in SegmentDescription: numbers of segments begin at 1 and have no gaps, values may.
DESCRIPTION = "value {} in the label map"
_VALUE = re.compile(r"value (\d{1,9}) in the label map")


class Part(NamedTuple):
  """A structure of a file: its number there, its name, and its value in a label map."""

  number: int
  name: str
  value: int


class Frame(NamedTuple):
  """One frame.

  Attributes:
    number: of its segment; 0 where pixels themselves are the numbers.
    shape: columns, rows. origin, steps: as of `slices.Slice`.
    distance: mm between slices, if the file says it.
  """

  number: int
  shape: tuple[int, int]
  origin: np.ndarray
  steps: np.ndarray
  distance: float | None


class Spread:
  """The voxels of an image, found by their places.

  A series' slices lie where each says, and not where an even distance would have them.
  """

  def __init__(self, path: Path, like: Geometry):
    self.path, self.like = path, like
    affine = like.affine_mm.copy()
    affine[:3] = LPS_TO_RAS @ affine[:3]
    self._inverse = np.linalg.inv(affine)
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal *= np.sign(normal @ affine[:3, 2]) / np.linalg.norm(normal)
    self._normal = normal
    self._depths = np.array([one.origin @ normal for one in like.series])

  def index(self, points: np.ndarray) -> np.ndarray:
    """Real voxel indices (i, j, k), float64 [n, 3], of places, LPS+ in mm."""
    found = points @ self._inverse[:3, :3].T + self._inverse[:3, 3]
    if len(self._depths) > 1:
      depth = points @ self._normal
      inside = (depth >= self._depths[0]) & (depth <= self._depths[-1])
      exact = np.interp(depth, self._depths, np.arange(len(self._depths)))
      found[:, 2] = np.where(inside, exact, found[:, 2])
    return found

  def voxels(self, frame: Frame, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
    """The voxels of places, bool [rows, columns], in a frame, as an index; UserError if none."""
    columns, rows = frame.shape
    ends = np.array([[0, 0], [1, 0], [0, 1], [columns - 1, 0], [0, rows - 1]])
    places = self.index(frame.origin + ends @ frame.steps.T)
    first = np.rint(places[0]).astype(int)
    along, down = (np.rint(place - places[0]).astype(int) for place in places[1:3])
    expected = first + np.array([along * (columns - 1), down * (rows - 1)])
    miss = max(np.abs(places[0] - first).max(), np.abs(places[3:] - expected).max())
    unit = np.abs(along).sum() == 1 == np.abs(down).sum() and not (along & down).any()
    if miss > GRID_TOLERANCE or not unit:
      raise UserError(f"{self.path}: has a frame that lies on no slice of {self.like.path} (by "
                      f"{miss:.3g} voxels); give the label map of this image")
    row, column = np.nonzero(pixels)
    found = first + row[:, None] * down + column[:, None] * along
    if len(found) and ((found < 0).any() or (found >= self.like.shape).any()):
      raise UserError(f"{self.path}: labels voxels outside of {self.like.path}; give the label map "
                      "of this image")
    return tuple(found.T)


def parts_of(dataset: Any) -> list[Part]:
  """The segments of a segmentation, without a background."""
  found = []
  for item in dataset.get("SegmentSequence") or ():
    number = int(item.SegmentNumber)
    said = _VALUE.fullmatch(str(item.get("SegmentDescription") or "").strip())
    if number:
      found.append(Part(number, str(item.get("SegmentLabel") or ""),
                        int(said[1]) if said else number))
  return found


def frames_of(dataset: Any) -> list[Frame]:
  """Where the frames lie; UserError if it is not said."""
  shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
  every = dataset.get("PerFrameFunctionalGroupsSequence") or ()
  labelmap = dataset.get("SegmentationType") == "LABELMAP"
  if not every:
    raise UserError(f"{_name(dataset)}: has no frames that say where they lie; write it again")

  def group(own: Any, name: str) -> Any:
    found = own.get(name) or shared.get(name)
    if not found:
      raise UserError(f"{_name(dataset)}: has a frame without {name}, so where it lies is not "
                      "known; write it again")
    return found[0]

  result = []
  for own in every:
    measures = group(own, "PixelMeasuresSequence")
    down, along = map(float, measures.PixelSpacing)
    cosines = np.array(group(own, "PlaneOrientationSequence").ImageOrientationPatient, np.float64)
    steps = cosines.reshape(2, 3).T * [along, down]
    origin = np.array(group(own, "PlanePositionSequence").ImagePositionPatient, np.float64)
    number = 0 if labelmap else int(
      group(own, "SegmentIdentificationSequence").ReferencedSegmentNumber)
    between = measures.get("SpacingBetweenSlices")
    if not (np.isfinite([*steps.ravel(), *origin]).all() and down > 0 < along):
      raise UserError(f"{_name(dataset)}: has a frame whose place is no numbers; write it again")
    result.append(Frame(number, (int(dataset.Columns), int(dataset.Rows)), origin, steps,
                        abs(float(between)) if between else None))
  return result


def spread_frames(dataset: Any, parts: Sequence[Part], onto: Spread
                  ) -> Iterator[tuple[Part, np.ndarray]]:
  """The mask of some segments, bool [i, j, k] of the image; UserError as `Spread.voxels`."""
  frames = frames_of(dataset)
  most = _largest(onto.path, dataset)
  if not frames[0].number:  # pixels are numbers
    whole = np.zeros(onto.like.shape, np.int32)
    for frame, pixels in zip(frames, _pixels(dataset, range(len(frames))), strict=True):
      whole[onto.voxels(frame, pixels > 0)] = pixels[pixels > 0]
    for part in parts:
      yield part, whole == part.number
    known = {0, *(part.number for part in parts_of(dataset))}
    if unknown := set(np.unique(whole).tolist()) - known:
      raise UserError(f"{onto.path}: has pixels of segment {min(unknown)}, which it does not "
                      "describe; write it again")
    return
  for part in parts:
    mine = [n for n, frame in enumerate(frames) if frame.number == part.number]
    mask = np.zeros(onto.like.shape, bool)
    for n, pixels in zip(mine, _pixels(dataset, mine), strict=True):
      if ((pixels > 0) & (pixels < most)).any():
        raise UserError(f"{onto.path}: is a fractional segmentation, whose pixels are neither "
                        "outside nor inside; give a binary one")
      mask[onto.voxels(frames[n], pixels > 0)] = True
    yield part, mask


def _pixels(dataset: Any, numbers: Sequence[int]) -> Iterator[np.ndarray]:
  """Stored values of some frames, [rows, columns]."""
  from pydicom.pixels import iter_pixels

  packed = dataset.BitsAllocated == 1 and not dataset.file_meta.TransferSyntaxUID.is_encapsulated
  if not packed:
    yield from iter_pixels(dataset, indices=numbers, raw=True) if numbers else ()
    return
  # Frames of bits follow each other without a gap, so that one may begin within a byte; pydicom
  # gives such frames only all at once.
  shape = int(dataset.Rows), int(dataset.Columns)
  size, stored = shape[0] * shape[1], np.frombuffer(dataset.PixelData, np.uint8)
  for number in numbers:
    first = number * size
    some = stored[first // 8:-(-(first + size) // 8)]
    bits = np.unpackbits(some, bitorder="little")[first % 8:][:size]
    yield bits.reshape(shape)


def _largest(path: Path, dataset: Any) -> int:
  """The value of pixels that are inside of a segment."""
  kind = dataset.get("SegmentationType")
  if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
    raise UserError(f"{path}: is a segmentation of type {kind}; give a binary one")
  return int(dataset.get("MaximumFractionalValue") or 1) if kind == "FRACTIONAL" else 1


def _name(dataset: Any) -> str:
  return str(dataset.filename)
