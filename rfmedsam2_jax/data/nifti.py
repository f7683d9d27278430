"""Which of the transforms of a NIfTI file counts: the one that ITK takes, and so 3D Slicer.

A file may have two, qform and sform, each with a code that says what it leads to, and voxel sizes
(`pixdim`) that need not be those of the sform.
"""

from pathlib import Path

import nibabel as nib
import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.grids import SINGULAR, TILT_TOLERANCE, displacement, lean

_MILLIMETRES = {1: 1000.0, 3: 0.001}  # NIfTI's codes of metres and micrometres
_SCANNER = 1  # the code of an sform that ITK prefers to a qform
_ORTHONORMAL, _SAME = 1e-4, 1e-4  # ITK's tolerances of matrix elements
# Transforms that differ by less than this part of a voxel differ by rounding: nibabel's is taken.
_ROUNDING = 0.05


def millimetres(header: nib.Nifti1Header) -> float:
  """The length of the file's unit; without a unit it is taken as a millimetre."""
  return _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)


def header_of(affine: np.ndarray) -> nib.Nifti1Header:
  """Of a volume of another format: mm, in the scanner's coordinates."""
  header = nib.Nifti1Header()
  header.set_xyzt_units("mm")
  header.set_qform(affine, code=_SCANNER)
  header.set_sform(affine, code=_SCANNER)
  if not _directions(affine)[1]:  # a qform has right angles
    header["qform_code"] = 0
  return header


def placement(path: Path, header: nib.Nifti1Header, shape: tuple[int, int, int]
              ) -> tuple[np.ndarray, nib.Nifti1Header, tuple[str, ...]]:
  """Where voxels lie, the header of what is written there, and what a person should know of it.

  Where the transforms contradict each other, both of the header become the one that counts.
  UserError: ITK's choice is chance. ValueError: a qform that counts is no rotation.

  Returns:
    float64 [4, 4], voxel index (i, j, k) to world (RAS+), in the file's units; may be no affine.
    The header; sentences.
  """
  chosen, code = _as_itk(path, header)
  if code == 0:
    return chosen, header.copy(), (
      "has neither qform nor sform, so nothing says which side is left; its axes are taken to "
      "run to left, back and head (LPS+), as ITK and 3D Slicer do; check the result",)
  forms = _forms(header)
  with np.errstate(all="ignore"):
    apart = {name: displacement(chosen, form, shape) for name, form in forms.items()}
    smallest = np.linalg.norm(chosen[:3, :3], axis=0).min()
  wrong = [name for name, distance in apart.items() if not distance <= _ROUNDING * smallest]
  if not wrong or not np.isfinite(chosen).all():
    return np.asarray(header.get_best_affine(), np.float64), header.copy(), ()
  header = header.copy()
  header.set_qform(chosen, code)
  header.set_sform(chosen, code)
  far = max(apart.values()) * millimetres(header)
  return chosen, header, (
    f"its {_contradiction(chosen, forms)} contradict each other"
    + (f" by up to {far:.4g} mm" if np.isfinite(far) else "")
    + "; it is taken where ITK and 3D Slicer see it; correct its header if that is wrong",)


def _forms(header: nib.Nifti1Header) -> dict[str, np.ndarray]:
  """Those that the codes say are there; one that is no transform is NaN."""
  forms = {}
  if header["sform_code"] > 0:
    forms["sform"] = header.get_sform()
  if header["qform_code"] > 0:
    try:
      forms["qform"] = header.get_qform()
    except ValueError:  # a quaternion that is too long
      forms["qform"] = np.full((4, 4), np.nan)
  return forms


def _contradiction(chosen: np.ndarray, forms: dict[str, np.ndarray]) -> str:
  sform, qform = forms.get("sform", chosen), forms.get("qform", chosen)
  turned = np.abs(_directions(chosen)[0] - _directions(sform)[0])
  sizes = (bool((turned <= _ORTHONORMAL).all())
           and np.allclose(chosen[:, 3], sform[:, 3]) and np.allclose(chosen, qform))
  return "sform and voxel sizes (pixdim)" if sizes else "qform and sform"


def _as_itk(path: Path, header: nib.Nifti1Header) -> tuple[np.ndarray, int]:
  """The affine as ITK 5.4 chooses it (`SetImageIOOrientationFromNIfTI`), and its code.

  The sform gives directions and origin, if its axes are perpendicular and its code is "scanner",
  or there is no qform, or both are the same; else the qform. Sizes are always pixdim's. Only where
  ITK can read nothing, or would read a scanner's sheared sform as an unsheared qform, the sform is
  taken as it is.
  """
  sizes = np.asarray(header.get_zooms()[:3], np.float64)
  sform, scode = header.get_sform(coded=True)
  qcode = int(header["qform_code"])
  if sform is None and qcode == 0:
    return np.diag([-sizes[0], -sizes[1], sizes[2], 1.0]), 0
  if sform is None:
    return header.get_qform(), qcode
  directions, straight, sheared = _directions(sform)
  scaled = sform.copy()
  scaled[:3, :3] = directions * sizes
  if straight and (scode == _SCANNER or qcode == 0):
    return scaled, int(scode)
  if qcode == 0 or (scode == _SCANNER and sheared):
    return sform, int(scode)
  qform = header.get_qform()
  # ITK compares singular vectors, which do not tell an axis from its reverse.
  signs = np.sign((sform * qform)[:3].sum(axis=0))
  signs[3] = 1
  if not straight or not np.allclose(sform, qform * signs, rtol=0, atol=_SAME):
    return qform, qcode
  along = np.abs(directions).max(axis=0).min() > 1 - _SAME  # the patient's axes
  if (signs > 0).all() or along:
    return scaled, int(scode)
  raise UserError(f"{path}: its qform and sform are mirror images of each other, and ITK takes "
                  "either by chance; correct its header")


def _directions(affine: np.ndarray) -> tuple[np.ndarray, bool, bool]:
  """Unit columns of an affine; whether ITK finds them perpendicular; whether they lean too much."""
  with np.errstate(all="ignore"):  # a column may be zero, or no number
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    straight = np.allclose(directions @ directions.T, np.eye(3), rtol=0, atol=_ORTHONORMAL)
    regular = abs(np.linalg.det(directions)) > SINGULAR  # NaN compares as False
  if straight:  # ITK inverts the whole affine
    values = np.linalg.svd(affine, compute_uv=False)
    straight = bool(values[-1] > np.finfo(np.float64).eps * values[0])
  return directions, straight, bool(regular) and lean(directions) > TILT_TOLERANCE


def check_sizes(path: Path, image: nib.Nifti1Image) -> None:
  """UserError unless voxel sizes are above 0, which nibabel makes of them without a word.

  ITK takes a negative size as a mirrored axis.
  """
  with image.file_map["image"].get_prepare_fileobj("rb") as file:
    stored = type(image.header).from_fileobj(file, check=False)["pixdim"][1:4]
  if not (stored > 0).all():  # NaN compares as False
    raise UserError(f"{path}: its voxel sizes (pixdim) are {' x '.join(f'{s:g}' for s in stored)}, "
                    "not above 0; correct its header")
