"""The Python API with hostile arrays, and uploads to the local page."""

import gzip
import json
import math

import nibabel as nib
import numpy as np
from damage import WAYS
from frame import Attempt, Wrong, kind


@kind("arrays of the Python API")
def arrays():
  cases = {
    "uint8": lambda a, r: a.astype(np.uint8), "bool": lambda a, r: a > 0, "int64": lambda a, r:
    a.astype(np.int64), "float64 beyond float32": lambda a, r: a.astype(float) * 1e300,
    "float16": lambda a, r: a.astype(np.float16), "complex": lambda a, r: a + 1j,
    "text": lambda a, r: a.astype(str), "objects": lambda a, r: a.astype(object),
    "None": lambda a, r: np.full(a.shape, None), "dates": lambda a, r: a.astype("datetime64[s]"),
    "records": lambda a, r: np.zeros(a.shape, [("x", "f4")]), "1D": lambda a, r: a.ravel(),
    "2D": lambda a, r: a[0], "5D": lambda a, r: a[None, None], "0D": lambda a, r: np.float32(1),
    "empty": lambda a, r: a[:0], "two channels": lambda a, r: np.stack([a, a]),
    "Fortran": lambda a, r: np.asfortranarray(a), "negative strides": lambda a, r: a[::-1, ::-1],
    "big endian": lambda a, r: a.astype(">f4"), "read only": lambda a, r: frozen(a),
    "broadcast": lambda a, r: np.broadcast_to(a[:1], a.shape), "NaN": lambda a, r: a * np.nan,
    "infinite": lambda a, r: np.where(a == a.max(), np.inf, a), "masked": lambda a, r:
    np.ma.masked_array(a, a < 0), "matrix of huge": lambda a, r: a * np.float32(1e36),
    "broadcast to terabytes": lambda a, r: np.broadcast_to(np.float32(1), (10**5,) * 3),
    "list": lambda a, r: a.tolist(), "ragged list": lambda a, r: [[1, 2], [3]],
  }
  readable = {"uint8", "bool", "int64", "float16", "objects", "Fortran", "negative strides",
              "big endian", "read only", "broadcast", "masked", "matrix of huge", "list"}
  for name, change in cases.items():
    for function in ("segment", "segment_details")[:1 + (name in ("list", "None", "complex"))]:
      def make(folder, rng, stage, change=change, function=function, read=name in readable):
        array = change(stage.voxels().transpose(2, 1, 0).astype(np.float32), rng)
        return of(stage, array, (9.5, 6.0, 6.0), function, read)
      yield f"{function} {name}", make
  for name, spacing in {
    "zero": (0, 1, 1), "negative": (-1, 1, 1), "NaN": (math.nan, 1, 1),
    "infinite": (math.inf, 1, 1),
    "two": (1, 1), "text": "abc", "texts": ("a", "b", "c"), "None": None, "number": 5.0,
    "huge": (1e30, 1e30, 1e30), "tiny": (1e-30, 1e-30, 1e-30), "huge and tiny": (1e30, 1e-30, 1),
    "nested": ((1, 2), 1, 1), "array": np.array([9.5, 6, 6]), "complex": (1j, 1, 1),
    "10 m": (1e4, 1e4, 1e4), "none at all": (),
  }.items():
    def spaced(folder, rng, stage, spacing=spacing, read=name in ("array", "tiny")):
      array = stage.voxels().transpose(2, 1, 0).astype(np.float32)
      return of(stage, array, spacing, "segment", read)
    yield f"spacing {name}", spaced


def frozen(array):
  array = array.copy()
  array.flags.writeable = False
  return array


def of(stage, array, spacing, function, read) -> Attempt:
  import rfmedsam2_jax

  found = []

  def call() -> None:
    result = getattr(rfmedsam2_jax, function)(stage.model, array, spacing)
    found.append(result if function == "segment" else result.labels)

  def right() -> str:
    plain = np.ascontiguousarray(np.asarray(array), np.float32)
    expected = rfmedsam2_jax.segment(stage.model, plain, tuple(map(float, spacing)))
    return "" if np.array_equal(found[0], expected) else "another result than of plain float32"
  return Attempt(call, ("array", "spacing"), None, right if read else None)


@kind("uploads and requests of serve")
def uploads():
  def of(stage, ask, read=None):
    """read: judges the answer of a success."""
    answers = []

    def call() -> int:
      answer = ask(client(stage))
      answers.append(answer)
      told = answer.text
      if answer.status_code >= 500 or "/tmp" in told or "Traceback" in told:
        raise Wrong(f"status {answer.status_code}: {told[:300]}")
      if answer.status_code < 400:
        return 0
      message = json.loads(told)["error"]
      assert "\n" not in message
      import sys
      print(f"rfmedsam2: {message}", file=sys.stderr)
      return 2
    return Attempt(call, ("scan.nii", "prompts", "name", "file", "window", "plane", "label",
                          "JSON", "more", "this volume"), None,
                   None if read is None else lambda: read(answers[0]))

  def shape_is_the_files(content, packed):
    def right(answer) -> str:
      data = gzip.decompress(content) if packed else content
      i, j, k = nib.Nifti1Image.from_bytes(data).shape[:3]
      told = answer.json()
      sizes = sorted((told["slices"], told["rows"], told["columns"]))
      return "" if sizes == sorted((i, j, k)) else f"sizes {sizes}, the file has {(i, j, k)}"
    return right

  for name in ("scan.nii", "scan.nii.gz"):
    for way, damage in {**WAYS, "whole": lambda content, rng: content,
                        "empty": lambda content, rng: b""}.items():
      def make(folder, rng, stage, name=name, damage=damage):
        nib.save(nib.load(stage.scan), folder / name)
        content = damage((folder / name).read_bytes(), rng)
        return of(stage, lambda c: c.post(f"/api/v1/uploads?name={name}", content=content),
                  shape_is_the_files(content, name.endswith(".gz")))
      yield f"{name} {way}", make
  for name in ("scan.nrrd", "../scan.nii.gz", "/etc/passwd.nii", ".scan.nii.gz", "", "a/scan.nii",
               "x" * 5000 + "scan.nii", "%00scan.nii", "scan.nii%0a.nii"):
    def named(folder, rng, stage, name=name):
      content = stage.scan.read_bytes()
      return of(stage, lambda c: c.post(f"/api/v1/uploads?name={name}", content=content))
    yield f"name {name[:20]}", named
  for query in ("window=0,0", "window=nan,1", "window=x", "plane=x", "plane=", "more=1",
                "window=1e300,1e-300", "window=1e5,1e-9"):
    def queried(folder, rng, stage, query=query):
      content = stage.scan.read_bytes()
      read = (lambda answer: "") if "1e5" in query else None
      address = f"/api/v1/uploads?name=scan.nii.gz&{query}"
      return of(stage, lambda c: c.post(address, content=content), read)
    yield query, queried
  for name, body in {
    "not JSON": b"{", "null": b"null", "nested": b"[" * 10**5, "not UTF-8": b"\xff", "NaN":
    b'{"prompts": [{"label": 1, "points": [[NaN, 1, 1, true]]}]}', "huge number":
    b'{"prompts": [{"label": 1, "points": [[1e999, 1, 1, true]]}]}', "outside":
    b'{"prompts": [{"label": 1, "points": [[1e30, 1, 1, true]]}]}', "label 0":
    b'{"prompts": [{"label": 0, "points": [[1, 1, 1, true]]}]}', "no prompt": b'{"prompts": []}',
    "round": b'{"prompts": [{"label": 1, "round": 1e400, "points": [[1, 1, 1, true]]}]}',
    "bare": b'{"prompts": [{"label": 1}]}', "large": b" " * 300_000,
  }.items():
    def asked(folder, rng, stage, body=body):
      def ask(c):
        key = c.post("/api/v1/uploads?name=scan.nii.gz", content=stage.scan.read_bytes()).json()
        return c.post(f"/api/v1/volumes/{key['volume']}/track", content=body,
                      headers={"Content-Type": "application/json"})
      attempt = of(stage, ask)
      return Attempt(attempt.call, (*attempt.names, "prompt", "bytes", "the request"), None)
    yield f"track {name}", asked


_CLIENTS: dict = {}


def client(stage):
  """A client of one server in this process."""
  if stage.place not in _CLIENTS:
    from starlette.testclient import TestClient

    from rfmedsam2_jax.nn import SAM2
    from rfmedsam2_jax.serve.api import Pages
    from rfmedsam2_jax.serve.app import make_app
    from rfmedsam2_jax.serve.studio import Studio
    from rfmedsam2_jax.tracking import TrackingConfig
    from rfmedsam2_jax.weights.checkpoint import load_checkpoint

    found = load_checkpoint(stage.checkpoint)
    studio = Studio(SAM2(found.config), found.params, TrackingConfig(), keep=2, max_voxels=10**6)
    app = make_app(Pages(studio, None, 10**6, "small"), "127.0.0.1", "token")
    _CLIENTS[stage.place] = TestClient(
      app, "http://127.0.0.1:8765", headers={"Authorization": "Bearer token"},
      raise_server_exceptions=True)
  return _CLIENTS[stage.place]


