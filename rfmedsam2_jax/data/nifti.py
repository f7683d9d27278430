"""Which of the transforms of a NIfTI file counts: the one that ITK takes, and so 3D Slicer.

A file may have two, qform and sform, each with a code that says what it leads to, and voxel sizes
(`pixdim`) that need not be those of the sform.
"""

import nibabel as nib
import numpy as np

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


def placement(header: nib.Nifti1Header, shape: tuple[int, int, int]
              ) -> tuple[np.ndarray, nib.Nifti1Header, tuple[str, ...]]:
  """Where voxels lie, the header of what is written there, and what a person should know of it.

  Where the transforms contradict each other, both of the header become the one that counts.

  Returns:
    float64 [4, 4], voxel index (i, j, k) to world (RAS+), in the file's units; may be no affine.
    The header; sentences. ValueError: a qform that counts is no rotation.
  """
  header, usual = header.copy(), np.asarray(header.get_best_affine(), np.float64)
  chosen, code = _as_itk(header)
  if code == 0:
    return chosen, header, (
      "has neither qform nor sform, so nothing says which side is left; its axes are taken to "
      "run to left, back and head (LPS+), as ITK and 3D Slicer do; check the result",)
  distance = displacement(chosen, usual, shape)
  if not distance > _ROUNDING * np.linalg.norm(chosen[:3, :3], axis=0).min():  # or NaN
    return usual, header, ()
  header.set_qform(chosen, code)
  header.set_sform(chosen, code)
  return chosen, header, (
    f"its {_contradiction(chosen, usual)} contradict each other by up to "
    f"{distance * millimetres(header):.4g} mm; it is taken where ITK and 3D Slicer see it, not "
    "where nibabel does; correct its header if that is wrong",)


def _contradiction(chosen: np.ndarray, usual: np.ndarray) -> str:
  """What is contradicted: the sform, `usual`, by the qform or by the voxel sizes alone."""
  turned = [affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) for affine in (chosen, usual)]
  alike = np.allclose(turned[0], turned[1], atol=_ORTHONORMAL)
  alone = alike and np.allclose(chosen[:, 3], usual[:, 3])
  return "sform and voxel sizes (pixdim)" if alone else "qform and sform"


def _as_itk(header: nib.Nifti1Header) -> tuple[np.ndarray, int]:
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
  if sform is not None:
    directions, straight, sheared = _directions(sform)
    scaled = sform.copy()
    scaled[:3, :3] = directions * sizes
    if straight and (scode == _SCANNER or qcode == 0):
      return scaled, int(scode)
    if qcode == 0 or (scode == _SCANNER and sheared):
      return sform, int(scode)
  qform = header.get_qform()
  if sform is not None and straight and np.allclose(sform, qform, rtol=0, atol=_SAME):
    return scaled, int(scode)
  return qform, qcode


def _directions(affine: np.ndarray) -> tuple[np.ndarray, bool, bool]:
  """Unit columns of an affine; whether they are perpendicular; whether they lean too much."""
  with np.errstate(all="ignore"):  # a column may be zero, or no number
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    straight = np.allclose(directions @ directions.T, np.eye(3), rtol=0, atol=_ORTHONORMAL)
    regular = abs(np.linalg.det(directions)) > SINGULAR  # NaN compares as False
  return directions, straight, bool(regular) and lean(directions) > TILT_TOLERANCE
