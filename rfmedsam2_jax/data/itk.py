"""Volumes in the formats of ITK (NRRD, MetaImage, DICOM series), read through SimpleITK, an extra.

They come as voxels by native index and an affine in RAS+, as NIfTI does.
"""

import math
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2_jax.base.command import native_errors
from rfmedsam2_jax.base.errors import UserError

ENDINGS = (".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd")
WITH_VOXELS = (".nrrd", ".mha")  # header and voxels are one file
_META = (".mha", ".mhd")
_DEFLATE = 1032  # the most that Deflate makes smaller; a header that claims more is wrong
_HEAD, _BLOCK = 2**16, 2**20  # bytes
# By ending: what a header says of compressed voxels, and how it ends.
_COMPRESSED = {".nrrd": (rb"encoding: *gz", rb"\r?\n\r?\n"),
               ".mha": (rb"CompressedData *= *True", rb"ElementDataFile *= *LOCAL\r?\n")}

# What two slices of a series may differ in, as a part of their distance, and by how much its axis
# may lean. Rounded positions stay below; a missing slice and a tilted gantry stay above.
SPACING_TOLERANCE = 0.05
TILT_TOLERANCE = 0.5  # degrees

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def simpleitk(path: str | Path) -> Any:
  """The module SimpleITK; UserError that names `path` and the extra where it is missing."""
  try:
    import SimpleITK
  except ImportError:
    raise UserError(f"{path}: needs SimpleITK; install it: pip install 'rfmedsam2-jax[dicom]'"
                    ) from None
  SimpleITK.ProcessObject.GlobalWarningDisplayOff()  # they go to standard error, unasked
  return SimpleITK


def size(shape: Sequence[int]) -> str:
  """A shape as messages have it: 512x512x90."""
  return "x".join(map(str, shape))


def is_series(folder: Path) -> bool:
  """Whether a folder has a file of DICOM's file format (`DICM` after 128 bytes)."""
  with os.scandir(folder) as entries:
    return any(entry.is_file() and _is_dicom(entry.path) for entry in entries)


def _is_dicom(path: str | Path) -> bool:
  try:
    with open(path, "rb") as file:
      return file.read(132)[128:] == b"DICM"
  except OSError:
    return False


def read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
  """Voxels [i, j, k(, C)] of NRRD or MetaImage, and the affine, float64 [4, 4], to RAS+ in mm.

  UserError: unreadable or truncated, not three axes, voxels that are no real numbers.
  """
  sitk = simpleitk(path)
  reader = _file_reader(sitk, path)
  try:
    with native_errors():
      reader.ReadImageInformation()
      _check_header(sitk, path, reader)
      native, affine = _as_native(sitk, reader.Execute())
    _check_stream(path, native.nbytes)
  except (RuntimeError, zlib.error) as error:
    raise _unreadable(path, error) from None
  return native, affine


def header_fields(path: Path) -> dict[str, str]:
  """What else the header of an NRRD or MetaImage file says, by the names that it has there."""
  sitk = simpleitk(path)
  reader = _file_reader(sitk, path)
  try:
    with native_errors():
      reader.ReadImageInformation()
      return {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
  except (RuntimeError, UnicodeError) as error:
    raise _unreadable(path, error) from None


def _file_reader(sitk: Any, path: Path) -> Any:
  reader = sitk.ImageFileReader()
  reader.SetFileName(str(path))
  if path.suffix.lower() in _META:
    reader.SetImageIO("MetaImageIO")  # ITK does not know its endings in capitals
  return reader


def _check_stream(path: Path, expected: int) -> None:
  """zlib.error unless compressed voxels have their checksum, and are as many bytes as expected.

  ITK looks at neither, and leaves what is missing as it finds it in memory.
  """
  suffix = path.suffix.lower()
  if suffix not in _COMPRESSED:
    return
  compressed, end = _COMPRESSED[suffix]
  with open(path, "rb") as file:
    head = file.read(_HEAD)
    ended = re.search(end, head)
    if ended is None or not re.search(compressed, head[:ended.end()], re.IGNORECASE):
      return
    file.seek(ended.end())
    stream, found = zlib.decompressobj(47), 0  # of zlib or gzip
    while not stream.eof:
      if not (data := stream.unconsumed_tail or file.read(_BLOCK)):
        raise zlib.error("its compressed voxels end too early")
      found += len(stream.decompress(data, 16 * _BLOCK))
    used = file.tell() - len(stream.unused_data) - ended.end()
  said = re.search(rb"CompressedDataSize *= *(\d+)", head[:ended.end()])
  # Without this entry MetaIO does not know how much to read.
  whole = suffix != ".mha" or (said is not None and int(said[1]) == used)
  if found != expected or not whole:
    raise zlib.error(f"it holds {found} bytes of voxels in {used} compressed ones, its header says "
                     "otherwise")


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
  """Reads the DICOM series of a folder, as `read_file`; intensities are rescaled as it says.

  UserError: no series or several; one slice; several frames in a file; slices that are missing,
  doubled or unevenly spaced; a tilted gantry; colour.
  """
  sitk = simpleitk(folder)
  if not is_series(folder):
    raise UserError(f"{folder}: is a folder without DICOM files; give a volume or a folder with "
                    f"one DICOM series")
  reader = sitk.ImageSeriesReader()
  with native_errors():
    names = reader.GetGDCMSeriesIDs(str(folder))
  if not names:
    raise UserError(f"{folder}: has DICOM files but no series of images; copy the series again")
  files = [reader.GetGDCMSeriesFileNames(str(folder), name) for name in names]
  if len(files) > 1:
    raise UserError(f"{folder}: has {len(files)} series (of {', '.join(map(str, map(len, files)))} "
                    f"files); move the one that is meant into a folder of its own")
  try:
    with native_errors():
      _check_slices(sitk, folder, files[0])
      reader.SetFileNames(files[0])
      return _as_native(sitk, reader.Execute())
  except RuntimeError as error:
    raise _unreadable(folder, error) from None


def claimed_voxels(path: Path) -> int:
  """How many voxels the headers of a file or of a series' files claim; 0 if they are unreadable."""
  reader, voxels = simpleitk(path).ImageFileReader(), 0
  for file in filter(_is_dicom, path.iterdir()) if path.is_dir() else [path]:
    reader.SetFileName(str(file))
    try:
      reader.ReadImageInformation()
    except RuntimeError:
      continue
    voxels += math.prod(map(int, (*reader.GetSize(), reader.GetNumberOfComponents())))
  return voxels


def _check_header(sitk: Any, path: Path, reader: Any) -> None:
  if reader.GetDimension() not in (3, 4):
    raise UserError(
      f"{path}: has the size {size(reader.GetSize())}; a volume with three axes is expected")
  kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
  if "complex" in kind:
    raise UserError(f"{path}: voxels are of type {kind}; convert the file to whole or real numbers")
  if path.name.lower().endswith(WITH_VOXELS):
    check_claim(path, reader.GetSize(), 1, packed=True)  # one byte at least


def check_claim(path: Path, shape: Sequence[int], itemsize: int, packed: bool) -> None:
  """UserError if a file is too small to hold the voxels that its header claims."""
  stored = path.stat().st_size
  if math.prod(map(int, shape)) * itemsize > stored * (_DEFLATE if packed else 1):
    raise UserError(f"{path}: cannot be read, its header claims {size(shape)} voxels in {stored} "
                    "bytes; it is truncated or damaged, copy or convert it again")


def _check_slices(sitk: Any, folder: Path, files: Sequence[str]) -> None:
  """UserError unless the files are the evenly spaced slices of one volume."""
  convert = "to NIfTI, for example by dcm2niix"
  if len(files) == 1:
    raise UserError(
      f"{folder}: its series has one file, a single slice or several frames; convert it {convert}")
  positions, normals = [], []
  reader = sitk.ImageFileReader()
  for file in files:
    reader.SetFileName(file)
    reader.ReadImageInformation()
    if reader.GetSize()[2:] not in ((), (1,)):
      raise UserError(f"{file}: has {reader.GetSize()[2]} frames; convert the series {convert}")
    if reader.GetNumberOfComponents() != 1:
      raise UserError(f"{file}: is a colour image; give a series of one intensity per voxel")
    positions.append(reader.GetOrigin())
    normals.append(np.asarray(reader.GetDirection()).reshape(3, 3)[:, 2])
  normal, steps = normals[0], np.diff(np.asarray(positions), axis=0)
  if not np.allclose(normals, normal, atol=1e-3):
    raise UserError(f"{folder}: its slices are turned against each other, as those of a localizer "
                    f"are; give a series of parallel slices")
  distances = steps @ normal
  usual = float(np.median(distances))
  if abs(usual) < 1e-4:
    raise UserError(f"{folder}: several slices have the same position (phases, echoes?); give a "
                    f"folder with one volume")
  odd = int(np.abs(distances / usual - 1).argmax())
  if abs(distances[odd] / usual - 1) > SPACING_TOLERANCE:
    raise UserError(f"{folder}: slices {odd + 1} and {odd + 2} are {abs(distances[odd]):.4g} mm "
                    f"apart, others {abs(usual):.4g} mm; add what is missing or resample it")
  whole = steps.sum(axis=0)
  tilt = float(np.degrees(np.arccos(min(1.0, abs(whole @ normal) / np.linalg.norm(whole)))))
  if tilt > TILT_TOLERANCE:
    raise UserError(f"{folder}: its slices are tilted by {tilt:.1f} degrees against their stack "
                    f"(gantry tilt); correct it, for example by dcm2niix")


def _as_native(sitk: Any, image: Any) -> tuple[np.ndarray, np.ndarray]:
  channels = image.GetNumberOfComponentsPerPixel() > 1
  array = sitk.GetArrayFromImage(image)  # [(t,) z, y, x (, C)]
  native = array.transpose(2, 1, 0, 3) if channels and array.ndim == 4 else array.T
  direction = np.asarray(image.GetDirection()).reshape(image.GetDimension(), -1)[:3, :3]
  affine = np.eye(4)
  affine[:3, :3] = _LPS_TO_RAS @ direction @ np.diag(image.GetSpacing()[:3])
  affine[:3, 3] = _LPS_TO_RAS @ np.asarray(image.GetOrigin()[:3])
  return native, affine


def _unreadable(path: Path, error: Exception) -> UserError:
  """What ITK said, without its file names and line numbers."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  reason = lines[-1].removeprefix("sitk::ERROR: ") if lines else "no reason given"
  return UserError(f"{path}: cannot be read, perhaps truncated ({reason[:200]}); "
                   f"copy or convert the file again")
