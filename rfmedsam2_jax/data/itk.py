"""Volumes in the formats of ITK (NRRD, MetaImage), read through SimpleITK, an extra.

They come as voxels by native index and an affine in RAS+, as NIfTI does. Also, which files are
DICOM; data.dicom reads them.
"""

import importlib
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
# What this package calls segmentations and structure sets of DICOM, which are never slices.
DICOM_LABELS = (".seg.dcm", ".labelmap.dcm", ".rtstruct.dcm")
_NO_DICOM = (*ENDINGS, ".nii", ".nii.gz", ".json", ".txt", ".png")
WITH_VOXELS = (".nrrd", ".mha")  # header and voxels are one file
_META = (".mha", ".mhd")
_DEFLATE = 1032  # the most that Deflate makes smaller; a header that claims more is wrong
_HEAD, _BLOCK = 2**16, 2**20  # bytes
# By ending: what a header says of compressed voxels, and how it ends.
_COMPRESSED = {".nrrd": (rb"encoding: *gz", rb"\r?\n\r?\n"),
               ".mha": (rb"CompressedData *= *True", rb"ElementDataFile *= *LOCAL\r?\n")}

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def optional(module: str, path: str | Path) -> Any:
  """A module of the extra `dicom`; UserError that names `path` and the extra if it is missing."""
  try:
    return importlib.import_module(module)
  except ImportError:
    raise UserError(f"{path}: needs {module}; install it: pip install 'rfmedsam2-jax[dicom]'"
                    ) from None


def simpleitk(path: str | Path) -> Any:
  """SimpleITK, without the warnings that go to standard error."""
  sitk = optional("SimpleITK", path)
  sitk.ProcessObject.GlobalWarningDisplayOff()
  return sitk


def size(shape: Sequence[int]) -> str:
  """A shape as messages have it: 512x512x90."""
  return "x".join(map(str, shape))


def is_series(folder: Path) -> bool:
  """Whether a folder has a DICOM file besides a DICOMDIR, the index of a medium."""
  with os.scandir(folder) as entries:
    return any(entry.is_file() and not is_dicomdir(entry.name)
               and not entry.name.lower().endswith(DICOM_LABELS) and is_dicom(entry.path)
               for entry in entries)


def is_dicomdir(name: str) -> bool:
  """Whether a file has the name that DICOM gives to the index of a medium (PS3.10, 8.6)."""
  return name.upper() == "DICOMDIR"


def is_dicom(path: str | Path) -> bool:
  """Whether a file begins as DICOM's file format does, or is read by GDCM without that."""
  if not os.path.isfile(path):  # a pipe has no beginning to look at
    return False
  try:
    with open(path, "rb") as file:
      if file.read(132)[128:] == b"DICM":
        return True
  except OSError:
    return False
  if os.fspath(path).endswith(_NO_DICOM):  # many of them lie in one folder
    return False
  try:
    with native_errors():
      dicom_reader(simpleitk(path), path).ReadImageInformation()
  except (RuntimeError, UserError):
    return False
  return True


def dicom_reader(sitk: Any, path: str | Path) -> Any:
  """SimpleITK's reader of one file, through GDCM, whatever its name is."""
  reader = sitk.ImageFileReader()
  reader.SetImageIO("GDCMImageIO")
  reader.SetFileName(os.fspath(path))
  return reader


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
    raise unreadable(path, error) from None
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
    raise unreadable(path, error) from None


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


def claimed_voxels(path: Path) -> int:
  """How many voxels the headers of a file or of a series' files claim; 0 if they are unreadable."""
  sitk, voxels = simpleitk(path), 0
  if path.is_dir():
    readers = [dicom_reader(sitk, file) for file in filter(is_dicom, path.iterdir())]
  else:
    readers = [sitk.ImageFileReader()]
    readers[0].SetFileName(str(path))
  for reader in readers:
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


def _as_native(sitk: Any, image: Any) -> tuple[np.ndarray, np.ndarray]:
  channels = image.GetNumberOfComponentsPerPixel() > 1
  array = sitk.GetArrayFromImage(image)  # [(t,) z, y, x (, C)]
  native = array.transpose(2, 1, 0, 3) if channels and array.ndim == 4 else array.T
  direction = np.asarray(image.GetDirection()).reshape(image.GetDimension(), -1)[:3, :3]
  affine = np.eye(4)
  affine[:3, :3] = LPS_TO_RAS @ direction @ np.diag(image.GetSpacing()[:3])
  affine[:3, 3] = LPS_TO_RAS @ np.asarray(image.GetOrigin()[:3])
  return native, affine


def unreadable(path: Path, error: Exception) -> UserError:
  """What ITK said, without its file names and line numbers."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  reason = lines[-1].removeprefix("sitk::ERROR: ") if lines else "no reason given"
  reason = re.sub(r"\w+\(0x[0-9a-f]+\): ", "", reason)
  return UserError(f"{path}: cannot be read, perhaps truncated ({reason[:200]}); "
                   f"copy or convert the file again")
