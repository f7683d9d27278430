"""`rfmedsam2 serve` over HTTP: what it answers, and what it refuses to whom."""

import gzip
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import nibabel as nib
import numpy as np
import pytest
from small_sam2 import MODEL, SMALL, drawn

from rfmedsam2_jax.cli import main
from rfmedsam2_jax.data.volumes import load_image
from rfmedsam2_jax.prompted.slice_frame import VoxelPrompt
from rfmedsam2_jax.prompted.tracked import PromptedVolume
from rfmedsam2_jax.tracking import TrackingConfig, tracker
from rfmedsam2_jax.weights.checkpoint import save_checkpoint

pytest.importorskip("fastapi", reason="pip install 'rfmedsam2-jax[serve]'")
pytest.importorskip("httpx", reason="pip install 'rfmedsam2-jax[test]'")

from starlette.testclient import TestClient  # noqa: E402

from rfmedsam2_jax.serve.api import Pages  # noqa: E402
from rfmedsam2_jax.serve.app import make_app  # noqa: E402
from rfmedsam2_jax.serve.studio import Studio  # noqa: E402

TOKEN = "t0ken"
UPLOAD = 20_000
BOX = {"label": 2, "box": [[5, 6, 4], [5, 13, 11]]}
JSON = {"Content-Type": "application/json"}
POINTS = {"label": 2, "round": 1, "points": [[8, 10, 8, True], [8, 20, 25, False]]}


def scan(path, shape=(30, 26, 11)):
  rng = np.random.default_rng(0)
  voxels = rng.normal(0, 30, shape)
  voxels[4:12, 6:14, 2:9] += 200
  image = nib.Nifti1Image(voxels.astype(np.int16), np.diag([2.0, 2.5, 4.0, 1.0]))
  image.set_sform(np.diag([-2.0, 2.5, 4.0, 1.0]), code=2)
  image.set_qform(np.diag([-2.0, 2.5, 4.0, 1.0]), code=1)
  nib.save(image, path)
  return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """secret/ besides folder/, which has good and bad volumes and links."""
  place = tmp_path_factory.mktemp("machine")
  folder = place / "folder"
  (folder / "sub").mkdir(parents=True)
  (place / "secret").mkdir()
  scan(folder / "sub" / "scan.nii.gz")
  scan(place / "secret" / "other.nii.gz")
  scan(folder / "large.nii", (50, 50, 10))
  (folder / "cut.nii.gz").write_bytes((folder / "sub" / "scan.nii.gz").read_bytes()[:4000])
  (folder / "text.nii.gz").write_text("text")
  (folder / "notes.txt").write_text("notes")
  (folder / "link.nii.gz").symlink_to(place / "secret" / "other.nii.gz")
  (folder / "out").symlink_to(place / "secret")
  (folder / "circle.nii.gz").symlink_to(folder / "circle.nii.gz")
  return place


@pytest.fixture
def studio():
  return Studio(MODEL, drawn(), TrackingConfig(), keep=2, max_voxels=20_000)


@pytest.fixture
def client(studio, place):
  pages = Pages(studio, place / "folder", UPLOAD, "small")
  client = TestClient(
    make_app(pages, "127.0.0.1", TOKEN), "http://127.0.0.1:8765",
    headers={"Authorization": f"Bearer {TOKEN}"},
  )
  answered = []
  client.event_hooks["response"].append(answered.append)
  yield client
  for response in answered:  # whatever was asked: no place of the machine is told
    told = response.read() + str(response.headers).encode()
    assert b"machine" not in told and b"/tmp" not in told and b"Traceback" not in told


def opened(client, **more):
  response = client.post("/api/v1/volumes", json={"file": "sub/scan.nii.gz", **more})
  assert response.status_code == 200, response.text
  return response.json()


def track(client, volume, *prompts):
  asked = {"prompts": prompts, "space": "zyx"}
  response = client.post(f"/api/v1/volumes/{volume}/track", json=asked)
  assert response.status_code == 202, response.text
  return ended(client, response.json()["job"])


def ended(client, job):
  until = time.monotonic() + 120
  while time.monotonic() < until:
    answer = client.get(f"/api/v1/jobs/{job}").json()
    if answer["state"] not in ("queued", "running"):
      return answer
    time.sleep(0.02)
  raise AssertionError(f"still {answer}")


def saved(client, volume):
  response = client.get(f"/api/v1/volumes/{volume}/export/nii.gz")
  assert response.status_code == 200, response.text
  return nib.Nifti1Image.from_bytes(gzip.decompress(response.content))


def test_what_is_saved_is_what_track_gives_and_corrections_encode_nothing(
  client, place, monkeypatch
):
  encoded = []
  encode = tracker._encode
  monkeypatch.setattr(
    tracker, "_encode", lambda *args: encoded.append(len(args[2])) or encode(*args)
  )
  volume = opened(client)["volume"]
  assert client.get(f"/api/v1/volumes/{volume}/export/nii.gz").status_code == 400  # nothing yet
  first = track(client, volume, BOX)
  assert first["state"] == "done", first
  calls, before = len(encoded), np.asarray(saved(client, volume).dataobj)
  assert calls and track(client, volume, BOX, POINTS)["state"] == "done"
  assert len(encoded) == calls
  ours = saved(client, volume)

  path = place / "folder" / "sub" / "scan.nii.gz"
  image, read = nib.load(path), load_image(path)
  found = PromptedVolume(MODEL, drawn(), read).track([
    VoxelPrompt(2, box=((5, 6, 4), (5, 13, 11))),
    VoxelPrompt(2, points=((8, 10, 8, True), (8, 20, 25, False)), round=1),
  ])
  labels = np.asarray(ours.dataobj)
  np.testing.assert_array_equal(labels, read.geometry.to_native(found.labels))
  assert (labels != before).any() and set(np.unique(labels)) == {0, 2}
  for form in ("get_sform", "get_qform"):
    (theirs, code), (affine, its) = (getattr(i, form)(coded=True) for i in (image, ours))
    np.testing.assert_array_equal(affine, theirs)
    assert its == code
  for number in (5, 8):
    shown = client.get(f"/api/v1/volumes/{volume}/labels/{number}").content
    assert shown == found.labels[number].astype(np.uint8).tobytes()


def test_labels_that_begin_later_and_undo_give_what_track_gives(client, studio, place, monkeypatch):
  ran = []
  for name in ("track", "correct"):
    method = getattr(PromptedVolume, name)
    monkeypatch.setattr(
      PromptedVolume, name, lambda *args, n=name, m=method: ran.append(n) or m(*args)
    )
  volume = opened(client, plane="coronal")["volume"]
  other = {"label": 9, "round": 2, "box": [[2, 9, 15], [8, 9, 25]]}
  box, points = ({**BOX, "box": [[4, 8, 4], [9, 8, 11]]},
                 {"label": 2, "round": 1, "points": [[6, 12, 8, True]]})
  for prompts in ([box], [box, points], [box, points, other]):
    assert track(client, volume, *prompts)["fresh"] >= 26
  assert ran == ["track", "correct", "correct"]
  labels = np.asarray(saved(client, volume).dataobj)
  assert set(np.unique(labels)) == {0, 2, 9}
  assert track(client, volume, box, points)["state"] == "done"
  assert len(ran) == 3 and set(np.unique(np.asarray(saved(client, volume).dataobj))) == {0, 2}
  assert 9 not in client.get(f"/api/v1/volumes/{volume}/labels/9").content
  assert track(client, volume, box, points, other)["state"] == "done" and len(ran) == 3
  monkeypatch.undo()
  read = load_image(place / "folder" / "sub" / "scan.nii.gz")
  found = PromptedVolume(MODEL, drawn(), read, plane="coronal").track([
    VoxelPrompt(2, box=((4, 8, 4), (9, 8, 11))),
    VoxelPrompt(2, points=((6, 12, 8, True),), round=1),
    VoxelPrompt(9, box=((2, 9, 15), (8, 9, 25)), round=2),
  ])
  np.testing.assert_array_equal(labels, read.geometry.to_native(found.labels))


@pytest.mark.parametrize("plane, shape", [("axial", (11, 26, 30)), ("coronal", (26, 11, 30))])
def test_slices_are_windowed_bytes(client, place, plane, shape):
  answer = opened(client, plane=plane, window="100,200")
  assert (answer["slices"], answer["rows"], answer["columns"]) == shape
  image = client.get(f"/api/v1/volumes/{answer['volume']}/image/5").content
  array = load_image(place / "folder" / "sub" / "scan.nii.gz").array[0]
  theirs = array[5] if plane == "axial" else array[:, 5]
  ours = np.frombuffer(image, np.uint8).reshape(shape[1:])
  np.testing.assert_allclose(ours, np.clip(theirs / 200, 0, 1) * 255, atol=0.51)
  assert client.get(f"/api/v1/volumes/{answer['volume']}/image/{shape[0]}").status_code == 404


def test_only_volumes_of_the_folder_are_listed_and_opened(client):
  listed = client.get("/api/v1/server").json()["files"]
  assert listed == ["cut.nii.gz", "large.nii", "text.nii.gz", "sub/scan.nii.gz"]
  for name in (
    "../secret/other.nii.gz", "sub/../../secret/other.nii.gz", "link.nii.gz",
    "out/other.nii.gz", "circle.nii.gz", "notes.txt", "", ".", "a\0.nii.gz", "x" * 900 + ".nii",
    "no.nii.gz", "/etc/passwd",
  ):
    response = client.post("/api/v1/volumes", json={"file": name})
    assert response.status_code == 400 and "is no volume" in response.json()["error"], name
  for path in ("/../app.py", "/%2e%2e/app.py", "/..%2f..%2fapp.py"):
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("asked, says", [
  ({"file": "cut.nii.gz"}, "cut.nii.gz: cannot be read"),
  ({"file": "text.nii.gz"}, "text.nii.gz: "),
  ({"file": "large.nii"}, "25000 voxels where 20000"),
  ({"file": "sub/scan.nii.gz", "window": "pink"}, "window pink"),
  ({"file": "sub/scan.nii.gz", "plane": "oblique"}, "plane"),
  ({"file": 3}, "file"),
  ({}, "file"),
])
def test_a_bad_volume_is_one_line(client, asked, says):
  response = client.post("/api/v1/volumes", json=asked)
  error = response.json()["error"]
  assert response.status_code == 400 and says in error and "\n" not in error


def test_uploads_are_bounded_and_leave_nothing(client, tmp_path, monkeypatch):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  good = scan(tmp_path / "up.nii.gz", (12, 11, 10)).read_bytes()
  answer = client.post("/api/v1/uploads?name=up.nii.gz&plane=sagittal", content=good)
  assert answer.status_code == 200 and answer.json()["slices"] == 12
  for name, content, says in (
    ("up.nii.gz", b"0" * (UPLOAD + 1), "larger than 20000 bytes"),
    ("up.nii.gz", iter([b"0" * UPLOAD, b"0"]), "larger than 20000 bytes"),  # no length is said
    ("up.nii.gz", good[:300], "up.nii.gz: cannot be read"),
    ("up.nii.gz", b"", "up.nii.gz: "),
    ("../up.nii.gz", good, "is no name of a volume"),
    ("up.txt", good, "is no name of a volume"),
  ):
    response = client.post("/api/v1/uploads", params={"name": name}, content=content)
    assert response.status_code == 400 and says in response.json()["error"], response.text
  assert [p.name for p in tmp_path.iterdir()] == ["up.nii.gz"]


def test_other_sites_names_and_users_are_refused(client):
  def status(path="/api/v1/server", **headers):
    return client.get(path, headers=headers).status_code

  assert status() == status(origin="http://127.0.0.1:8765") == status(host="localhost:1") == 200
  assert status(host="evil.example") == status("/", host="evil.example:8765") == 421
  assert status(host="10.0.0.7:8765") == status(host="127.0.0.1.evil.example") == 421
  assert status(origin="http://evil.example") == status(origin="null") == 403
  assert status(authorization="Bearer other") == status(authorization="") == 401
  assert "default-src 'none'" in client.get("/api/v1/server").headers["content-security-policy"]


@pytest.mark.parametrize("prompts, says", [
  ([], "no prompt"),
  ([{"label": 0, "box": BOX["box"]}], "label"),
  ([{"label": 256, "box": BOX["box"]}], "label"),
  ([{"label": 1}], "no coordinates"),
  ([{"label": 1, "box": [[5, 6, 4], [6, 13, 11]]}], "spans"),
  ([{"label": 1, "points": [[5, 6, 400, True]]}], "outside"),
  ([BOX, BOX], "two boxes"),
  ([{**BOX, "mask": 1}], "mask"),
  ([BOX] * 1001, "prompts"),
  ([{"label": 1, "points": [[5, 6, 7, True]] * 40_000}], "bytes"),
])
def test_bad_prompts_are_one_line(client, prompts, says):
  volume = opened(client)["volume"]
  response = client.post(f"/api/v1/volumes/{volume}/track", json={
    "prompts": prompts, "space": "zyx"})
  assert response.status_code == (413 if says == "bytes" else 400), response.text
  assert says in response.json()["error"]
  for content in (b"{", b"[NaN]", b'{"prompts": [{"label": 1, "points": [[NaN, 1, 1, true]]}]}'):
    answer = client.post(f"/api/v1/volumes/{volume}/track", content=content, headers=JSON)
    assert answer.status_code == 400


def test_a_running_tracking_is_cancelled_and_its_slices_go_back(client, studio):
  volume = opened(client)["volume"]
  assert track(client, volume, BOX)["state"] == "done"
  held = studio.volume(volume)
  before, running, go_on = held.labels.copy(), threading.Event(), threading.Event()
  report = held.report

  def slow(done, total):
    running.set()
    assert go_on.wait(60)
    report(done, total)

  held.report = slow
  asked = {"prompts": [BOX, POINTS], "space": "zyx"}
  job = client.post(f"/api/v1/volumes/{volume}/track", json=asked).json()["job"]
  assert running.wait(60)
  assert client.get(f"/api/v1/jobs/{job}").json()["fresh"] and (held.labels != before).any()
  client.delete(f"/api/v1/jobs/{job}")
  go_on.set()
  assert ended(client, job)["state"] == "cancelled"
  np.testing.assert_array_equal(held.labels, before)
  assert track(client, volume, BOX, POINTS)["state"] == "done"


def test_a_tracking_that_waits_is_cancelled_and_the_next_one_runs(client):
  volume = opened(client)["volume"]
  ask = {"prompts": [BOX], "space": "zyx"}
  jobs = [client.post(f"/api/v1/volumes/{volume}/track", json=ask).json()["job"] for _ in range(2)]
  client.delete(f"/api/v1/jobs/{jobs[1]}")
  assert ended(client, jobs[0])["state"] == "done"
  assert ended(client, jobs[1])["state"] == "cancelled"
  assert track(client, volume, BOX, POINTS)["state"] == "done"
  assert client.get("/api/v1/jobs/none").status_code == 404


def test_the_oldest_volume_goes_and_a_fault_is_no_traceback(client, studio, monkeypatch):
  first, second, _ = (opened(client)["volume"] for _ in range(3))
  assert client.get(f"/api/v1/volumes/{first}/image/0").status_code == 404
  monkeypatch.setattr(PromptedVolume, "track", lambda *args: 1 / 0)
  ended_so = track(client, second, BOX)
  assert ended_so["state"] == "failed" and "terminal" in ended_so["error"]


def started(checkpoint, *arguments):
  return subprocess.Popen(
    [sys.executable, "-m", "rfmedsam2_jax", "serve", str(checkpoint), "--json", *arguments],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )


@pytest.mark.slow
def test_the_command_prints_its_address_and_ends_at_once(tmp_path):
  save_checkpoint(tmp_path / "small", SMALL, drawn(), {"source": "drawn"})
  process = started(tmp_path / "small", "--port", "0")
  try:
    address = json.loads(process.stdout.readline())["result"]["address"]
    site, token = address.split("#")
    with urllib.request.urlopen(site, timeout=20) as page:
      assert b"<html" in page.read()
    request = urllib.request.Request(
      f"{site}api/v1/server", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
      said = json.load(answer)
      assert len(said["colours"]) == 9 and said["upload_limit"] == 1 << 30
      assert (said["checkpoint"], said["files"], said["models"]) == ("small", [], [])
    began = time.monotonic()
    process.send_signal(signal.SIGINT)  # while it compiles, which nothing can stop
    out, error = process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - began < 5
    assert "interrupted" in json.loads(out)["error"] and error == ""
  finally:
    process.kill()


@pytest.mark.slow
def test_a_key_is_made_for_other_hosts_and_taken_from_a_file(tmp_path):
  save_checkpoint(tmp_path / "small", SMALL, drawn(), {"source": "drawn"})
  (tmp_path / "key").write_text("a-key-of-a-file-1\n")
  for more, key in ((["--host", "0.0.0.0"], None), (["--key-file", tmp_path / "key"],
                                                    "a-key-of-a-file-1")):
    process = started(tmp_path / "small", "--port", "0", *map(str, more))
    try:
      said = json.loads(process.stdout.readline())
      while "result" not in said:  # the warning goes before
        said = json.loads(process.stdout.readline())
      result = said["result"]
      assert ("key" in result) == (key is None)
      port = result["address"].split("#")[0].rstrip("/").rpartition(":")[2]
      for given, status in ((key or result["key"], 200), ("another", 401)):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/api/v1/server",
                                         headers={"Authorization": f"Bearer {given}"})
        try:
          with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.status == status
        except urllib.error.HTTPError as error:
          assert error.code == status
    finally:
      process.kill()


def test_a_mistake_is_said_before_the_network_is_loaded(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "rfmedsam2_jax.weights.checkpoint", None)  # cannot be imported
  short = tmp_path / "short"
  short.write_text("too short\n")
  for given, said in (
    (["no"], "no such checkpoint"), ([".", "--image-size", "100"], "--image-size 100: give"),
    ([".", "--model", "no"], "no: is no run"),
    ([".", "--key-file", str(tmp_path / "none")], "cannot be read"),
    ([".", "--key-file", str(short)], "is no key; give 16"),
    ([".", "--keep", "0"], "--keep 0: give 1 or more"), ([".", "--port", "-1"], "--port -1: give"),
  ):
    assert main(["serve", str(tmp_path / given[0]), *given[1:]]) == 2
    assert said in capsys.readouterr().err
  monkeypatch.setattr("rfmedsam2_jax.cli.serve.find_spec", lambda name: None)
  assert main(["serve", str(tmp_path)]) == 2
  assert "pip install 'rfmedsam2-jax[serve]'" in capsys.readouterr().err


def test_a_port_in_use_is_one_line(tmp_path, capsys):
  with socket.create_server(("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    assert main(["serve", str(tmp_path), "--port", str(port)]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "cannot listen" in error
  assert main(["serve", str(tmp_path), "--port", "0", "--folder", str(tmp_path / "no")]) == 2
  assert "is no folder" in capsys.readouterr().err
