"""What the bytes of a volume say, as libraries other than ours read them.

NIfTI by nibabel's own reading and canonical orientation, with the whole gzip stream checked by
Python's gzip; all other formats by SimpleITK, NRRD's and MetaImage's compressed voxels by gzip and
zlib.
"""

import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk

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
  return _itk(path)


def _nifti(path: Path) -> Witnessed:
  content = path.read_bytes()
  if path.name.endswith(".gz"):
    content = gzip.decompress(content)  # all of it, with its checksum
  kind = nib.Nifti2Image if content[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Image
  image = kind.from_bytes(content)
  array = np.asarray(image.dataobj)
  shape = array.shape
  if array.ndim == 4 and shape[3] == 1:
    array = array[..., 0]
  if array.ndim != 3:
    raise ValueError(f"{array.ndim} axes")
  # nibabel's own canonical orientation is RAS+; ours is LPS+ with reversed axes.
  orientation = nib.orientations.ornt_transform(
    nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("LPS"))
  turned = nib.orientations.apply_orientation(array, orientation).transpose(2, 1, 0)
  moved = image.affine @ nib.orientations.inv_ornt_aff(orientation, array.shape)
  sizes = np.linalg.norm(moved[:3, :3], axis=0)[::-1]
  scale = {1: 1000.0, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)
  z, y, x = (float(size * scale) for size in sizes)
  return Witnessed(turned, (z, y, x), image.affine, array.shape)


def _itk(path: Path) -> Witnessed:
  if path.is_dir():
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path))
    image = sitk.ReadImage(names)
  else:
    image = sitk.ReadImage(str(path))
    check_stream(path, sitk.GetArrayViewFromImage(image).nbytes)
  if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
    raise ValueError("not one 3D channel")
  shape = image.GetSize()
  direction = np.asarray(image.GetDirection()).reshape(3, 3)
  affine = np.eye(4)
  affine[:3, :3] = np.diag([-1, -1, 1]) @ direction @ np.diag(image.GetSpacing())
  affine[:3, 3] = np.array([-1, -1, 1]) * image.GetOrigin()
  turned = sitk.DICOMOrient(image, "LPS")
  z, y, x = turned.GetSpacing()[::-1]
  return Witnessed(sitk.GetArrayFromImage(turned), (z, y, x), affine, shape)


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
