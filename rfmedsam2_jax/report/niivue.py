"""The viewer of the report's pages: NiiVue's bundle, fetched once and checked against its hash.

Too large for the repository: building the package fetches it, which runs this file alone, or
`python -m rfmedsam2_jax.report.niivue` where that had no network.
"""

import base64
import hashlib
import io
import os
import sys
import tarfile
import urllib.request
import zlib
from pathlib import Path

VERSION = "0.69.0"
# As the npm registry gives it: `npm view @niivue/niivue@0.69.0 dist.integrity`.
INTEGRITY = (
  "sha512-YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA=="
)
# A classic script, which works from a folder.
MEMBER = "package/dist/niivue.umd.js"
FILE = "niivue.umd.js"
FILE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
LICENSE = "NIIVUE-LICENSE.txt"
ADVICE = "fetch it once with python -m rfmedsam2_jax.report.niivue"

_FOLDER = Path(__file__).parent / "static"
_LARGEST = 32 * 2**20  # bytes of the archive, and of the file in it


def bundle(folder: Path = _FOLDER) -> Path | None:
  """The file if it is installed and whole."""
  path = folder / FILE
  whole = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == FILE_SHA256
  return path if whole else None


def fetch(folder: Path = _FOLDER, timeout: float = 60) -> Path:
  """Downloads the archive, checks it, and writes the one file of it; does nothing if it is there.

  The environment variable npm_config_registry names another registry than registry.npmjs.org.
  `timeout`: seconds without an answer.

  Raises:
    OSError: no network, or no place to write.
    ValueError: what was downloaded is not the pinned archive.
  """
  if found := bundle(folder):
    return found
  registry = os.environ.get("npm_config_registry") or os.environ.get("NPM_CONFIG_REGISTRY")
  address = (registry or "https://registry.npmjs.org").rstrip("/")
  if not address.startswith(("https://", "http://")):
    raise ValueError(f"npm_config_registry: {registry} is not an address; correct or unset it")
  address += f"/@niivue/niivue/-/niivue-{VERSION}.tgz"
  with urllib.request.urlopen(address, timeout=timeout) as answer:
    content = unpack(answer.read(_LARGEST + 1))
  temporary = folder / f".{os.getpid()}.{FILE}"
  try:
    temporary.write_bytes(content)
    return temporary.replace(folder / FILE)
  finally:
    temporary.unlink(missing_ok=True)


def unpack(archive: bytes) -> bytes:
  """The bundle in the archive; ValueError if it is not the pinned one.

  Nothing is written, and no name in the archive is followed.
  """
  found = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
  if found != INTEGRITY:
    raise ValueError(
      f"@niivue/niivue {VERSION}: {len(archive)} bytes came with the hash {found}, expected is "
      f"{INTEGRITY}; nothing was kept, try another registry (npm_config_registry)"
    )
  try:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
      member = files.extractfile(MEMBER)
      content = member.read(_LARGEST) if member else b""
  except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error) as error:
    raise ValueError(f"@niivue/niivue {VERSION}: has no {MEMBER} ({error})") from None
  if hashlib.sha256(content).hexdigest() != FILE_SHA256:
    raise ValueError(f"@niivue/niivue {VERSION}: its {MEMBER} is not the pinned one")
  return content


if __name__ == "__main__":
  try:
    print(f"NiiVue {VERSION}: {fetch()}")
  except (OSError, ValueError) as problem:
    print(f"rfmedsam2: NiiVue {VERSION} could not be fetched: {problem}", file=sys.stderr)
    sys.exit(2)
