"""The files that a page may see: NIfTI volumes below one folder, by their names in it."""

import os
from pathlib import Path

import nibabel as nib

from rfmedsam2_jax.data.volumes import NIFTI_ENDINGS
from rfmedsam2_jax.errors import UserError

LISTED = 2000  # files; a page of more helps nobody


def is_nifti_name(name: str) -> bool:
  """Whether a file may be opened: headers of other formats (.mhd) can name a file elsewhere."""
  return name.endswith(NIFTI_ENDINGS) and not Path(name).name.startswith(".")


def volumes_below(folder: Path) -> list[str]:
  """Names of the volumes, relative to the folder; links to elsewhere are left out."""
  names: list[str] = []
  for place, folders, files in os.walk(folder, followlinks=False):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    for name in sorted(files):
      relative = Path(place, name).relative_to(folder).as_posix()
      if _inside(folder, relative):
        names.append(relative)
      if len(names) == LISTED:
        return names
  return names


def find_below(folder: Path, name: str) -> Path:
  """The file of a name that `volumes_below` could give.

  Args:
    folder: resolved.

  Raises:
    UserError: anything else: absolute names, `..`, links that leave the folder, hidden files.
  """
  path = _inside(folder, name)
  if path is None:
    raise UserError(f"{name}: is no NIfTI volume of the folder; choose one of the list")
  return path


def _inside(folder: Path, name: str) -> Path | None:
  if "\0" in name or any(part.startswith(".") for part in name.split("/")):
    return None
  try:
    path = (folder / name).resolve()
    inside = path.is_relative_to(folder) and path.is_file() and is_nifti_name(name)
  except (OSError, RuntimeError):  # names that are too long, links that run in a circle
    return None
  return path if inside else None


def check_voxels(path: Path, limit: int) -> None:
  """UserError if the header says more voxels than `limit`; readers judge what is unreadable."""
  try:
    image = nib.load(path)
  except Exception:  # whatever a damaged header does; load_image says it better
    return
  if not isinstance(image, nib.Nifti1Image):
    return
  voxels = 1
  for size in image.shape:
    voxels *= int(size)
  if voxels > limit:
    raise UserError(f"{path}: has {voxels} voxels where {limit} are allowed; "
                    "crop it, or start with a larger --max-voxels")
