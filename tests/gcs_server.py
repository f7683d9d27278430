"""A stand-in for Google Cloud Storage on loopback, with what its emulators on PyPI lack.

TensorStore writes a checkpoint's manifest, and a lease is taken, under conditions on generations;
TensorStore reads ranges of objects and their generation from a header. Known is what gcsfs,
TensorStore and google-cloud-storage ask for, of the JSON API:
https://cloud.google.com/storage/docs/json_api/v1. Everything is kept in memory.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
ALL = re.compile(r"/storage/v1/b/([^/]+)/o")
UPLOAD = re.compile(r"(?:/resumable)?/upload/storage/v1/b/([^/]+)/o")
BUCKET = re.compile(r"/storage/v1/b/([^/]+)")


class Kept(NamedTuple):
  content: bytes
  generation: int
  written: str


class Server(ThreadingHTTPServer):
  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.objects: dict[tuple[str, str], Kept] = {}
    self.uploads: dict[str, tuple[str, str, dict[str, str]]] = {}
    self.lock = threading.Lock()
    self.numbers = itertools.count(1_000)
    self.down = False  # answers nothing but errors
    self.asked: list[str] = []  # methods and paths

  def handle_error(self, request, client_address) -> None:
    pass  # clients that do not wait for an answer

  @property
  def address(self) -> str:
    return f"http://127.0.0.1:{self.server_port}"

  def names(self, prefix: str = "") -> list[str]:
    """Of the objects, buckets first."""
    with self.lock:
      return sorted("/".join(key) for key in self.objects if "/".join(key).startswith(prefix))

  def content(self, name: str) -> bytes:
    bucket, _, rest = name.partition("/")
    with self.lock:
      return self.objects[bucket, rest].content


@contextlib.contextmanager
def serving() -> Iterator[Server]:
  server = Server()
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()


def environment(address: str) -> dict[str, str]:
  """What makes the three clients ask a server, with the libraries' own variables."""
  return {
    "STORAGE_EMULATOR_HOST": address,
    "TENSORSTORE_GCS_HTTP_URL": address,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nothing",
    "GOOGLE_CLOUD_PROJECT": "test",
    "FSSPEC_GCS_TOKEN": "anon",
    # As base.storage has it; where gcsfs is imported before.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
  }


class _Handler(BaseHTTPRequestHandler):
  server: Server
  protocol_version = "HTTP/1.1"

  def log_message(self, *_) -> None:
    pass

  def _do(self) -> None:
    parts = urlsplit(self.path)
    self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
    body = self._body()
    self.server.asked.append(f"{self.command} {parts.path}")
    if self.server.down:
      self._answer(403, b"{}")
      return
    if parts.path == "/batch/storage/v1":
      self._batch(body)
    elif found := UPLOAD.fullmatch(parts.path):
      self._upload(found[1], body)
    elif found := OBJECT.fullmatch(parts.path):
      bucket, name = found[1], unquote(found[2])
      if self.command == "DELETE":
        self._answer(self._delete(bucket, name), b"")
      else:
        self._get(bucket, name)
    elif found := ALL.fullmatch(parts.path):
      self._json(self._list(found[1]))
    elif found := BUCKET.fullmatch(parts.path):
      self._json({"kind": "storage#bucket", "name": found[1], "id": found[1], "location": "US"})
    else:
      self._answer(404, b"{}")

  do_GET = do_POST = do_PUT = do_DELETE = _do

  def _body(self) -> bytes:
    if "chunked" in self.headers.get("Transfer-Encoding", ""):
      pieces = []
      while size := int(self.rfile.readline().strip() or b"0", 16):
        pieces.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b"".join(pieces)
    return self.rfile.read(int(self.headers.get("Content-Length") or 0))

  def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    self.send_response(status)
    for key, value in (headers or {}).items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
    self._answer(200, json.dumps(value).encode(),
                 {"Content-Type": "application/json"} | (headers or {}))

  def _about(self, bucket: str, name: str, kept: Kept) -> dict[str, str]:
    return {
      "kind": "storage#object", "bucket": bucket, "name": name, "id": f"{bucket}/{name}",
      "generation": str(kept.generation), "metageneration": "1", "size": str(len(kept.content)),
      "etag": str(kept.generation), "updated": kept.written, "timeCreated": kept.written,
      "md5Hash": base64.b64encode(hashlib.md5(kept.content).digest()).decode(),
      "contentType": "application/octet-stream", "storageClass": "STANDARD",
    }

  def _get(self, bucket: str, name: str) -> None:
    with self.server.lock:
      kept = self.server.objects.get((bucket, name))
    if kept is None:
      self._answer(404, b"{}")
      return
    if self.query.get("ifGenerationNotMatch") == str(kept.generation):
      self._answer(304, b"")
      return
    if self.query.get("ifGenerationMatch", str(kept.generation)) != str(kept.generation):
      self._answer(412, b"{}")
      return
    if self.query.get("alt") != "media":
      self._json(self._about(bucket, name, kept))
      return
    headers = {"x-goog-generation": str(kept.generation), "ETag": str(kept.generation),
               "Content-Type": "application/octet-stream"}
    whole, wanted = kept.content, re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if wanted is None:
      self._answer(200, whole, headers)
      return
    size = len(whole)
    first = int(wanted[1]) if wanted[1] else max(size - int(wanted[2]), 0)
    last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
    if first >= size:
      self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
      return
    self._answer(206, whole[first : last + 1],
                 headers | {"Content-Range": f"bytes {first}-{last}/{size}"})

  def _put(self, bucket: str, name: str, content: bytes, query: dict[str, str]) -> None:
    with self.server.lock:
      before = self.server.objects.get((bucket, name))
      wanted = query.get("ifGenerationMatch")
      if wanted is not None and wanted != str(before.generation if before else 0):
        kept = None
      else:
        written = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        kept = Kept(content, next(self.server.numbers), written)
        self.server.objects[bucket, name] = kept
    if kept is None:
      self._answer(412, b'{"error": {"code": 412, "message": "conditionNotMet"}}')
    else:
      self._json(self._about(bucket, name, kept))

  def _upload(self, bucket: str, body: bytes) -> None:
    kind = self.query.get("uploadType")
    if upload := self.query.get("upload_id"):
      self._resume(upload, body)
    elif kind == "media":
      self._put(bucket, self.query["name"], body, self.query)
    elif kind == "multipart":
      mark = re.search(r"boundary=\"?([^\";]+)", self.headers["Content-Type"])
      assert mark
      _, about, content, _ = body.split(f"--{mark[1]}".encode(), 3)
      about, content = (part.split(b"\r\n\r\n", 1)[1] if b"\r\n\r\n" in part else
                        part.split(b"\n\n", 1)[1] for part in (about, content))
      end = b"\r\n" if content.endswith(b"\r\n") else b"\n"
      self._put(bucket, json.loads(about)["name"], content.removesuffix(end), self.query)
    else:
      number = str(next(self.server.numbers))
      name = self.query.get("name") or json.loads(body)["name"]
      with self.server.lock:
        self.server.uploads[number] = bucket, name, self.query
        self.server.objects[f"upload {number}", ""] = Kept(b"", 0, "")
      self._answer(200, b"", {"Location": f"{self.server.address}/upload/storage/v1/b/{bucket}/o"
                                          f"?uploadType=resumable&upload_id={number}"})

  def _resume(self, number: str, body: bytes) -> None:
    key = f"upload {number}", ""
    with self.server.lock:
      bucket, name, query = self.server.uploads[number]
      content = self.server.objects[key].content + body
      self.server.objects[key] = Kept(content, 0, "")
    if self.headers.get("Content-Range", "").endswith("/*"):
      self._answer(308, b"", {"Range": f"bytes=0-{len(content) - 1}"})
      return
    with self.server.lock:
      del self.server.objects[key]
    self._put(bucket, name, content, query)

  def _delete(self, bucket: str, name: str) -> int:
    with self.server.lock:
      kept = self.server.objects.get((bucket, name))
      wanted = self.query.get("ifGenerationMatch")
      if kept is None:
        return 404
      if wanted is not None and wanted != str(kept.generation):
        return 412
      del self.server.objects[bucket, name]
      return 204

  def _batch(self, body: bytes) -> None:
    mark = re.search(r"boundary=\"?([^\";]+)", self.headers["Content-Type"])
    assert mark
    answers = []
    for part in body.split(f"--{mark[1]}".encode()):
      found = re.search(rb"(DELETE) (?:https?://[^/]+)?(/storage/v1/b/([^/]+)/o/([^ ?]+))", part)
      if found:
        status = self._delete(found[3].decode(), unquote(found[4].decode()))
        answers.append(f"--answer\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} -\r\n"
                       "Content-Length: 0\r\n\r\n\r\n")
    self._answer(200, ("".join(answers) + "--answer--").encode(),
                 {"Content-Type": "multipart/mixed; boundary=answer"})

  def _list(self, bucket: str) -> dict[str, object]:
    prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
    first, behind = self.query.get("startOffset", ""), self.query.get("endOffset")
    items, prefixes = [], set()
    with self.server.lock:
      there = sorted((key[1], kept) for key, kept in self.server.objects.items()
                     if key[0] == bucket)
    for name, kept in there:
      if not name.startswith(prefix) or name < first or (behind and name >= behind):
        continue
      rest = name[len(prefix):]
      if delimiter and delimiter in rest[:-1]:
        prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
      else:
        items.append(self._about(bucket, name, kept))
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}
