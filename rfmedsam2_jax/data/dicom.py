"""DICOM series: the files of a folder that are slices of one volume, and their voxels.

Headers are read by pydicom, pixels by GDCM (in SimpleITK), which knows every compression. GDCM
alone would not do: what a file does not say of its place it takes as zero and one without a word,
it leaves pixels that are missing as they are in memory, and turns MONOCHROME1 round.
"""

import contextlib
import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rfmedsam2_jax.base.command import native_errors
from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.data.grids import TILT_TOLERANCE
from rfmedsam2_jax.data.itk import (
  LPS_TO_RAS,
  dicom_reader,
  is_dicom,
  is_dicomdir,
  is_series,
  optional,
  simpleitk,
  unreadable,
)
from rfmedsam2_jax.data.names import some
from rfmedsam2_jax.data.slices import Slice, stack
from rfmedsam2_jax.data.studies import SEARCHED, chosen, files_of, opened

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_RESCALE = ("RescaleSlope", "RescaleIntercept")
_TAGS = [
  *_PIXELS, "SOPClassUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Rows", "Columns",
  "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "PixelSpacing", "ImagePositionPatient",
  "ImageOrientationPatient", "PhotometricInterpretation", *_RESCALE, "ModalityLUTSequence",
  # What chooses a series, and what is said again in segmentations of it.
  "Modality", "SeriesNumber", "SeriesDescription", "SpecificCharacterSet", "SOPInstanceUID",
  "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber",
  "ReferringPhysicianName", "PatientName", "PatientID", "PatientBirthDate", "PatientSex",
  "PatientAge", "PatientSize", "PatientWeight", "PatientIdentityRemoved", "DeidentificationMethod",
  "PositionReferenceIndicator", "SliceThickness"]
# By the UIDs of their kinds: segmentations, of surfaces, and as one label map.
SEGMENTATION, LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"
_LABELS = (SEGMENTATION, "1.2.840.10008.5.1.4.1.1.66.5", LABEL_MAP)
_LONG = 1024  # bytes, above which a value is left in its file
_AGAIN = "copy the series again"
_CONVERT = "convert it to NIfTI, for example by dcm2niix"


class ReadSeries(NamedTuple):
  """A series as one volume.

  Attributes:
    native: [i, j, k], each slice rescaled as its own file says.
    affine: float64 [4, 4], to RAS+ in mm.
    remarks: sentences of what was left out or chosen.
    slices: in the order of k, with their headers.
  """

  native: np.ndarray
  affine: np.ndarray
  remarks: tuple[str, ...]
  slices: tuple[Slice, ...]


def read_series(path: Path, series: str | None = None, modality: str | None = None) -> ReadSeries:
  """The series of a folder or of a .zip, or one of several in it and the folders below it.

  Args:
    series, modality: see `studies.chosen`; with `series` folders below `path` count, too.

  Raises:
    UserError: no series, or several and none is chosen; one slice; several frames in a file;
      colour; slices that are missing, doubled, unevenly spaced, or not on one grid; a tilted
      gantry; files that are damaged.
  """
  simpleitk(path)
  packed = path.is_file()
  with opened(path) as folder:
    below = packed or series is not None or _is_study(folder)
    if not below and not is_series(folder):
      raise UserError(f"{folder}: " + (instead(folder) or "is a folder without DICOM files; give a "
                                       "volume or a folder with one DICOM series"))
    headers, others = _headers(files_of(folder, below))
    if not headers:
      left = "; ".join([*_left_out(others), _AGAIN])
      raise UserError(f"{folder}: has no DICOM images; {left}" if others else
                      f"{folder}: has no DICOM files; give a study or a series")
    advice = "" if packed else ", or move it into a folder of its own"
    one, said = chosen(folder, headers, series, modality, advice)
    remarks = (*([said] if said else []), *_left_out(others))
    return _read(folder, {file: headers[file] for file in one.files}, remarks)


def _read(folder: Path, headers: Mapping[Path, Any], remarks: tuple[str, ...]) -> ReadSeries:
  sitk = simpleitk(folder)
  slices = [_slice_of(path, header) for path, header in headers.items()]
  if len(slices) == 1:
    raise UserError(f"{folder}: its series is a single slice; give all of its files in one folder")
  _check_frame(headers)
  placed, lps = stack(folder, slices)
  inverted = {path for path, header in headers.items()
              if header.get("PhotometricInterpretation") == "MONOCHROME1"}
  planes = [one.turn(_pixels(sitk, one.path, one.path in inverted)) for one in placed]
  native = np.stack(planes, axis=-1)  # of a type that holds those of all slices
  affine = np.eye(4)
  affine[:3] = LPS_TO_RAS @ lps[:3]
  for name in _PIXELS:
    for header in headers.values():
      if name in header:
        del header[name]
  return ReadSeries(native, affine, remarks, tuple(placed))


def _left_out(others: Sequence[str]) -> tuple[str, ...]:
  return (f"left out {some(others)}",) if others else ()


def _headers(files: Sequence[Path]) -> tuple[dict[Path, Any], list[str]]:
  """By file, what is said of every image among them; and what the others are.

  UserError for DICOM that is damaged.
  """
  found: dict[Path, Any] = {}
  others: list[str] = []
  strange: list[Path] = []
  for path in files:
    pydicom = optional("pydicom", path)
    if not is_dicom(path):
      strange.append(path)
      continue
    with reading(path):
      header = pydicom.dcmread(path, force=True, defer_size=_LONG, specific_tags=_TAGS)
      kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
      name = pydicom.uid.UID(kind or "").name
    if kind in _LABELS:
      others.append(f"{path.name} (a segmentation)")
    elif any(pixels in header for pixels in _PIXELS):
      found[path] = header
    elif not kind or name == kind or "Image Storage" in name:  # an unknown one is its own name
      raise UserError(f"{path}: is a DICOM file without an image, it is damaged or cut; {_AGAIN}")
    else:
      others.append(f"{path.name} ({name}, no image)")
  endings = {path.suffix.lower() for path in found} - {""}
  for path in strange:
    if path.suffix.lower() in endings:
      raise UserError(f"{path}: is named as the slices are but is no DICOM, it is damaged; "
                      f"{_AGAIN}, or move it away")
  return found, [*(f"{path.name} (no DICOM)" for path in strange), *others]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
  """Makes a UserError of whatever pydicom raises of damaged bytes: errors of many kinds."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of values that are not as the standard wants them
      yield
  except UserError:
    raise
  except Exception as error:
    raise UserError(f"{path}: cannot be read as DICOM ({first_line(error, 120)}); {_AGAIN}"
                    ) from None


def _slice_of(path: Path, header: Any) -> Slice:
  """Where an image lies (PS3.3, C.7.6.2); UserError if it does not say, or is more than a slice."""
  with reading(path):  # values are converted when they are asked for
    frames, samples = (int(header.get(name) or 1) for name in ("NumberOfFrames", "SamplesPerPixel"))
    if frames > 1:
      raise UserError(f"{path}: has {frames} frames in one file; {_CONVERT}")
    kind = header.get("PhotometricInterpretation")
    if samples != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
      raise UserError(f"{path}: has {kind} pixels of {samples} samples; give a series of one "
                      "intensity per voxel (MONOCHROME)")
    _check_values(path, header)
    rows, columns = int(header.Rows), int(header.Columns)
    down, along = _numbers(path, header, "PixelSpacing", 2)
    cosines = _numbers(path, header, "ImageOrientationPatient", 6).reshape(2, 3)
    origin = _numbers(path, header, "ImagePositionPatient", 3)
  if not (down > 0 and along > 0 and rows > 0 and columns > 0):
    raise UserError(f"{path}: has pixels without a size; correct its PixelSpacing")
  lengths = np.linalg.norm(cosines, axis=1)
  miss = np.degrees(np.arcsin(min(1.0, abs(cosines[0] @ cosines[1]))))
  if np.abs(lengths - 1).max() > 0.01 or miss > TILT_TOLERANCE:
    raise UserError(f"{path}: its ImageOrientationPatient is not two directions at right angles; "
                    "correct the file")
  row = cosines[0] / lengths[0]
  column = cosines[1] - (cosines[1] @ row) * row  # rounding
  steps = np.column_stack([row * along, column / np.linalg.norm(column) * down])
  return Slice(path, (columns, rows), origin, steps, header=header)


def _check_values(path: Path, header: Any) -> None:
  """UserError if pixels are missing, or not to be had by a slope and an intercept."""
  if "ModalityLUTSequence" in header:
    raise UserError(f"{path}: its intensities are given by a table (Modality LUT); {_CONVERT}")
  given = [name for name in _RESCALE if name in header]
  if len(given) == 1:
    raise UserError(f"{path}: has {given[0]} alone, so its intensities are not known; correct the "
                    "file")
  slope = header.get("RescaleSlope")
  if slope is not None and not abs(float(slope)) > 0:
    raise UserError(f"{path}: its RescaleSlope is {slope}; correct the file")
  stored = header.get_item("PixelData", keep_deferred=True)
  expected = int(header.Rows) * int(header.Columns) * int(header.BitsAllocated) // 8
  length = getattr(stored, "length", 0xFFFFFFFF)  # which stands for any, of what is compressed
  if length < expected:
    raise UserError(f"{path}: has {length} bytes of pixels where its header says {expected}; it is "
                    f"damaged, {_AGAIN}")


def _numbers(path: Path, header: Any, name: str, count: int) -> np.ndarray:
  value = header.get(name)
  if value is None or value == "":
    raise UserError(f"{path}: has no {name}, so where it lies is not known; {_CONVERT}")
  numbers = np.array(value, np.float64).reshape(-1)
  if len(numbers) != count or not np.isfinite(numbers).all():
    raise UserError(f"{path}: its {name} is {value}, not {count} numbers; correct the file")
  return numbers


def _check_frame(headers: Mapping[Path, Any]) -> None:
  """UserError if places are said in different frames of reference."""
  first: tuple[Path, Any] | None = None
  for path, header in headers.items():
    frame = header.get("FrameOfReferenceUID")
    first = first or ((path, frame) if frame else None)
    if first and frame and frame != first[1]:
      raise UserError(f"{path}: has another frame of reference than {first[0].name}, so their "
                      "places cannot be compared; give a folder with one volume")


def _pixels(sitk: Any, path: Path, inverted: bool) -> np.ndarray:
  """[rows, columns] of one file, rescaled."""
  with contextlib.ExitStack() as stack:
    source = path
    if inverted:  # GDCM would take every stored value from the largest one
      source = Path(stack.enter_context(tempfile.TemporaryDirectory()), path.name)
      with reading(path):
        dataset = optional("pydicom", path).dcmread(path, force=True)
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.save_as(source)
    stack.enter_context(native_errors())
    try:
      return sitk.GetArrayFromImage(dicom_reader(sitk, source).Execute())[0]
    except RuntimeError as error:
      raise unreadable(path, error) from None


def instead(path: Path) -> str | None:
  """What a file or folder is that is no volume, if it is DICOM, and which folders to give."""
  folder = path if path.is_dir() else path.parent
  below = [str(place) for place in _series_below(folder)]
  if not path.is_dir() and is_series(folder):
    below.insert(0, str(folder))
  give = f"give a folder with a series: {some(below)}"
  if is_dicomdir(path.name) and path.is_file():
    what = "is a DICOMDIR, the index of a medium"
  elif path.is_dir() and any(is_dicomdir(file.name) for file in path.iterdir()):
    what = "has a DICOMDIR, the index of a medium, but no volume itself"
  elif path.is_dir():
    return f"has no volume itself; {give}" if below else None
  else:
    return f"is one file of DICOM; give its folder, {folder}" if is_dicom(path) else None
  return f"{what}; {give if below else 'the files that it names are missing, copy all of it'}"


def _is_study(folder: Path) -> bool:
  """Whether series lie below a folder, none in it, and it is not a medium's with an index."""
  indexed = any(is_dicomdir(file.name) for file in folder.iterdir())
  return not indexed and not is_series(folder) and any(True for _ in _series_below(folder))


def _series_below(folder: Path) -> Iterator[Path]:
  """Folders below one that hold a series."""
  for place, folders, _ in itertools.islice(os.walk(folder), SEARCHED):
    folders.sort()
    with contextlib.suppress(OSError):
      if Path(place) != folder and is_series(Path(place)):
        yield Path(place)
