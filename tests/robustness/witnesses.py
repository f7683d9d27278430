"""What the bytes of a volume say, as libraries other than ours read them.

NIfTI by nibabel's own reading and canonical orientation, with the whole gzip stream checked by
Python's gzip, and where it lies by SimpleITK, which chooses between its transforms; DICOM slice by
slice by pydicom; all other formats by SimpleITK, NRRD's and MetaImage's compressed voxels by gzip
and zlib.
"""

import contextlib
import gzip
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.pixels import apply_rescale

sitk.ProcessObject.GlobalWarningDisplayOff()


class Witnessed(NamedTuple):
  """array: [z, y, x], LPS+. spacing: mm, z y x. affine: of the file's axes to RAS+, its units."""

  array: np.ndarray
  spacing: tuple[float, float, float]
  affine: np.ndarray
  shape: tuple[int, ...]


def read(path: Path) -> Witnessed:
  """Raises whatever the libraries do."""
  if path.name.endswith((".nii", ".nii.gz")):
    return _nifti(path)
  return _dicom(path) if path.is_dir() else _itk(path)


def _nifti(path: Path) -> Witnessed:
  content = path.read_bytes()
  if path.name.endswith(".gz"):
    content = gzip.decompress(content)  # all of it, with its checksum
  kind = nib.Nifti2Image if content[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Image
  image = kind.from_bytes(content)
  array = np.asarray(image.dataobj)
  while array.ndim > 3 and array.shape[-1] == 1:
    array = array[..., 0]
  if array.ndim != 3:
    raise ValueError(f"{array.ndim} axes")
  scale = {1: 1000.0, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)
  affine = image.affine
  with contextlib.suppress(RuntimeError):  # of types of voxels, and axes, that ITK does not have
    with tempfile.TemporaryDirectory() as folder:  # ITK does not read every name
      ending = ".nii.gz" if path.name.endswith(".gz") else ".nii"
      (link := Path(folder) / f"scan{ending}").symlink_to(path.absolute())
      seen = _affine(sitk.ReadImage(str(link)))
    affine = np.diag([1 / scale, 1 / scale, 1 / scale, 1]) @ seen
  return _turned(array, affine, scale)


def _turned(array: np.ndarray, affine: np.ndarray, scale: float = 1.0) -> Witnessed:
  # nibabel's own canonical orientation is RAS+; ours is LPS+ with reversed axes.
  orientation = nib.orientations.ornt_transform(
    nib.io_orientation(affine), nib.orientations.axcodes2ornt("LPS"))
  turned = nib.orientations.apply_orientation(array, orientation).transpose(2, 1, 0)
  moved = affine @ nib.orientations.inv_ornt_aff(orientation, array.shape)
  z, y, x = (float(size * scale) for size in np.linalg.norm(moved[:3, :3], axis=0)[::-1])
  return Witnessed(turned, (z, y, x), affine, array.shape)


def _affine(image: sitk.Image) -> np.ndarray:
  """RAS+, mm, of the first three axes."""
  affine = np.eye(4)
  directions = np.asarray(image.GetDirection()).reshape(image.GetDimension(), -1)[:3, :3]
  affine[:3, :3] = directions @ np.diag(image.GetSpacing()[:3])
  affine[:3, 3] = image.GetOrigin()[:3]
  return np.diag([-1, -1, 1, 1]) @ affine


def _dicom(path: Path) -> Witnessed:
  """Every pixel is put where its own file says; ValueError unless they fill a grid."""
  files = [pydicom.dcmread(file, force=True) for file in sorted(path.iterdir())
           if file.is_file() and file.name != "DICOMDIR" and file.suffix != ".txt"]
  placed = []
  for one in files:
    row, column = np.reshape(np.array(one.ImageOrientationPatient, float), (2, 3))
    down, along = map(float, one.PixelSpacing)
    steps = np.column_stack([row * along, column * down, np.array(one.ImagePositionPatient, float)])
    if "TransferSyntaxUID" not in one.file_meta:
      one.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    placed.append((steps, apply_rescale(one.pixel_array, one).T))
  normal = np.cross(placed[0][0][:, 0], placed[0][0][:, 1])
  placed.sort(key=lambda slice_: slice_[0][:, 2] @ normal)
  first = placed[0][0]
  affine = np.eye(4)
  affine[:3] = np.column_stack([first[:, :2], np.zeros(3), first[:, 2]])
  affine[:3, 2] = normal / (normal @ normal) * (
    (placed[-1][0][:, 2] - first[:, 2]) @ normal) / (len(placed) - 1)
  result = np.full((*placed[0][1].shape, len(placed)), np.nan)
  for steps, values in placed:
    i, j = np.indices(values.shape).reshape(2, -1)
    places = steps @ np.stack([i, j, np.ones_like(i)])
    index = np.rint((np.linalg.inv(affine) @ np.vstack([places, np.ones_like(i)]))[:3]).astype(int)
    result[tuple(index)] = values.ravel()
  if np.isnan(result).any():
    raise ValueError("pixels that are missing")
  return _turned(result, np.diag([-1, -1, 1, 1]) @ affine)


def _itk(path: Path) -> Witnessed:
  image = sitk.ReadImage(str(path))
  check_stream(path, sitk.GetArrayViewFromImage(image).nbytes)
  if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
    raise ValueError("not one 3D channel")
  turned = sitk.DICOMOrient(image, "LPS")
  z, y, x = turned.GetSpacing()[::-1]
  return Witnessed(sitk.GetArrayFromImage(turned), (z, y, x), _affine(image), image.GetSize())


def check_stream(path: Path, expected: int) -> None:
  """Decompresses what follows the header of a compressed NRRD or MetaImage file, with checksum."""
  content = path.read_bytes()
  if path.name.endswith(".nrrd"):
    head, _, body = content.partition(b"\n\n")
    if b"encoding: gz" in head.lower():
      _inflate(body, expected)
  elif path.name.endswith(".mha"):
    head, _, rest = content.partition(b"ElementDataFile = LOCAL\n")
    if b"compresseddata = true" in head.lower():
      _inflate(rest, expected)


def _inflate(data: bytes, expected: int) -> None:
  stream = zlib.decompressobj(47)
  if len(stream.decompress(data)) != expected or not stream.eof:
    raise ValueError("the compressed voxels are not as many as the header says")
