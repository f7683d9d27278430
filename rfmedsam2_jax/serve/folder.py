"""The files that a page may see: volumes below one folder, by their names in it.

A header can name a file elsewhere as its voxels, and claim more of them than memory holds.
"""

import math
import os
import re
from pathlib import Path

import nibabel as nib

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.itk import WITH_VOXELS, claimed_voxels
from rfmedsam2_jax.data.names import ARCHIVE, NIFTI_ENDINGS, ending_of, is_series_folder
from rfmedsam2_jax.data.studies import claimed_bytes
from rfmedsam2_jax.data.volumes import open_nifti

# .nhdr and .mhd name their voxels' file: these are left to the other commands.
ENDINGS = (*NIFTI_ENDINGS, *WITH_VOXELS, ARCHIVE)
LISTED = 2000  # files; a page of more helps nobody
_HEADER = 1 << 20  # bytes within which the header of NRRD or MetaImage ends
_OFFSET = 1 << 26  # bytes of extensions before the voxels of a NIfTI file


def is_volume_name(name: str) -> bool:
  """Whether a file may be opened."""
  return name.lower().endswith(ENDINGS) and not Path(name).name.startswith(".")


def volumes_below(folder: Path) -> list[str]:
  """Names of the volumes, relative to the folder; links to elsewhere are left out."""
  names: list[str] = []
  for place, folders, files in os.walk(folder, followlinks=False):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    for name in sorted([*files, *folders]):
      relative = Path(place, name).relative_to(folder).as_posix()
      if _inside(folder, relative):
        names.append(relative)
      if len(names) == LISTED:
        return names
  return names


def find_below(folder: Path, name: str) -> Path:
  """The file, or the folder of a DICOM series, of a name that `volumes_below` could give.

  UserError for others: absolute names, `..`, links that leave the resolved folder, hidden files.
  """
  path = _inside(folder, name)
  if path is None:
    raise UserError(f"{name}: is no volume of the folder; choose one of the list")
  return path


def _inside(folder: Path, name: str) -> Path | None:
  if "\0" in name or any(part.startswith(".") or not part for part in name.split("/")):
    return None
  try:
    name.encode()  # a name that is no text cannot be told to the page
    path = folder / name  # its own name, by which it is read, and not that of a link's target
    if not path.resolve().is_relative_to(folder):
      return None
    if path.is_dir():  # a DICOM series, no file of which is a link that leaves the folder
      links = (entry for entry in path.iterdir() if entry.is_symlink())
      known = is_series_folder(path) and all(e.resolve().is_relative_to(folder) for e in links)
    else:
      known = path.is_file() and is_volume_name(name)
    return path if known else None
  except (OSError, RuntimeError, UnicodeError):  # too long, links that run in a circle
    return None


def check_volume(path: Path, limit: int) -> None:
  """UserError if a header names a file elsewhere or says more than `limit` voxels."""
  voxels = 0
  if ending_of(path).lower() in NIFTI_ENDINGS:
    try:
      image = open_nifti(path)
    except Exception:  # whatever a damaged header does; load_image says it better
      return
    if isinstance(image, nib.Nifti1Image):
      voxels = math.prod(map(int, image.shape))
      offset = getattr(image.dataobj, "offset", 0)  # that of the header is cleared by then
      if offset > _OFFSET:
        raise UserError(f"{path}: its header claims that the voxels begin at byte {offset}; "
                        "copy or convert the file again")
  elif ending_of(path).lower() == ARCHIVE:
    voxels = claimed_bytes(path) // 2  # of two bytes each, as nearly all
  else:
    if path.is_file():
      _check_alone(path)
    voxels = claimed_voxels(path)
  if voxels > limit:
    raise UserError(f"{path}: has {voxels} voxels where {limit} are allowed; "
                    "crop it, or let the server take larger volumes")


def _check_alone(path: Path) -> None:
  """UserError unless the voxels of an NRRD or MetaImage file are in the file itself."""
  with path.open("rb") as file:
    header = file.read(_HEADER)
  if ending_of(path).lower() == ".mha":
    # The first one ends the header.
    told = re.search(rb"ElementDataFile[ \t]*[=:][ \t]*([^\r\n]*)", header)
    alone = told is not None and told[1].strip() == b"LOCAL"
  else:
    header = re.split(rb"\r?\n\r?\n", header, maxsplit=1)[0].lower()
    alone = not re.search(rb"data[ \t]*file", header)
  if not alone:
    raise UserError(f"{path}: its header names another file as its voxels; convert it to one file")
