"""A client of `rfmedsam2 serve`, in numpy and the standard library alone.

    server = Client("http://127.0.0.1:8765", key="...")
    volume = server.upload("ct.nii.gz", window="soft-tissue")
    volume.track([box(1, (120, 200, 40), (310, 330, 40))])
    volume.correct([points(1, outside=[(150, 220, 44)])])
    labels = volume.labels()           # labels.array [i, j, k], labels.affine, labels.names
    volume.save("ct.seg.nrrd")

This file needs nothing else of the package and Python 3.9: it can be copied to where JAX is not
installed, for example into 3D Slicer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import http.client
import io
import json
import os
import ssl
import struct
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

Place = Sequence[float]
Prompt = dict[str, Any]
Progress = Callable[[dict[str, Any]], None]
KEY_VARIABLE = "RFMEDSAM2_KEY"
_PREFIX = "/api/v1"
_BYTES = "application/octet-stream"
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 1.0  # seconds between two looks at a job
_ENDINGS = (".nii.gz", ".nii", ".seg.nrrd", ".seg.dcm", ".labelmap.dcm", ".rtstruct.dcm")
# NIfTI's codes of types (nifti1.h).
_CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768}


class ServerError(Exception):
  """What the server said is wrong, one line; or that none answered.

  Attributes:
    status: of HTTP; 0 where there was no answer.
  """

  def __init__(self, message: str, status: int = 0):
    super().__init__(message)
    self.status = status


def box(label: int, corner: Place, other: Place, round: int = 0) -> Prompt:
  """A box on one slice; the voxels of both corners belong to it."""
  return {"label": label, "round": round, "box": [_place(corner), _place(other)]}


def points(
  label: int, inside: Sequence[Place] = (), outside: Sequence[Place] = (), round: int = 0
) -> Prompt:
  """Points on one slice, inside and outside of a structure."""
  rows = [[*_place(p), True] for p in inside] + [[*_place(p), False] for p in outside]
  return {"label": label, "round": round, "points": rows}


def line(label: int, path: Sequence[Place], inside: bool = True, round: int = 0) -> Prompt:
  """A scribble on one slice, by its vertices; the server makes a few points of it."""
  drawn = {"path": [_place(place) for place in path], "inside": bool(inside)}
  return {"label": label, "round": round, "lines": [drawn]}


def mask(label: int, array: np.ndarray, round: int = 0) -> Prompt:
  """A mask, truth values [i, j, k] of the whole volume, that counts as it is on its slices."""
  runs = min((_runs(np.asarray(array, bool), axis) for axis in range(3)), key=len)
  return {"label": label, "round": round, "mask": runs}


def _runs(array: np.ndarray, axis: int) -> list[list[list[float]]]:
  """First and last voxel of every run along an axis."""
  along = np.moveaxis(array, axis, -1).astype(np.int8)
  steps = np.diff(along, axis=-1, prepend=0, append=0)
  ends = [np.argwhere(steps == 1), np.argwhere(steps == -1) - [0, 0, 1]]
  own = np.insert(np.arange(2), axis, 2)  # where i, j and k stand in a row of `ends`
  return np.stack([found[:, own] for found in ends], axis=1).astype(float).tolist()


def _place(place: Place) -> list[float]:
  i, j, k = (float(x) for x in place)
  return [i, j, k]


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
  """A label map on the grid of its volume.

  Attributes:
    array: uint8 [i, j, k].
    affine: float64 [4, 4], voxels to millimetres, RAS+.
    spacing: mm along i, j, k.
    names: of the structures, by value; also of those that were not found.
  """

  array: np.ndarray
  affine: np.ndarray
  spacing: tuple[float, float, float]
  names: Mapping[int, str]


class Client:
  """A server, by its address.

  Args:
    address: http://HOST:PORT or https://..., or the whole one that the command printed, whose end
      behind # then is the key.
    key: of the server; default: the variable RFMEDSAM2_KEY.
    timeout: seconds without an answer, after which `ServerError` is raised.
    context: for TLS, for example one that knows the certificate of a proxy of one's own.
  """

  def __init__(
    self, address: str, key: str | None = None, timeout: float = 300.0,
    context: ssl.SSLContext | None = None,
  ):
    address, _, token = address.partition("#")
    if not address.startswith(("http://", "https://")):
      raise ValueError(f"{address}: is no address of a server; give http://HOST:PORT")
    self._address, self._timeout = address.rstrip("/"), timeout
    self._key = token or os.environ.get(KEY_VARIABLE, "") if key is None else key
    # No redirections: the key is for this server alone.
    self._opener = urllib.request.build_opener(
      urllib.request.HTTPSHandler(context=context), _NoRedirection)

  def server(self) -> dict[str, Any]:
    """What the server has: "checkpoint", "models", "files" that can be opened, "formats"."""
    return self._json("GET", "/server")

  def open(
    self, file: str, plane: str = "axial", window: str = "percentiles", series: str | None = None
  ) -> Volume:
    """Opens a volume of the server's folder, by its name in the list.

    Args:
      plane: axial, coronal or sagittal: whose slices are prompted and followed.
      window: intensities that SAM 2 sees: a name such as soft-tissue, or "CENTRE,WIDTH".
      series: which one of a DICOM study: its number, UID, description or modality.
    """
    asked = {"file": file, "plane": plane, "window": window, "series": series}
    return Volume(self, self._json("POST", "/volumes", asked))

  def upload(
    self, path: str | Path, plane: str = "axial", window: str = "percentiles",
    series: str | None = None,
  ) -> Volume:
    """Sends a file (.nii, .nii.gz, .nrrd, .mha, .zip) or the folder of a DICOM series or study."""
    with _sendable(Path(path)) as (name, file):
      return self._uploaded(name, file, plane, window, series)

  def upload_array(
    self, array: np.ndarray, affine: np.ndarray, name: str = "array", plane: str = "axial",
    window: str = "percentiles",
  ) -> Volume:
    """Sends voxels [i, j, k] of real numbers; affine: [4, 4], to millimetres, RAS+."""
    return self._uploaded(f"{name}.nii.gz", io.BytesIO(nifti_bytes(array, affine)), plane, window)

  def _uploaded(
    self, name: str, file: IO[bytes], plane: str, window: str, series: str | None = None
  ) -> Volume:
    query = {"name": name, "plane": plane, "window": window}
    query |= {} if series is None else {"series": series}
    return Volume(self, self._send("POST", "/uploads", query, file))

  def _send(
    self, method: str, path: str, query: Mapping[str, str], file: IO[bytes]
  ) -> dict[str, Any]:
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    headers = {"Content-Type": _BYTES, "Content-Length": str(length)}
    return json.loads(self._ask(method, f"{path}?{urllib.parse.urlencode(query)}", file, headers))

  def _json(self, method: str, path: str, value: Any = None) -> dict[str, Any]:
    body = None if value is None else json.dumps(value).encode()
    headers = {} if body is None else {"Content-Type": "application/json"}
    return json.loads(self._ask(method, path, body, headers))

  def _ask(
    self, method: str, path: str, body: Any = None, headers: Mapping[str, str] = {}
  ) -> bytes:
    """The bytes of an answer; ServerError for others than those of success."""
    request = urllib.request.Request(
      f"{self._address}{_PREFIX}{path}", body, {**headers, "Accept-Encoding": "gzip"},
      method=method)
    request.add_unredirected_header("Authorization", f"Bearer {self._key}")
    try:
      with self._opener.open(request, timeout=self._timeout) as answer:
        content = answer.read()
        packed = answer.headers.get("Content-Encoding") == "gzip"
        return gzip.decompress(content) if packed else content
    except urllib.error.HTTPError as error:
      with error:
        raise ServerError(_said(error), error.code) from None
    except (OSError, http.client.HTTPException) as error:
      why = getattr(error, "reason", None) or error or type(error).__name__
      raise ServerError(f"{self._address}: no answer ({why}); is the server running?") from None


class Volume:
  """A volume that is open on the server.

  It has a name, and shape, spacing and affine of its array [i, j, k] as `Labels` has them; `info`
  is all that the server said when it was opened.
  """

  def __init__(self, client: Client, info: dict[str, Any]):
    self._client, self.info = client, info
    self._at = f"/volumes/{info['volume']}"
    self._prompts: list[Prompt] = []
    self._space = "ijk"
    self.name: str = info["name"]
    self.shape: tuple[int, int, int] = tuple(info["shape"])
    self.spacing: tuple[float, float, float] = tuple(info["spacing"])
    self.affine = np.array(info["affine"], np.float64)

  def track(
    self, prompts: Sequence[Prompt], space: str = "ijk", progress: Progress | None = None
  ) -> dict[str, Any]:
    """Follows structures from prompts, which take the place of those that were given before.

    Args:
      prompts: from `box`, `points` and `line`, with rounds; or as the API's document says.
      space: "ijk": voxels of the file from 0; "ras": millimetres; "zyx": voxels in LPS+ order.
      progress: called with the job's state now and then: "done" and "total", or "message".

    Returns:
      what the server says of the job that is done. A job is cancelled by whatever is raised
      meanwhile, as by Ctrl-C.
    """
    asked = {"prompts": list(prompts), "space": space}
    job = self._client._json("POST", f"{self._at}/track", asked)
    found = self._followed(job, progress)
    self._prompts, self._space = list(prompts), space
    return found

  def correct(
    self, prompts: Sequence[Prompt], progress: Progress | None = None
  ) -> dict[str, Any]:
    """Adds prompts as a round behind those of `track`, in its space."""
    number = max((p["round"] for p in self._prompts), default=-1) + 1
    later = [{**prompt, "round": number} for prompt in prompts]
    return self.track([*self._prompts, *later], self._space, progress)

  def segment(
    self, model: str | None = None, structures: Sequence[str] | None = None,
    min_volume: float = 0.0, fast: bool = False, progress: Progress | None = None,
  ) -> dict[str, Any]:
    """Lets a model of the server segment the volume; arguments as of `rfmedsam2 predict`."""
    asked = {
      "model": model, "structures": None if structures is None else list(structures),
      "min_volume": min_volume, "fast": fast}
    found = self._followed(self._client._json("POST", f"{self._at}/segment", asked), progress)
    self._prompts = []
    return found

  def begin_with(self, path: str | Path) -> None:
    """Sends a label map on the volume's grid, such as one of `predict`, to be corrected by prompts.

    Structures that are tracked afterwards replace those of their labels.
    """
    with _sendable(Path(path)) as (name, file):
      self._client._send("PUT", f"{self._at}/labels", {"name": name}, file)
    self._prompts = []

  def labels(self) -> Labels:
    """The label map that is there now."""
    content = self._client._ask("GET", f"{self._at}/labels")
    array = np.load(io.BytesIO(content), allow_pickle=False)
    told = self._client._json("GET", self._at)["structures"]
    return Labels(array, self.affine, self.spacing, {s["label"]: s["name"] for s in told})

  def details(self) -> dict[str, Any]:
    """How sure the model of `segment` was, and what it measured."""
    return self._client._json("GET", f"{self._at}/details")

  def save(self, path: str | Path) -> Path:
    """Writes the label map on the volume's grid, in the format of the ending.

    .nii.gz, .seg.nrrd; of what was DICOM also .seg.dcm, .labelmap.dcm and .rtstruct.dcm.
    """
    path = Path(path)
    ending = next((e for e in _ENDINGS if path.name.lower().endswith(e)), None)
    if ending is None:
      raise ValueError(f"{path}: has no ending of a format; give one of {', '.join(_ENDINGS)}")
    plain = ending == ".nii"
    content = self._client._ask("GET", f"{self._at}/export/{'nii.gz' if plain else ending[1:]}")
    content = gzip.decompress(content) if plain else content
    temporary = path.with_name(f".{path.name}.part")
    try:
      temporary.write_bytes(content)
      temporary.replace(path)
    finally:
      temporary.unlink(missing_ok=True)
    return path

  def close(self) -> None:
    """Lets the server forget the volume."""
    self._client._ask("DELETE", self._at)

  def __enter__(self) -> Volume:
    return self

  def __exit__(self, *error: object) -> None:
    with contextlib.suppress(ServerError):
      self.close()

  def _followed(self, job: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
    """Waits for a job; ServerError where it failed or was cancelled."""
    try:
      for wait in _waits():
        if progress is not None:
          progress(job)
        if job["state"] not in ("queued", "running"):
          break
        time.sleep(wait)
        job = self._client._json("GET", f"/jobs/{job['job']}")
    except BaseException:
      with contextlib.suppress(ServerError):
        self._client._ask("DELETE", f"/jobs/{job['job']}")
      raise
    if job["state"] != "done":
      raise ServerError(job["error"] or f"{self.name}: the job was cancelled")
    return job


class _NoRedirection(urllib.request.HTTPRedirectHandler):
  def redirect_request(self, *request: Any, **more: Any) -> None:
    return None


def _waits() -> Iterator[float]:
  wait = _FIRST_WAIT
  while True:
    yield wait
    wait = min(1.3 * wait, _LONGEST_WAIT)


def _said(error: urllib.error.HTTPError) -> str:
  """The line of an error, or what a proxy says instead."""
  try:
    return str(json.loads(error.read(1 << 16))["error"])
  except (ValueError, KeyError, TypeError, OSError):
    return f"{error.url}: {error.code} {error.reason}"


@contextlib.contextmanager
def _sendable(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
  """A name and the bytes of a file, or of a folder as an archive."""
  if path.is_dir():
    with tempfile.TemporaryFile() as file:
      _zip(path, file)
      yield f"{path.resolve().name}.zip", file
  else:
    with path.open("rb") as file:
      yield path.name, file


def _zip(folder: Path, file: IO[bytes]) -> None:
  """The files of a folder, none of them hidden; stored, as pixels hardly shrink."""
  with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
    for path in sorted(folder.rglob("*")):
      name = path.relative_to(folder)
      if path.is_file() and not any(part.startswith(".") for part in name.parts):
        archive.write(path, name)


def nifti_bytes(array: np.ndarray, affine: np.ndarray) -> bytes:
  """A packed NIfTI-1 file of voxels [i, j, k]; ValueError for what it cannot hold.

  Truth values become bytes, whole numbers of 64 bits those of 32 if they fit, halves float32.
  """
  array = np.asarray(array)
  if array.dtype.kind == "b":
    array = array.astype(np.uint8)
  elif array.dtype == np.float16:
    array = array.astype(np.float32)
  elif array.dtype.kind in "iu" and array.dtype.itemsize == 8:
    fits = array.size == 0 or -(2**31) <= int(array.min()) <= int(array.max()) < 2**31
    array = array.astype(np.int32 if fits else np.float64)
  code = _CODES.get(array.dtype.str[1:])
  if code is None or array.ndim != 3 or 0 in array.shape or max(array.shape) >= 2**15:
    raise ValueError(f"array: {array.dtype} {array.shape} is no volume; give [i, j, k] of numbers")
  affine = np.asarray(affine, np.float64)
  if affine.shape != (4, 4) or not np.isfinite(affine).all():
    raise ValueError("affine: give a matrix [4, 4] of finite numbers")
  header = bytearray(352)  # 348, and four bytes that say that no extension follows
  sizes = np.linalg.norm(affine[:3, :3], axis=0)
  for offset, form, values in (
    (0, "i", (348,)), (40, "8h", (3, *array.shape, 1, 1, 1, 1)),
    (70, "2h", (code, 8 * array.dtype.itemsize)), (76, "8f", (1, *sizes, 0, 0, 0, 0)),
    (108, "3f", (352, 1, 0)),  # where voxels begin, slope, intercept
    (123, "B", (2,)), (252, "2h", (0, 1)),  # mm; the affine below is the scanner's
    (280, "12f", affine[:3].ravel()), (344, "4s", (b"n+1\0",)),
  ):
    struct.pack_into(f"<{form}", header, offset, *values)
  voxels = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes("F")
  return gzip.compress(bytes(header) + voxels, 1)
