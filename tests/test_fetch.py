"""Published weights: fetched over broken lines from a server that answers as Meta and the hub do.

The file is a small one that the official class and PyTorch wrote; the server is on loopback.
"""

import dataclasses
import fcntl
import hashlib
import http.server
import json
import threading

import numpy as np
import pytest
import torch_sam2
import yaml
from flax.traverse_util import flatten_dict
from torch_sam2 import TINY, torch

from rfmedsam2_jax.base import kept
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.config import parse_config
from rfmedsam2_jax.training.run import _check_starting_points
from rfmedsam2_jax.weights import published
from rfmedsam2_jax.weights.checkpoint import check_starting_point, load_checkpoint
from rfmedsam2_jax.weights.names import from_official
from rfmedsam2_jax.weights.published import PUBLISHED, Published

META_PATH = "/sam/092824/tiny.pt"
HUB_PATHS = ("/lab/Tiny/resolve/main/Tiny.pt", "/lab/Tiny/resolve/main/tiny.pt")


class Server(http.server.ThreadingHTTPServer):
  """`content` at both paths. `breaks`: after how many bytes each of the next answers breaks off."""

  def __init__(self, content: bytes):
    super().__init__(("127.0.0.1", 0), Handler)
    self.content, self.tag = content, '"one"'
    self.breaks: list[int] = []
    self.ranges: list[str | None] = []
    self.takes_ranges = True

  @property
  def address(self) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
  server: Server

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self._answer(head=True)

  def do_GET(self):
    self._answer(head=False)

  def _answer(self, head: bool) -> None:
    server, content, begin = self.server, self.server.content, 0
    if self.path not in (META_PATH, *HUB_PATHS, "/cdn"):
      self.send_error(404)
      return
    if self.path in HUB_PATHS:  # large files lie on another host
      self.send_response(302)
      self.send_header("Location", server.address.replace("127.0.0.1", "localhost") + "/cdn")
      self.send_header("X-Repo-Commit", "0" * 40)
      self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
      self.send_header("X-Linked-Size", str(len(content)))
      self.send_header("Content-Length", "0")
      self.end_headers()
      return
    wanted = self.headers["Range"]
    same = self.headers["If-Range"] in (None, server.tag)
    if not head:
      server.ranges.append(wanted)
    if wanted and same and server.takes_ranges:
      begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
      if begin >= len(content):
        self.send_error(416)
        return
      self.send_response(206)
      self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
    else:
      self.send_response(200)
    self.send_header("ETag", server.tag)
    self.send_header("Content-Length", str(len(content) - begin))
    self.end_headers()
    if not head:
      until = begin + server.breaks.pop(0) if server.breaks else len(content)
      self.wfile.write(content[begin:until])


@pytest.fixture(scope="module")
def state():
  return torch_sam2.official(TINY).state_dict()


@pytest.fixture(scope="module")
def content(state, tmp_path_factory):
  path = tmp_path_factory.mktemp("official") / "tiny.pt"
  torch.save({"model": state}, path)
  return path.read_bytes()


@pytest.fixture
def server(content, tmp_path, monkeypatch):
  """A server with the file, under names that are added to the published ones."""
  network = tmp_path / "tiny.yaml"
  tree = json.loads(json.dumps(dataclasses.asdict(TINY)))
  network.write_text(yaml.safe_dump({"sam2": tree}))
  meta = Published("tiny.pt", str(network), 128, "lab/Tiny", "Apache-2.0", META_PATH[1:],
                   hashlib.sha256(content).hexdigest())
  hub = Published("Tiny.pt", str(network), 96, "lab/Tiny", "research only")
  monkeypatch.setitem(PUBLISHED, "tiny", meta)
  monkeypatch.setitem(PUBLISHED, "tiny_of_the_hub", hub)
  monkeypatch.setenv(kept.ENVIRONMENT, str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path)
  found = Server(content)
  threading.Thread(target=found.serve_forever, daemon=True).start()
  for variable in ("RFMEDSAM2_META_ENDPOINT", "HF_ENDPOINT"):
    monkeypatch.setenv(variable, found.address)
  yield found
  found.shutdown()
  found.server_close()


def refused(capsys, *words) -> str:
  assert main([str(word) for word in words]) == 2
  *progress, said = capsys.readouterr().err.splitlines()
  assert all(line.startswith("[") for line in progress) and said.startswith("rfmedsam2: ")
  return said.removeprefix("rfmedsam2: ")


def assert_official(name, state, side):
  config, params, _ = load_checkpoint(name)
  assert config == dataclasses.replace(TINY, image_size=side)
  expected = flatten_dict(from_official({k: v.numpy() for k, v in state.items()}, config))
  for path, x in flatten_dict(params).items():
    np.testing.assert_array_equal(x, expected[path])


def left(tmp_path) -> list[str]:
  return sorted(x.name for x in (tmp_path / "home" / "downloads").iterdir())


def test_weights_of_meta_are_known_by_their_name(server, state, tmp_path, capsys):
  assert main(["fetch", "tiny"]) == 0
  said = capsys.readouterr()
  assert "licence Apache-2.0" in said.err and "(pinned)" in said.out
  assert_official("tiny", state, 128)
  assert left(tmp_path) == []
  # From here on without the network.
  server.shutdown()
  assert main(["fetch", "tiny"]) == 0 and "is there already" in capsys.readouterr().out
  tree = {"sam2": json.loads(json.dumps(dataclasses.asdict(TINY))) | {"image_size": 64},
          "refiner": {"init_from": "tiny"}}
  _check_starting_points(parse_config(tree), tmp_path / "out")
  other = parse_config(tree | {"sam2": {"preset": "nano"}}).sam2
  preset = PUBLISHED["tiny"].preset
  with pytest.raises(UserError, match=r"set sam2 to \{preset: " + preset):
    check_starting_point("tiny", other)
  assert main(["models", "--json"]) == 0
  (row,) = json.loads(capsys.readouterr().out)["result"]["weights"]
  assert (row["name"], row["sha256_known"], row["licence"]) == ("tiny", "pinned", "Apache-2.0")


def test_weights_of_the_hub_are_recorded(server, state, content, tmp_path, capsys):
  pytest.importorskip("huggingface_hub")
  assert main(["fetch", "tiny_of_the_hub"]) == 0
  said = capsys.readouterr()
  assert "research only" in said.err and "(hub)" in said.out
  assert_official("tiny_of_the_hub", state, 96)
  assert server.ranges == [None]
  # Later the hub has another file, and says so itself.
  server.content = content + b"more"
  error = refused(capsys, "fetch", "tiny_of_the_hub", "--overwrite")
  assert f"{hashlib.sha256(content).hexdigest()} is expected (recorded)" in error
  assert "if it was published anew" in error and left(tmp_path) == []
  assert_official("tiny_of_the_hub", state, 96)
  server.content = content
  assert main(["fetch", "tiny", "--source", "hub"]) == 0 and "(pinned)" in capsys.readouterr().out


def test_a_broken_transfer_is_continued(server, state, content, tmp_path, capsys):
  server.breaks = [1000, 70_000]
  assert main(["fetch", "tiny"]) == 0
  assert server.ranges == [None, "bytes=1000-", "bytes=71000-"]
  assert_official("tiny", state, 128)


def test_what_had_arrived_before_an_end_is_not_fetched_again(server, state, tmp_path, capsys):
  server.breaks = [5000, 0]
  error = refused(capsys, "fetch", "tiny")
  assert "broke off after 5000 of" in error and "what has arrived is kept" in error
  assert left(tmp_path) == ["tiny.pt.etag", "tiny.pt.part"]
  assert main(["fetch", "tiny"]) == 0
  assert server.ranges == [None, "bytes=5000-", "bytes=5000-"] and left(tmp_path) == []
  assert_official("tiny", state, 128)


def test_a_file_that_another_process_fetches_is_left_alone(server, state, tmp_path, capsys):
  lock = tmp_path / "home" / "downloads" / "tiny.pt.lock"
  lock.parent.mkdir(parents=True)
  with open(lock, "w") as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    assert "in use by another process" in refused(capsys, "fetch", "tiny")
    assert server.ranges == [] and left(tmp_path) == [lock.name]
  assert main(["fetch", "tiny"]) == 0
  assert left(tmp_path) == []


@pytest.mark.parametrize("way", ["another file", "no ranges", "too much"])
def test_what_cannot_be_continued_begins_anew(way, server, state, content, tmp_path):
  folder = tmp_path / "home" / "downloads"
  folder.mkdir(parents=True)
  (folder / "tiny.pt.part").write_bytes(b"x" * (5000 if way != "too much" else len(content) + 1))
  if way == "another file":
    (folder / "tiny.pt.etag").write_text('"zero"')
  server.takes_ranges = way != "no ranges"
  assert main(["fetch", "tiny"]) == 0
  assert_official("tiny", state, 128)


def test_a_wrong_hash_is_one_line_and_nothing_is_kept(server, content, tmp_path, capsys):
  wrong = bytearray(content)
  wrong[len(wrong) // 2] ^= 1
  server.content = bytes(wrong)
  error = refused(capsys, "fetch", "tiny")
  for digest in (hashlib.sha256(content).hexdigest(), hashlib.sha256(wrong).hexdigest()):
    assert digest in error
  assert "(pinned); nothing was kept" in error
  assert left(tmp_path) == [] and kept.names("weights") == []
  server.content = content
  assert "(given)" in refused(capsys, "fetch", "tiny", "--sha256", "0" * 64)
  assert "give 64" in refused(capsys, "fetch", "tiny", "--sha256", "0")


def test_without_a_network_it_is_one_line(server, tmp_path, capsys, monkeypatch):
  server.shutdown()
  server.server_close()
  for name in ("tiny", "tiny_of_the_hub"):
    error = refused(capsys, "fetch", name)
    assert "cannot be fetched" in error and "see to the network" in error, error
  monkeypatch.setenv("RFMEDSAM2_META_ENDPOINT", "file:///etc")
  assert "is no address of the web" in refused(capsys, "fetch", "tiny")
  monkeypatch.setenv("RFMEDSAM2_META_ENDPOINT", "nowhere")
  assert "cannot be fetched" in refused(capsys, "fetch", "tiny")


def test_what_is_not_there_is_one_line(server, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(PUBLISHED, "tiny", dataclasses.replace(PUBLISHED["tiny"], meta="other.pt"))
  assert "404" in refused(capsys, "fetch", "tiny")
  monkeypatch.setitem(PUBLISHED, "tiny_of_the_hub",
                      dataclasses.replace(PUBLISHED["tiny_of_the_hub"], file="other.pt"))
  assert "404" in refused(capsys, "fetch", "tiny_of_the_hub")
  assert "on the Hugging Face hub alone" in refused(
    capsys, "fetch", "tiny_of_the_hub", "--source", "meta")


def test_a_file_that_is_no_checkpoint_is_one_line(server, tmp_path, capsys, monkeypatch):
  server.content = b"<html>please log in</html>"
  digest = hashlib.sha256(server.content).hexdigest()
  assert "is damaged or no checkpoint" in refused(capsys, "fetch", "tiny", "--sha256", digest)
  assert kept.names("weights") == left(tmp_path) == []


def test_an_unknown_name_is_one_line_with_the_nearest(server, capsys):
  assert "the nearest known name is sam2.1_hiera_tiny;" in refused(
    capsys, "fetch", "sam2.1_hiera_tiy")
  for name, says in (("sam2.1_hiera_tiny", "get it with rfmedsam2 fetch sam2.1_hiera_tiny"),
                     ("medsam2_lates", "the nearest known name is medsam2_latest")):
    with pytest.raises(UserError, match=says):
      load_checkpoint(name)
    assert says in refused(capsys, "serve", name, "--port", "0")


def test_the_names_are_listed(server, capsys):
  assert main(["fetch"]) == 0
  said = capsys.readouterr().out
  assert all(name in said for name in PUBLISHED)


def test_published_weights_are_of_the_official_sizes_and_addresses():
  """As build_sam.py of sam2 1.1.0 has them; hashes are 64 digits and no two are the same."""
  official = pytest.importorskip("sam2.build_sam").HF_MODEL_ID_TO_FILENAMES
  ours = {x.repository: x.file for x in PUBLISHED.values() if x.meta}
  assert ours == {repository: file for repository, (_, file) in official.items()}
  hashes = [x.sha256 for x in PUBLISHED.values() if x.sha256]
  assert len(hashes) == len(set(hashes)) == len(official)
  assert all(len(bytes.fromhex(x)) == 32 for x in hashes)
  assert all(published.published(name).file == x.file for name, x in PUBLISHED.items())
