"""Who may write to a folder of a bucket: a lease, which a holder that is gone cannot keep.

Buckets know no locks, but one of several that make the same file (base.storage.create). In
`FOLDER/.lease` lie files with numbers for names. The one with the highest number says who holds the
folder; it writes this file again every few seconds. Whoever sees it unchanged for long enough, or
given back, takes the folder by making the file with the next number. No clock of another machine is
looked at.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

from rfmedsam2_jax.base import storage
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Report

BEAT = 10.0  # seconds between two writings
LIFE = 120.0  # seconds without one, after which a holder is gone


@dataclasses.dataclass
class _Lease:
  """One that this process holds."""

  folder: str  # address of all leases
  number: int
  holder: str
  count: int = 0

  @property
  def address(self) -> str:
    return _file(self.folder, self.number)

  def content(self, given_back: bool = False) -> bytes:
    return json.dumps({"holder": self.holder, "count": self.count, "given_back": given_back}
                      ).encode()


@contextlib.contextmanager
def held(address: str, report: Report, lost: Callable[[str], None]) -> Iterator[None]:
  """Holds a folder of a bucket while the block runs; a holder that is gone is waited for.

  lost: told in a line, from a thread, if another one has taken the folder or may have: then this
  process must not write any more.

  Raises:
    UserError: somebody holds it who is there.
  """
  lease = _take(f"{address}/{storage.LEASE}", address, report)
  ended = threading.Event()
  keeper = threading.Thread(
    target=_keep, args=(lease, address, ended, lost), daemon=True, name="lease")
  keeper.start()
  try:
    yield
  finally:
    ended.set()
    keeper.join()
    with contextlib.suppress(UserError):  # else it is taken over
      if lease.number == _newest(lease.folder):
        storage.write(lease.address, lease.content(given_back=True))


def _take(folder: str, what: str, report: Report) -> _Lease:
  holder = f"process {os.getpid()} on {socket.gethostname()}"
  seen: tuple[int, bytes | None] | None = None
  since = time.monotonic()
  while True:
    number = _newest(folder)
    content = storage.read(_file(folder, number)) if number else None
    about = _about(content)
    free = not number or about.get("given_back")
    if (number, content) != seen:
      other = about.get("holder", "another process")
      if seen is not None and not free:
        raise UserError(f"{what}: is in use by {other}; wait for it or choose another folder")
      if not free:
        report(f"{what}: is held by {other}; looking for {LIFE:.0f} s whether that one is there")
      seen, since = (number, content), time.monotonic()
    gone = time.monotonic() - since > LIFE
    if free or gone:
      # The key tells one process from the next of the same number on a machine like it.
      lease = _Lease(folder, number + 1, f"{holder} ({secrets.token_hex(4)})")
      if storage.create(lease.address, lease.content()) and lease.number == _newest(folder):
        if gone:
          report(f"{what}: taken over from {other}, not heard of for {LIFE:.0f} s")
        storage.remove([_file(folder, old) for old in _numbers(folder) if old < lease.number])
        return lease
      continue  # another one was quicker
    time.sleep(BEAT)


def _keep(
  lease: _Lease, what: str, ended: threading.Event, lost: Callable[[str], None]
) -> None:
  """Writes the lease again and again, and looks whether it is still the newest."""
  last = time.monotonic()
  while not ended.wait(BEAT):
    lease.count += 1
    with contextlib.suppress(UserError):  # the network; it is tried again
      if _newest(lease.folder) > lease.number:
        taker = _about(storage.read(_file(lease.folder, _newest(lease.folder)))).get("holder")
        lost(f"{what}: was taken over by {taker}, as this process was not heard of for too long")
        return
      storage.write(lease.address, lease.content())
      last = time.monotonic()
    if (silent := time.monotonic() - last) > 0.75 * LIFE:
      lost(f"{what}: cannot be reached for {silent:.0f} s, and others may take it over")
      return


def _numbers(folder: str) -> list[int]:
  return sorted(int(name) for name in storage.children(folder) if name.isdigit())


def _newest(folder: str) -> int:
  return max(_numbers(folder), default=0)


def _file(folder: str, number: int) -> str:
  return f"{folder}/{number:08d}"


def _about(content: bytes | None) -> dict[str, object]:
  try:
    return json.loads(content or b"{}")
  except ValueError:
    return {}
