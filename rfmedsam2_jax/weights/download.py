"""Downloads that go on where they broke off, from Meta's address or the Hugging Face hub.

Not by hf_hub_download: it begins anew after a program has ended. The hub's library knows where a
file lies and what it should be; the bytes come through `download`.
"""

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.weights.published import Published

META = "https://dl.fbaipublicfiles.com"
META_VARIABLE = "RFMEDSAM2_META_ENDPOINT"  # another address that has Meta's files
HUB_VARIABLE = "HF_ENDPOINT"  # that of huggingface_hub
_BLOCK = 2**18
_SILENCE = 60.0  # seconds


def meta_address(published: Published) -> str:
  """The address of a file of Meta; UserError for what Meta has not published."""
  if not published.meta:
    raise UserError(f"{published.file}: is on the Hugging Face hub alone; leave --source out")
  return f"{os.environ.get(META_VARIABLE, META).rstrip('/')}/{published.meta}"


def hub_address(published: Published) -> tuple[str, str]:
  """The address of a file on the hub, and the SHA-256 that the hub says, "" if it says none.

  Raises:
    UserError: huggingface_hub is not installed, no network, no such file.
  """
  try:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, utils
  except ImportError:
    raise UserError("fetch needs huggingface_hub for files of the Hugging Face hub; install it: "
                    "pip install 'rfmedsam2-jax[hub]'") from None
  utils.logging.set_verbosity_error()
  endpoint = os.environ.get(HUB_VARIABLE) or None  # the library reads it only when it is imported
  address = hf_hub_url(published.repository, published.file, endpoint=endpoint)
  try:
    found = get_hf_file_metadata(address, timeout=_SILENCE)
  except Exception as error:  # its own kinds and those of its HTTP library, which changes
    raise _unreachable(address, error) from None
  etag = found.etag or ""
  return address, etag if len(etag) == 64 else ""  # of small files it is another digest


def download(
  address: str, target: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
  """Downloads a file. What a broken transfer left at `target`.part is continued, also later on.

  progress: called with bytes that are there, and all of them.

  Raises:
    UserError: no network, no such file, a transfer that breaks off before any byte arrives.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  part, note = (target.with_name(f"{target.name}.{x}") for x in ("part", "etag"))
  while True:
    before = part.stat().st_size if part.exists() else 0
    try:
      _transfer(address, part, note, progress)
      break
    except (OSError, http.client.HTTPException, ValueError) as error:
      after = part.stat().st_size if part.exists() else 0
      if isinstance(error, urllib.error.HTTPError) and error.code == 416 and before:
        part.unlink()  # more than there is: of another file
      elif after <= before or isinstance(error, urllib.error.HTTPError):
        raise _unreachable(address, error) from None
  os.replace(part, target)
  note.unlink(missing_ok=True)


def _transfer(address: str, part: Path, note: Path, progress: Callable[[int, int], None]) -> None:
  """One request, from the byte on that is missing; OSError if it ends too early."""
  have = part.stat().st_size if part.exists() else 0
  request = urllib.request.Request(address, headers={"Accept-Encoding": "identity"})
  if request.type not in ("http", "https"):
    raise ValueError(f"{request.type} is no address of the web")
  if have:
    request.add_header("Range", f"bytes={have}-")
    if note.exists():
      request.add_header("If-Range", note.read_text("utf-8"))
  with urllib.request.urlopen(request, timeout=_SILENCE) as answer:
    if answer.status != 206 or not (answer.headers["Content-Range"] or "").startswith(
        f"bytes {have}-"):
      have = 0  # the whole file, from the beginning
    _keep_tag(note, answer)
    total = have + int(answer.headers["Content-Length"] or 0)
    with open(part, "r+b" if have else "wb") as out:
      out.seek(have)
      while block := answer.read(_BLOCK):
        out.write(block)
        have += len(block)
        progress(have, max(total, have))
  if have < total:
    raise ConnectionError(f"broke off after {have} of {total} bytes")


def _keep_tag(note: Path, answer: Any) -> None:
  """By what a server knows again that it is the same file; a weak tag says nothing of bytes."""
  tag = answer.headers["ETag"] or answer.headers["Last-Modified"] or ""
  if tag and not tag.startswith("W/"):
    note.write_text(tag, "utf-8")
  else:
    note.unlink(missing_ok=True)


def _unreachable(address: str, error: Exception) -> UserError:
  reason = getattr(error, "reason", None) or error
  said = first_line(reason if isinstance(reason, Exception) else error, 160)
  return UserError(f"{address}: cannot be fetched ({said}); see to the network, or name another "
                   f"address ({META_VARIABLE}, {HUB_VARIABLE}); what has arrived is kept")
