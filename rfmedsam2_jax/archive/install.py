"""An archive into the folder of this user's models, where it is known by its name."""

import hashlib
import shutil
import zipfile
from pathlib import Path

from rfmedsam2_jax.archive.manifest import NAME, Entry, Manifest, check_inside, read_manifest
from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.base.kept import check_name, shelf
from rfmedsam2_jax.base.places import BUILTIN
from rfmedsam2_jax.base.progress import Passing, Report, silent
from rfmedsam2_jax.data.files import DAMAGED_ZIP, replacing_whole, sha256_of
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.weights.published import PUBLISHED

_LARGEST_TEXT = 2**24  # bytes of a file without weights
_BLOCK = 2**20


def install(
  source: str | Path, name: str | None = None, overwrite: bool = False, sha256: str | None = None,
  report: Report = silent,
) -> tuple[Path, Manifest]:
  """Unpacks an archive, whose every byte and whose networks are looked at, or leaves all as it was.

  Args:
    name: by which it is kept; its own.
    sha256: that the archive must have.

  Returns:
    The model's folder, and what it says of itself.

  Raises:
    UserError: no archive of a model, a damaged one, one that would write elsewhere, a name that is
      taken.
  """
  source = Path(source)
  if not source.is_file():
    raise UserError(f"{source}: no such file; give a model.zip that rfmedsam2 export made")
  if sha256 is not None:
    if (found := sha256_of(source)) != sha256.lower():
      raise UserError(f"{source}: has SHA-256 {found}, not the given one; download it again, from "
                      "somebody you trust")
  try:
    with zipfile.ZipFile(source) as archive:
      return _installed(archive, source, name, overwrite, report)
  except (*DAMAGED_ZIP, KeyError) as error:
    raise UserError(f"{source}: is damaged or no archive of a model ({first_line(error, 160)}); "
                    "copy or download it again") from None


def _installed(
  archive: zipfile.ZipFile, source: Path, name: str | None, overwrite: bool, report: Report,
) -> tuple[Path, Manifest]:
  entries = {info.filename: info for info in archive.infolist()}
  for inside in entries:
    check_inside(inside)
  if NAME not in entries or len(entries) != len(archive.infolist()):
    raise ValueError(f"it has no {NAME}, or two files of one name")
  if entries[NAME].file_size > _LARGEST_TEXT:
    raise ValueError(f"its {NAME} is too large")
  said = archive.read(NAME)
  manifest = read_manifest(said)
  if others := sorted(entries.keys() ^ {NAME, *manifest.files}):
    what = "is not listed in" if others[0] in entries else "is missing, but listed in"
    raise ValueError(f"{others[0]} {what} its {NAME}")
  target = _target(name or manifest.name, source, overwrite)
  with replacing_whole(target) as temporary:
    temporary.mkdir()
    _check_room(manifest, source)
    (temporary / NAME).write_bytes(said)
    for inside, entry in manifest.files.items():
      report(Passing(f"unpacking {inside}"))
      _unpack(archive, inside, entry, temporary / inside)
    report(Passing("looking at its networks"))
    _check_networks(temporary, manifest, source)
  return target, manifest


def _target(name: str, source: Path, overwrite: bool) -> Path:
  check_name(name, f"{source}: ")
  if name == BUILTIN or name in PUBLISHED:
    raise UserError(f"{name}: is the name of other weights; install it under another one, --name")
  target = shelf("models") / name
  if target.exists() and not overwrite:
    raise UserError(f"{name}: is installed already, in {target}; replace it with --overwrite or "
                    "choose another --name")
  return target


def _check_room(manifest: Manifest, source: Path) -> None:
  needed = sum(entry.bytes for entry in manifest.files.values())
  free = shutil.disk_usage(shelf("models")).free
  if needed > free:
    raise UserError(f"{source}: needs {needed / 1e6:.0f} MB in {shelf('models')}, which has "
                    f"{free / 1e6:.0f}; free it")


def _unpack(archive: zipfile.ZipFile, inside: str, entry: Entry, target: Path) -> None:
  """Writes one file of an archive; ValueError if it is not the one that was listed."""
  target.parent.mkdir(parents=True, exist_ok=True)
  digest, left = hashlib.sha256(), entry.bytes
  with archive.open(inside) as stream, open(target, "xb") as out:
    while block := stream.read(_BLOCK):
      left -= len(block)
      if left < 0:
        break
      digest.update(block)
      out.write(block)
  if left or digest.hexdigest() != entry.sha256:
    raise ValueError(f"{inside} does not have the SHA-256 and the size of its {NAME}")


def _check_networks(folder: Path, manifest: Manifest, source: Path) -> None:
  """UserError if what was unpacked cannot be loaded."""
  # Only here: they bring JAX, and what is wrong with a file is said before.
  from rfmedsam2_jax.model import load
  from rfmedsam2_jax.weights.checkpoint import load_checkpoint
  try:
    if "generator" in manifest.networks:
      load(folder)
    if "tracker" in manifest.networks:
      load_checkpoint(RunFolder(folder).params("tracker"))
  except UserError as error:
    raise UserError(f"{source}: {str(error).replace(f'{folder}/', '')}") from None
