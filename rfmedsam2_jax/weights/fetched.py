"""Published weights on this machine: what was downloaded, from where, and with which SHA-256."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.kept import home, shelf
from rfmedsam2_jax.base.locking import hold
from rfmedsam2_jax.base.progress import Report, silent
from rfmedsam2_jax.data.files import Stored, load_json, replacing_whole, save_json, sha256_of
from rfmedsam2_jax.weights.download import download, hub_address, meta_address
from rfmedsam2_jax.weights.published import Published, published

NOTE = "fetched.json"  # in the checkpoint's folder
RECORDED = "recorded.json"  # on the shelf: of first downloads, also of what was removed again


@dataclasses.dataclass(frozen=True)
class Fetched(Stored):
  """sha256: of the file. known: who says so: "pinned" in this program, "given" by the user,
  "hub", or "recorded" at the first download.
  """

  name: str
  file: str
  address: str
  sha256: str
  known: str
  licence: str


def fetch(
  name: str, convert: Callable[[Path, Path, Published], None], source: str | None = None,
  sha256: str | None = None, report: Report = silent,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
  """Downloads, checks and converts published weights; returns the checkpoint's folder.

  Args:
    convert: writes a checkpoint into a folder: of the file, the folder, what it is.
    source: "meta" or "hub"; None: Meta where it has the file.
    sha256: that the file must have, instead of the one that is known.

  Raises:
    UserError: an unknown name, no network, a file with another SHA-256; nothing is kept of that.
  """
  what = published(name)
  by_hub = ""
  if source == "hub" or (source is None and not what.meta):
    address, by_hub = hub_address(what)
  else:
    address = meta_address(what)
  report(f"from {address}")
  file = home() / "downloads" / what.file
  file.parent.mkdir(parents=True, exist_ok=True)
  lock = file.with_name(f"{what.file}.lock")
  with open(lock, "w") as held:
    hold(held, file)  # two that wrote to one file would mix their bytes
    try:
      return _fetched(name, what, address, by_hub, file, convert, sha256, progress)
    finally:
      lock.unlink(missing_ok=True)


def _fetched(
  name: str, what: Published, address: str, by_hub: str, file: Path,
  convert: Callable[[Path, Path, Published], None], sha256: str | None,
  progress: Callable[[int, int], None],
) -> Path:
  download(address, file, progress)
  found, recorded = sha256_of(file), _recorded()
  candidates = (("given", (sha256 or "").lower()), ("pinned", what.sha256),
                ("recorded", recorded.get(name, "")), ("hub", by_hub), ("recorded", found))
  known, expected = next((how, digest) for how, digest in candidates if digest)
  if wrong := next((x for x in (expected, by_hub) if x and x != found), None):
    file.unlink()
    anew = ("if it was published anew: --overwrite --sha256 with the new one"
            if known == "recorded" else "fetch it again, or from elsewhere (--source)")
    raise UserError(f"{what.file}: came from {address} with SHA-256 {found}, {wrong} is expected "
                    f"({known}); nothing was kept, {anew}")
  target = shelf("weights") / name
  try:
    with replacing_whole(target) as temporary:
      convert(file, temporary, what)
      save_json(temporary / NOTE, Fetched(name, what.file, address, found, known, what.licence))
  finally:
    file.unlink()
  save_json(target.with_name(RECORDED), recorded | {name: found})
  return target


def note_of(folder: Path) -> Fetched:
  return load_json(folder / NOTE, Fetched)


def _recorded() -> dict[str, str]:
  path = shelf("weights") / RECORDED
  return load_json(path, dict[str, str]) if path.exists() else {}
