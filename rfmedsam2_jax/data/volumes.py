"""Volumes in and label maps out: any axis order and flip comes in, the same grid goes out."""

import contextlib
import dataclasses
import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.data import dicom, itk
from rfmedsam2_jax.data.files import replacing
from rfmedsam2_jax.data.geometry import (
  LARGEST,
  Geometry,
  check_grid,
  check_right_angles,
  geometry_of,
)
from rfmedsam2_jax.data.label_objects import is_label_object, load_label_object, own_grid
from rfmedsam2_jax.data.names import ARCHIVE, IMAGE_ENDINGS, NIFTI_ENDINGS, ending_of
from rfmedsam2_jax.data.nifti import check_sizes

_BLOCK = 2**20  # bytes
_FINEST = 1 / 16  # the largest slope that can say whole numbers without being one


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
  """An image in canonical orientation."""

  array: np.ndarray  #: float32 [C, D, H, W], axes (z, y, x), LPS+
  spacing: tuple[float, float, float]  #: mm, (z, y, x)
  geometry: Geometry  #: the way back to the file's own grid


def load_image(
  paths: str | Path | Sequence[str | Path], channels: int = 1, series: str | None = None,
  modality: str | None = None,
) -> Volume:
  """Reads an image of one 3D file per channel, all on one grid, or of one 4D file.

  Its fourth axis is the channels (Medical Segmentation Decathlon). A folder or .zip is a DICOM
  series, or a study of which `series` or `modality` chooses one (studies.chosen).
  UserError: missing, truncated or foreign files, wrong number of axes or channels, NaN or infinite
  voxels, an affine without a meaning or right angles, channels on different grids.
  """
  files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
  if len(files) not in (1, channels):
    raise UserError(f"{files[0]}: {len(files)} files where {channels} channels are expected; "
                    f"give one file per channel or one 4D file")
  planes: list[np.ndarray] = []
  geometries: list[Geometry] = []
  expected = channels if len(files) == 1 else 1
  for path in files:
    native, current = _read(path, np.float32, series, modality)
    check_right_angles(current)
    geometries.append(current)
    check_grid(current, geometries[0], "channels")
    native = native[..., None] if native.ndim == 3 else native
    if native.ndim != 4 or native.shape[3] != expected:
      wanted = "a 3D image" if expected == 1 else f"a 4D image with {expected} channels"
      raise UserError(f"{path}: has {native.ndim - (native.shape[-1] == 1)} axes "
                      f"({itk.size(native.shape)}) where {wanted} is expected; split it into "
                      "files of that form")
    check_intensities(path, native)
    planes.extend(current.to_canonical(native[..., c]) for c in range(expected))
  array = np.stack(planes) if channels > 1 else planes[0][None]
  remarks = tuple(dict.fromkeys(said for found in geometries for said in found.remarks))
  geometry = dataclasses.replace(geometries[0], remarks=remarks)
  return Volume(array, geometry.spacing, geometry)


def check_intensities(path: str | Path, array: np.ndarray) -> None:
  """UserError unless all intensities are finite and within `LARGEST`; NaN compares as False."""
  bad = array.size - int(np.count_nonzero((array > -LARGEST) & (array < LARGEST)))
  if bad:
    raise UserError(f"{path}: {bad} of {array.size} voxels are NaN or infinite, or beyond "
                    f"{LARGEST:g}; replace them, for example by the background's value")


def load_label_map(path: str | Path, like: Geometry) -> np.ndarray:
  """Reads a 3D file of whole numbers, of any axis order, onto an image's canonical grid, `like`.

  int32 [D, H, W]. By its own affine, corner voxels must agree within `GRID_TOLERANCE`. UserError:
  unreadable, not 3D, fractions, or not on the image's grid.
  """
  layers = load_layers(path, like)
  if len(layers) > 1:
    what = ("segments that overlap" if is_label_object(path) else f"4 axes ({len(layers)} layers)")
    raise UserError(f"{path}: has {what} where a 3D label map is expected; "
                    "give one volume of whole numbers")
  return layers[0]


def load_grid(path: str | Path) -> Geometry:
  """Where the voxels of a file lie; UserError if it cannot be read as a whole.

  Of a segmentation of DICOM: from the first frame to the last; UserError for a structure set.
  """
  return own_grid(Path(path)) if is_label_object(path) else _read(Path(path), None)[1]


def load_layers(path: str | Path, like: Geometry) -> list[np.ndarray]:
  """As `load_label_map`, of a file that may have a fourth axis: label maps that may overlap."""
  path = Path(path)
  if is_label_object(path):
    return load_label_object(path, like)[0]
  native, geometry = _read(path, None)
  native = native[..., None] if native.ndim == 3 else native
  if native.ndim != 4:
    raise UserError(f"{path}: has {native.ndim} axes ({itk.size(native.shape)}) where a 3D label "
                    "map is expected; give one volume of whole numbers")
  if native.dtype.kind == "f":
    whole = np.rint(native)
    with np.errstate(invalid="ignore"):  # infinity minus itself is NaN, which compares as False
      near = np.abs(native - whole) <= _rounding(path, whole)
    if not near.all():
      raise UserError(f"{path}: holds values that are not whole numbers (or NaN); "
                      f"is it an image instead of a label map?")
    native = whole
  if native.size and not np.abs(native.astype(np.float64)).max() < 2**31:
    raise UserError(f"{path}: holds values beyond 32 bits; a label map has small whole numbers")
  check_grid(geometry, like, "image and label")
  return [geometry.to_canonical(native[..., layer]).astype(np.int32)
          for layer in range(native.shape[3])]


def _rounding(path: Path, whole: np.ndarray) -> np.ndarray:
  """How far from whole numbers they may be read: float32's rounding, and that of a stored slope.

  Tools that store real numbers as small integers choose a slope, by which 7 may become 6.998.
  """
  slope = 0.0
  if ending_of(path).lower() in NIFTI_ENDINGS:
    stored = open_nifti(path)
    if stored.get_data_dtype().kind in "bui":
      slope = abs(float(stored.dataobj.slope))
  nearest = slope / 2 if slope <= _FINEST else 0.0  # the nearest that the slope can say
  return np.clip(1e-5 * np.abs(whole), 1e-5, 1e-2) + nearest


def write_label_map(path: str | Path, labels: np.ndarray, geometry: Geometry) -> None:
  """Writes whole numbers >= 0, canonical [D, H, W], as .nii(.gz) of the smallest unsigned type."""
  if labels.shape != geometry.canonical_shape:
    raise ValueError(f"labels have shape {labels.shape}, the grid {geometry.canonical_shape}")
  kind = np.min_scalar_type(int(labels.max(initial=0)))
  write_on_grid(path, labels.astype(kind, copy=False), geometry)


def write_on_grid(path: str | Path, canonical: np.ndarray, geometry: Geometry, slope: float = 1.0
                  ) -> None:
  """Writes [D, H, W] of the type that is stored on exactly a file's grid, whole or not at all.

  Shape, affine, units, qform and sform with their codes are the input's; a stored 1 means `slope`.
  """
  header = geometry.header.copy()
  header.extensions.clear()  # they may hold another file's or a patient's particulars
  header.set_data_dtype(canonical.dtype)
  header.set_data_shape(geometry.shape)
  header.set_intent("none")
  header["cal_min"] = header["cal_max"] = 0
  native = np.ascontiguousarray(geometry.to_native(canonical))
  image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
  # Without an affine, nibabel leaves qform and sform as they are; it would choose a slope itself.
  image = image_class(native, None, header)
  image.header.set_slope_inter(slope, 0)
  with replacing(path) as temporary:
    nib.save(image, temporary)


def not_a_volume(path: Path, *left_out: str) -> UserError:
  """About a file or folder that is none, and has none, by its name; left_out: what it has."""
  known = f"files that end in {', '.join(IMAGE_ENDINGS)}, or folders with a DICOM series"
  said = dicom.instead(path) or (
    f"has no volumes ({'; '.join([known, *left_out])}); give a folder that has some"
    if path.is_dir() else f"is not a volume; give {known}")
  return UserError(f"{path}: {said}")


def _read(
  path: Path, kind: type | None, series: str | None = None, modality: str | None = None
) -> tuple[np.ndarray, Geometry]:
  """The voxels in native order, cast to `kind` if given, and the geometry of three axes."""
  if not path.exists():
    raise UserError(f"{path}: does not exist; check the path")
  ending = ending_of(path).lower()
  if path.is_dir() or ending in (*itk.ENDINGS, ARCHIVE):
    if path.is_dir() or ending == ARCHIVE:
      native, affine, remarks, slices = dicom.read_series(path, series, modality)
      geometry = geometry_of(path, native.shape, affine, remarks)
      geometry = dataclasses.replace(geometry, series=slices)
    else:
      native, affine = itk.read_file(path)
      geometry = geometry_of(path, native.shape, affine)
    with np.errstate(all="ignore"):  # as below
      return native if kind is None else native.astype(kind, copy=False), geometry
  if not path.is_file() or ending not in NIFTI_ENDINGS:
    raise not_a_volume(path)
  try:
    with np.errstate(all="ignore"):  # what overflows is found by check_intensities
      return _read_nifti(path, kind)
  except (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError,
          nib.spatialimages.ImageDataError, OSError, EOFError, ValueError, OverflowError,
          zlib.error) as error:
    reason = first_line(error, 1000).replace(str(path), path.name)
    raise UserError(f"{path}: cannot be read as NIfTI, perhaps truncated ({reason}); "
                    f"copy or convert the file again") from None


def open_nifti(path: Path) -> Any:
  """nibabel's image of a file, its voxels not read; nibabel alone does not find A.Nii.

  Raises what nibabel raises.
  """
  ending = ending_of(path)
  if ending in (ending.lower(), ending.upper()):
    return nib.load(path)
  with nib.openers.Opener(str(path)) as file:
    second = file.read(4) in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # its header has 540 bytes
  kind = nib.Nifti2Image if second else nib.Nifti1Image
  return kind.from_file_map({"image": nib.fileholders.FileHolder(str(path))})


def _read_nifti(path: Path, kind: type | None) -> tuple[np.ndarray, Geometry]:
  image = open_nifti(path)
  if not isinstance(image, nib.Nifti1Image):
    raise UserError(f"{path}: is not a NIfTI file; convert it to .nii.gz")
  if image.get_data_dtype().kind not in "buif":
    raise UserError(f"{path}: voxels are of type {image.header.get_value_label('datatype')}; "
                    f"convert the file to whole or real numbers")
  check_sizes(path, image)
  geometry = geometry_of(path, image.shape, image.header)
  packed = path.name.lower().endswith(".gz")
  itk.check_claim(path, image.shape, image.get_data_dtype().itemsize, packed)
  with gzip.open(path) if packed else contextlib.nullcontext() as stream:
    if stream is not None:
      image = type(image).from_stream(stream)
    native = (np.asanyarray(image.dataobj) if kind is None
              else image.get_fdata(caching="unchanged", dtype=kind))
    while stream is not None and stream.read(_BLOCK):
      pass  # its checksum stands at its end
  # Of NIfTI's axes one is time and the next is components: channels are one or the other.
  return native.reshape(*native.shape[:3], *(n for n in native.shape[3:] if n != 1)), geometry
