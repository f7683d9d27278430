"""The viewer of the report's pages: NiiVue's bundle, fetched once and checked against its hash.

It is larger than the rest of the package, so it is not in the repository: building the package
fetches it, and `python -m rfmedsam2_jax.report.niivue` where that had no network. Imports nothing
else of the package, because the build runs it alone.
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
# The one file that is taken from the archive; a classic script, which works from a folder.
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
  if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == FILE_SHA256:
    return path
  return None


def fetch(folder: Path = _FOLDER, timeout: float = 60) -> Path:
  """Downloads the archive, checks it, and writes the one file of it; does nothing if it is there.

  The environment variable npm_config_registry names another registry than registry.npmjs.org.

  Args:
    folder: where the file goes. timeout: seconds without an answer.

  Raises:
    OSError: no network, or no place to write.
    ValueError: what was downloaded is not the pinned archive.
  """
  if found := bundle(folder):
    return found
  registry = os.environ.get("npm_config_registry") or os.environ.get("NPM_CONFIG_REGISTRY")
  address = f"{(registry or 'https://registry.npmjs.org').rstrip('/')}/@niivue/niivue/-/"
  address += f"niivue-{VERSION}.tgz"
  if not address.startswith(("https://", "http://")):
    raise ValueError(f"npm_config_registry: {registry} is not an address; correct or unset it")
  with urllib.request.urlopen(address, timeout=timeout) as answer:
    archive = answer.read(_LARGEST + 1)
  content = unpack(archive)
  temporary = folder / f".{os.getpid()}.{FILE}"
  try:
    temporary.write_bytes(content)
    return temporary.replace(folder / FILE)
  finally:
    temporary.unlink(missing_ok=True)


def unpack(archive: bytes) -> bytes:
  """The bundle in the pinned archive; nothing is written, and no name in it is followed.

  Raises:
    ValueError: another archive.
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


def main() -> int:
  """Fetches the bundle into the installed package; returns the exit status."""
  try:
    print(f"NiiVue {VERSION}: {fetch()}")
  except (OSError, ValueError) as error:
    print(f"rfmedsam2: NiiVue {VERSION} could not be fetched: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
