"""Copies on this machine of what lies in buckets (base.addresses): what moves, and when.

A file comes and goes whole. Of every one a record says which version in the bucket the copy is, and
how the copy looked then. For paths that are no copies the functions here do nothing.
"""

import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rfmedsam2_jax.base import interruption, storage
from rfmedsam2_jax.base.addresses import Shelf, address_of, copy_of, is_copy, root

_AT_ONCE = 64  # files of one download
_LARGE = 1 << 20  # bytes; such a file can come later
# What of a run only its training reads, and what only its process writes.
OF_TRAINING = r"preprocessed/|prompts/|tracker/data/|(.+/)?checkpoints/|tensorboard/|profile/"
_TEMPORARY = re.compile(r"\.\d+\.")  # how names begin of what is being written

Later = Callable[[str, int], bool]  # (name, bytes): whether only the name of a file comes at once


def nothing_later(name: str, size: int) -> bool:
  return False


def large_later(name: str, size: int) -> bool:
  return size > _LARGE


def staged(place: str | Path) -> Path:
  """The copy of what lies at an address, whole and as it is now; any other path as it is.

  Also of a copy that is written, of which another one is read; one that is read is here already. Of
  a run only what prediction and reports read. Nothing lies at the path where nothing lies at the
  address. UserError if that cannot be known.
  """
  if (address := address_of(place)) is None or is_copy(place, "read"):
    return Path(place)
  run = not {"config.yaml", "versions.json"} - storage.children(address)
  return _brought(address, copy_of(address, "read"), nothing_later, OF_TRAINING if run else "")


def outlined(place: str | Path, shelf: Shelf, later: Later = large_later, without: str = ""
             ) -> Path:
  """As `staged`, but that the files of `later` are empty until they are `fetched`.

  shelf: of an address; a copy is brought up to date where it lies. without: a regular expression;
  files whose names, below the address, begin so are left out.
  """
  if (address := address_of(place)) is None:
    return Path(place)
  return _brought(address, copy_of(place, shelf), later, without)


def fetched(place: str | Path, once: bool = False) -> Path:
  """The path of a file; if it is a copy, it is here then, and of the version that the bucket has.

  What was written into the copy since stays. once: the file never changes, look once.
  """
  if (address := address_of(place)) is None:
    return Path(place)
  copy = copy_of(place, "read")
  if once and copy in _settled(os.getpid()):
    return copy
  with _alone(copy):
    found, record = storage.info(address), _record(copy)
    if found is None:
      if record:  # it was there once
        copy.unlink(missing_ok=True)
      return copy
    if not copy.is_file() or record.get("version") != found.version or record.get("later"):
      _download({copy: (address, found)})
  _settled(os.getpid()).add(copy)
  return copy


def names(path: Path) -> set[str]:
  """The names in a folder: of the bucket if the path is a copy's."""
  if (address := address_of(path)) is None:
    return {child.name for child in path.iterdir()} if path.is_dir() else set()
  return storage.children(address)


def exists(path: Path) -> bool:
  """Whether a file lies there: in the bucket if the path is a copy's."""
  address = address_of(path)
  return path.is_file() if address is None else storage.info(address) is not None


def upload(made: Path, path: Path) -> None:
  """Puts a finished file or folder to where `path`, a copy, is from; of a folder, no other remains.

  made: what will be renamed to `path`.
  """
  if (address := address_of(path)) is None:
    return
  if made.is_file():
    _put({made: path})
    return
  here = {file.relative_to(made).as_posix(): file for file in made.rglob("*") if file.is_file()}
  _put({file: path / name for name, file in here.items()})
  storage.remove([f"{address}/{name}".rstrip("/") for name in storage.objects(address)
                  if name not in here])


def push(path: Path) -> None:
  """Uploads the files of a copy, or below it, that were written since they came or were sent."""
  if address_of(path) is None:
    return
  files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
  _put({file: file for file in files
        if not _TEMPORARY.match(file.name) and not _as_recorded(file, _record(file))})


def remove(path: Path) -> None:
  """Removes a file or folder, here and in its bucket."""
  if (address := address_of(path)) is not None:
    storage.remove([address])
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _brought(address: str, copy: Path, later: Later, without: str) -> Path:
  with _alone(copy):
    found = {name: one for name, one in storage.objects(address).items()
             if not (without and re.match(without, name))}
    _tidy(copy, found)
    missing: dict[Path, tuple[str, storage.Stored]] = {}
    for name, one in found.items():
      file, empty = copy / name, later(name, one.size)
      record = _record(file)
      if (_as_recorded(file, record) and record.get("version") == one.version
          and (empty or not record["later"])):
        continue
      if empty:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
        _keep(file, one.version, file.stat(), later=True)
      else:
        missing[file] = f"{address}/{name}".rstrip("/"), one
    _download(missing)
  return copy


def _tidy(copy: Path, found: Mapping[str, storage.Stored]) -> None:
  """Removes from a copy what is not in the bucket."""
  if not found or copy.is_file() != ("" in found):
    if copy.is_dir():
      shutil.rmtree(copy)
    else:
      copy.unlink(missing_ok=True)
    return
  for file in sorted(copy.rglob("*"), reverse=True):  # what is in a folder before the folder
    if file.is_dir():
      with contextlib.suppress(OSError):
        file.rmdir()  # if it is empty
    elif file.relative_to(copy).as_posix() not in found and not _TEMPORARY.match(file.name):
      file.unlink(missing_ok=True)


def _download(files: Mapping[Path, tuple[str, storage.Stored]]) -> None:
  if not files:
    return
  workshop = Path(tempfile.mkdtemp(prefix=".", dir=root()))
  todo = list(files.items())
  with interruption.unfinished(workshop):
    try:
      for begin in range(0, len(todo), _AT_ONCE):
        part = todo[begin : begin + _AT_ONCE]
        here = [workshop / str(number) for number in range(len(part))]
        storage.get([address for _, (address, _) in part], list(map(str, here)))
        for made, (file, (_, one)) in zip(here, part, strict=True):
          file.parent.mkdir(parents=True, exist_ok=True)
          os.replace(made, file)
          _keep(file, one.version, file.stat())
    finally:
      shutil.rmtree(workshop, ignore_errors=True)


def _put(files: Mapping[Path, Path]) -> None:
  """Sends files as those that the copies stand for."""
  if not files:
    return
  there = {made: str(address_of(path)) for made, path in files.items()}
  # Before, so that what is written meanwhile is sent by the next push.
  looks = {made: made.stat() for made in files}
  storage.put(list(map(str, there)), list(there.values()))
  for made, path in files.items():
    if (found := storage.info(there[made])) is not None:
      _keep(path, found.version, looks[made])


@contextlib.contextmanager
def _alone(copy: Path) -> Iterator[None]:
  """Of the processes of this machine one at a time brings a copy; the others find it here."""
  lock = _record_of(copy).with_suffix(".lock")
  lock.parent.mkdir(parents=True, exist_ok=True)
  with open(lock, "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _record_of(copy: Path) -> Path:
  inside = Path(os.path.abspath(copy)).relative_to(root())
  return root() / "records" / inside.with_name(f"{inside.name}.record")


def _record(copy: Path) -> dict[str, Any]:
  """What is known of a file of a copy; empty for nothing."""
  try:
    return json.loads(_record_of(copy).read_text("utf-8"))
  except (OSError, ValueError):
    return {}


def _keep(copy: Path, version: str, look: os.stat_result, later: bool = False) -> None:
  path = _record_of(copy)
  path.parent.mkdir(parents=True, exist_ok=True)
  made = path.with_name(f".{os.getpid()}.{path.name}")
  made.write_text(json.dumps({
    "version": version, "size": look.st_size, "modified": look.st_mtime_ns, "later": later}))
  os.replace(made, path)


def _as_recorded(copy: Path, record: Mapping[str, Any]) -> bool:
  try:
    look = copy.stat()
  except OSError:
    return False
  return (look.st_size, look.st_mtime_ns) == (record.get("size"), record.get("modified"))


@functools.lru_cache(4)
def _settled(process: int) -> set[Path]:
  """Files that this process has looked for."""
  return set()
