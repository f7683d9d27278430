"""The files of buckets, gs:// and s3://, by fsspec's gcsfs and s3fs.

Functions take addresses (base.addresses). What goes wrong on the way is a UserError that says the
address.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rfmedsam2_jax.base.errors import UserError, first_line

# By what comes first in addresses: fsspec's name, the package, the extra of this one.
_SYSTEMS = {"gs": ("gcs", "gcsfs", "gcs"), "s3": ("s3", "s3fs", "s3")}
LEASE = ".lease"  # the folder of base.leases, of which there are no copies


class Stored(NamedTuple):
  """A file in a bucket."""

  size: int
  version: str  # another one whenever it is written


def objects(address: str) -> dict[str, Stored]:
  """The files below an address by the rest of their names; by "" one that has this very name."""
  found: dict[str, Stored] = {}
  with _reaching(address):
    try:
      listed = system(address).find(_bare(address), detail=True)
    except FileNotFoundError:
      listed = {}
  for name, about in listed.items():
    rest = name.removeprefix(_bare(address)).strip("/")
    if about.get("type") != "file" or name.endswith("/") or rest.startswith(f"{LEASE}/"):
      continue  # some programs make a file for every folder
    if rest and not {"", ".", ".."}.isdisjoint(rest.split("/")):
      raise UserError(f"{address}/{rest}: is a name that no folder here can hold; rename it")
    found[rest] = _stored(about)
  if not found and (one := info(address)) is not None:
    found[""] = one
  return found


def info(address: str) -> Stored | None:
  """The file of an address; None if there is none."""
  with _reaching(address):
    try:
      found = system(address).info(_bare(address))
    except FileNotFoundError:
      return None
    return _stored(found) if found["type"] == "file" else None


def children(address: str) -> set[str]:
  """The names of what lies directly in a folder."""
  with _reaching(address):
    try:
      found = system(address).ls(_bare(address), detail=False)
    except (FileNotFoundError, NotADirectoryError):
      return set()
    # Of a file `ls` gives the file, of some folders themselves too.
    inside = {name.rstrip("/").removeprefix(_bare(address)).strip("/") for name in found}
    return inside - {""}


def get(addresses: Sequence[str], paths: Sequence[str]) -> None:
  """Brings files to paths of this machine, several at once."""
  with _reaching(addresses[0]):
    system(addresses[0]).get(list(map(_bare, addresses)), list(paths))


def put(paths: Sequence[str], addresses: Sequence[str]) -> None:
  """Sends files, several at once; each is there whole, or as it was before."""
  with _reaching(addresses[0]):
    system(addresses[0]).put(list(paths), list(map(_bare, addresses)))


def remove(addresses: Sequence[str]) -> None:
  """Removes files, and what is below folders; what is not there is no error."""
  for address in addresses:
    with _reaching(address), contextlib.suppress(FileNotFoundError):
      system(address).rm(_bare(address), recursive=True)


def create(address: str, content: bytes) -> bool:
  """Makes a small file unless there is one; whether it did. Of several processes one does."""
  with _reaching(address):
    try:
      system(address).pipe_file(_bare(address), content, mode="create")
    except FileExistsError:
      return False
    return True


def write(address: str, content: bytes) -> None:
  """Makes or replaces a small file."""
  with _reaching(address):
    system(address).pipe_file(_bare(address), content)


def read(address: str) -> bytes | None:
  """The content of a small file as it is now; None if there is none."""
  with _reaching(address):
    try:
      return system(address).cat_file(_bare(address))
    except FileNotFoundError:
      return None


def system(address: str) -> Any:
  """fsspec's file system of an address."""
  return _opened(address.partition("://")[0], os.getpid())


@functools.lru_cache(4)
def _opened(scheme: str, process: int) -> Any:
  """One for every process: they do not survive a fork."""
  import fsspec
  name, package, extra = _SYSTEMS[scheme]
  # Else gcsfs asks, by another protocol, of what kind every bucket is, for a minute if it may not.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  # Other processes write there too. Of the process, so that Orbax's own has this setting as well.
  fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
  try:
    return fsspec.filesystem(name)
  except ImportError:
    raise UserError(f"{scheme}://: is opened by {package}, which is not installed; pip install "
                    f"'rfmedsam2-jax[{extra}]'") from None


def _bare(address: str) -> str:
  """An address as fsspec's file systems call it."""
  return address.partition("://")[2]


def _stored(about: Mapping[str, Any]) -> Stored:
  version = next(about[key] for key in ("generation", "etag", "ETag") if about.get(key))
  return Stored(int(about["size"]), str(version))


@contextlib.contextmanager
def _reaching(address: str) -> Iterator[None]:
  try:
    yield
  except (UserError, MemoryError):
    raise
  except Exception as error:  # of half a dozen packages
    raise UserError(f"{address}: cannot be reached ({first_line(error)}); see to the name, the "
                    "access and the network, and do it again") from error
