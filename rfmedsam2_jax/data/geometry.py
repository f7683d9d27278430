"""Where a volume's voxels lie: axes of any order and flip, and the way to one orientation and back.

Everything behind works in one orientation, LPS+ with axes (z, y, x), which is SimpleITK's array
order; `Geometry` remembers how to go back.
"""

import dataclasses
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.grids import GRID_TOLERANCE, SINGULAR, TILT_TOLERANCE, displacement, lean
from rfmedsam2_jax.data.itk import size
from rfmedsam2_jax.data.measures import voxel_ml
from rfmedsam2_jax.data.nifti import header_of, millimetres, placement
from rfmedsam2_jax.data.slices import Slice

LARGEST = 1e15  # squares of what is larger overflow float32; no scanner gives it


@dataclasses.dataclass(frozen=True, eq=False)
class Geometry:
  """Where a volume's voxels lie, and what is needed to write another volume onto its grid."""

  path: Path  #: the file it was read from, for messages
  #: Of a NIfTI file units, qform and sform with their codes, in agreement; of another format: mm.
  header: nib.Nifti1Header
  #: float64 [4, 4], native voxel index (i, j, k) to world (RAS+), in the file's units.
  affine: np.ndarray
  shape: tuple[int, int, int]  #: native (i, j, k)
  axes: tuple[int, int, int]  #: the native axis that runs along canonical z, y and x
  flipped: tuple[bool, bool, bool]  #: whether it runs against canonical z, y and x
  remarks: tuple[str, ...] = ()  #: what a person should know of the file; sentences without it
  series: tuple[Slice, ...] = ()  #: of a DICOM series its slices, in the order of k

  @property
  def canonical_shape(self) -> tuple[int, int, int]:
    """(z, y, x)."""
    z, y, x = (self.shape[axis] for axis in self.axes)
    return z, y, x

  @property
  def canonical_affine(self) -> np.ndarray:
    """float64 [4, 4], canonical voxel index (z, y, x) to world (RAS+), in the file's units."""
    to_native = np.diag([0.0, 0.0, 0.0, 1.0])
    for canonical, (native, flip) in enumerate(zip(self.axes, self.flipped, strict=True)):
      to_native[native, [canonical, 3]] = (-1, self.shape[native] - 1) if flip else (1, 0)
    return self.affine @ to_native

  @property
  def affine_mm(self) -> np.ndarray:
    """`affine` in mm, whatever the file's units."""
    return self._to_mm @ self.affine

  @property
  def canonical_affine_mm(self) -> np.ndarray:
    """`canonical_affine` in mm, whatever the file's units."""
    return self._to_mm @ self.canonical_affine

  @property
  def _to_mm(self) -> np.ndarray:
    return np.diag([*[millimetres(self.header)] * 3, 1.0])

  @property
  def spacing(self) -> tuple[float, float, float]:
    """Voxel size in mm along canonical (z, y, x), to the six digits that float32 headers carry."""
    sizes = np.linalg.norm(self.affine_mm[:3, :3], axis=0)
    z, y, x = (float(f"{sizes[axis]:.6g}") for axis in self.axes)
    return z, y, x

  @property
  def voxel_steps(self) -> np.ndarray:
    """float64 [3, 3], mm; columns are the steps from a voxel to the next along canonical z, y, x.

    They are as long as `spacing` says; their angles are the affine's.
    """
    steps = self.canonical_affine_mm[:3, :3]
    return steps / np.linalg.norm(steps, axis=0) * self.spacing

  @property
  def directions(self) -> np.ndarray:
    """float64 [3, 3], unit columns: where the native axes run in RAS+."""
    return self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)

  @property
  def voxel_ml(self) -> float:
    """How many ml a voxel has: less than the product of its sides where axes lean."""
    return voxel_ml(self.spacing) * round(float(abs(np.linalg.det(self.directions))), 6)

  def canonical_points(self, points: ArrayLike, world: bool = False) -> np.ndarray:
    """Real [n, 3], (i, j, k) of the file or, `world`, RAS+ in mm, as canonical (z, y, x)."""
    points = np.asarray(points, np.float64)
    if world:
      inverse = np.linalg.inv(self.canonical_affine_mm)
      # The way through the affine leaves rounding errors of its size behind.
      return np.round(points @ inverse[:3, :3].T + inverse[:3, 3], 4)
    ours = points[:, list(self.axes)]
    return np.where(self.flipped, np.array(self.canonical_shape) - 1 - ours, ours)

  def to_canonical(self, native: np.ndarray) -> np.ndarray:
    """[i, j, k] as a contiguous [z, y, x]."""
    return np.ascontiguousarray(native.transpose(self.axes)[self._flips])

  def to_native(self, canonical: np.ndarray) -> np.ndarray:
    """[z, y, x] as a view [i, j, k]; the inverse of `to_canonical`."""
    return canonical[self._flips].transpose(np.argsort(self.axes))

  @property
  def _flips(self) -> tuple[slice, ...]:
    return tuple(slice(None, None, -1 if flip else 1) for flip in self.flipped)


def geometry_of(path: Path, shape: tuple[int, ...], place: np.ndarray | nib.Nifti1Header,
                remarks: tuple[str, ...] = ()) -> Geometry:
  """The geometry of a file's voxels; UserError for less than three axes and what is no grid.

  Args:
    shape: native. place: the affine in RAS+, mm, or the header of a NIfTI file.
  """
  if len(shape) < 3 or 0 in shape:
    raise UserError(f"{path}: has the size {size(shape)}; a volume with three axes is expected")
  header: nib.Nifti1Header | None = None
  if isinstance(place, nib.Nifti1Header):
    affine, header, remarks = placement(path, place, (shape[0], shape[1], shape[2]))
  else:
    affine = np.asarray(place, np.float64)
  finite = bool((np.abs(affine) < LARGEST).all())  # NaN compares as False
  sizes = np.linalg.norm(affine[:3, :3], axis=0) if finite else np.zeros(3)
  if not (sizes > 0).all():
    raise UserError(f"{path}: its affine is not finite or has an axis without length; "
                    f"correct the file's header")
  directions = affine[:3, :3] / sizes
  if abs(np.linalg.det(directions)) < SINGULAR:
    raise UserError(f"{path}: its affine is singular (axes that coincide); correct the file's "
                    f"header")
  i, j, k = shape[:3]
  header = header_of(affine) if header is None else header
  return Geometry(path, header, affine, (i, j, k), *_orientation(directions), remarks)


def check_right_angles(geometry: Geometry) -> None:
  """UserError for a sheared grid: an image is resampled and segmented by its spacing alone."""
  if (degrees := lean(geometry.directions)) > TILT_TOLERANCE:
    raise UserError(
      f"{geometry.path}: its axes are sheared, {degrees:.1f} degrees from right angles (a tilted "
      "gantry?), which makes distances wrong; resample it to a grid with right angles, or convert "
      "its DICOM series by dcm2niix, which does")


def check_grid(geometry: Geometry, like: Geometry, what: str) -> None:
  """UserError unless both canonical grids agree in shape and world space."""
  ours, theirs = geometry.canonical_shape, like.canonical_shape
  advice = "; ".join(["resample one onto the other's grid or correct its affine",
                      *(f"{g.path.name}: {said}" for g in (geometry, like) for said in g.remarks)])
  if ours != theirs:
    raise UserError(f"{geometry.path}: {what} of different space: its grid (z, y, x) is {ours}, "
                    f"that of {like.path} is {theirs}; {advice}")
  distance = displacement(geometry.canonical_affine_mm, like.canonical_affine_mm, ours)
  smallest = min(like.spacing)
  if distance > GRID_TOLERANCE * smallest:
    raise UserError(f"{geometry.path}: {what} of different space: its corners lie {distance:.4g} "
                    f"mm from those of {like.path} (voxels of {smallest:.4g} mm); {advice}")


def _orientation(directions: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
  """Native axes nearest to canonical z, y, x, and which run the other way, of unit RAS+ columns."""
  def closeness(axes: tuple[int, ...]) -> tuple[float, float]:
    columns = directions[:, axes[::-1]]  # along world x, y, z
    # The second number decides at 45 degrees. It must not depend on the order or sign of the
    # native axes, else two orders of one volume would become two canonical volumes.
    return (round(float((np.diag(columns) ** 2).sum()), 6),
            float((np.diag(columns) * np.diag(np.roll(columns, -1, axis=0))).sum()))

  z, y, x = max(itertools.permutations(range(3)), key=closeness)
  # Canonical z runs to Superior (+), y to Posterior (-), x to Left (-).
  flipped = (bool(directions[2, z] < 0), bool(directions[1, y] > 0), bool(directions[0, x] > 0))
  return (z, y, x), flipped
