"""`rfmedsam2_jax.client` against a real server on loopback; it needs numpy alone."""

import gzip
import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="pip install 'rfmedsam2-jax[serve]'")

from api_server import AFFINE, KEY, make_pages, save_scan, served  # noqa: E402
from small_sam2 import MODEL, drawn  # noqa: E402

from rfmedsam2_jax.client import (  # noqa: E402
  Client,
  ServerError,
  box,
  line,
  mask,
  nifti_bytes,
  points,
)
from rfmedsam2_jax.data.volumes import load_image  # noqa: E402
from rfmedsam2_jax.prompted.slice_frame import VoxelPrompt  # noqa: E402
from rfmedsam2_jax.prompted.tracked import PromptedVolume  # noqa: E402

FILE = Path(__file__).parents[1] / "rfmedsam2_jax" / "client.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  place = tmp_path_factory.mktemp("client")
  save_scan(place / "scan.nii.gz")
  return place


@pytest.fixture(scope="module")
def address(place):
  with served(make_pages(place)) as address:
    yield address


@pytest.mark.parametrize("copied", [False, True])
def test_it_imports_numpy_and_the_standard_library_alone(tmp_path, copied):
  name = "client_elsewhere" if copied else "rfmedsam2_jax.client"
  if copied:
    shutil.copy(FILE, tmp_path / f"{name}.py")
  code = (
    f"import sys, json, {name}; print(json.dumps([m for m in sys.modules if '.' not in m]))")
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path if copied else FILE.parents[1], text=True,
    capture_output=True, check=True)
  loaded = set(json.loads(done.stdout)) - set(sys.stdlib_module_names)
  site = {m for m in loaded if m.startswith(("_", "sitecustomize", "__"))}
  assert loaded - site == {"numpy", name.split(".")[0]}


def test_uploaded_prompted_corrected_and_saved_is_what_track_gives(address, place, tmp_path):
  server = Client(address, KEY)
  seen = []
  with server.upload(place / "scan.nii.gz") as volume:
    assert volume.shape == (30, 26, 11)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    # Axes of the file: canonical (z, y, x) is (k, 29 - i, j).
    volume.track([box(2, (4, 6, 5), (11, 13, 5))], progress=lambda job: seen.append(job["state"]))
    stroke = [(6, 8, 8), (6, 12, 8)]
    volume.correct([line(2, stroke), points(2, outside=[(9, 24, 8)])])
    labels = volume.labels()
    volume.save(tmp_path / "saved.nii.gz")
    volume.save(tmp_path / "saved.nii")
  assert seen[-1] == "done" and set(seen) <= {"queued", "running", "done"}
  read = load_image(place / "scan.nii.gz")
  drawn_points = tuple((8.0, 23.0, y, True) for y in (8.5, 9.5, 10.5, 11.5))
  found = PromptedVolume(MODEL, drawn(), read).track([
    VoxelPrompt(2, box=((5, 25, 6), (5, 18, 13))),
    VoxelPrompt(2, points=drawn_points, round=1),
    VoxelPrompt(2, points=((8, 20, 24, False),), round=1),
  ])
  np.testing.assert_array_equal(labels.array, read.geometry.to_native(found.labels))
  assert labels.array.any() and labels.names == {2: "label 2"}
  for name in ("saved.nii.gz", "saved.nii"):
    saved = nib.load(tmp_path / name)
    np.testing.assert_array_equal(np.asarray(saved.dataobj), labels.array)
    np.testing.assert_allclose(saved.affine, labels.affine, atol=1e-5)
  np.testing.assert_allclose(labels.spacing, saved.header.get_zooms(), rtol=1e-5)
  with pytest.raises(ServerError, match="not open") as told:
    volume.labels()
  assert told.value.status == 404


@pytest.mark.parametrize("kind", ["?", "u1", "i2", ">i2", "u4", "i8", "f2", "f4", "f8"])
def test_arrays_travel_as_nifti_that_others_read(kind):
  array = np.random.default_rng(0).integers(0, 2 if kind == "?" else 99, (5, 4, 3)).astype(kind)
  array = array[::-1].swapaxes(0, 1)
  image = nib.Nifti1Image.from_bytes(gzip.decompress(nifti_bytes(array, AFFINE)))
  np.testing.assert_array_equal(np.asarray(image.dataobj), array)
  np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
  assert image.header.get_xyzt_units()[0] == "mm"


def test_what_is_no_volume_is_refused_before_it_is_sent():
  for array in (np.zeros((3, 3)), np.zeros((3, 3, 0)), np.zeros((2, 2, 2), complex)):
    with pytest.raises(ValueError, match="no volume"):
      nifti_bytes(array, AFFINE)
  with pytest.raises(ValueError, match="affine"):
    nifti_bytes(np.zeros((2, 2, 2)), AFFINE[:3])


def test_an_array_is_opened_where_its_affine_says(address):
  volume = Client(address, KEY).upload_array(np.ones((9, 8, 7), np.float64), AFFINE, "mine")
  assert volume.name == "mine.nii.gz" and volume.shape == (9, 8, 7)
  np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("axis", range(3))
def test_a_mask_travels_as_runs(axis):
  array = np.zeros((5, 6, 7), bool)
  np.moveaxis(array, axis, 0)[2] = np.random.default_rng(axis).random(
    np.moveaxis(array, axis, 0)[2].shape) > 0.4
  pieces = mask(4, array)["mask"]
  again = np.zeros_like(array)
  for first, last in np.array(pieces, int):
    again[tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))] = True
  np.testing.assert_array_equal(again, array)
  assert len(pieces) < array.sum()


def test_a_label_map_is_sent_and_comes_back(address, tmp_path):
  labels = np.zeros((30, 26, 11), np.uint8)
  labels[4:12, 6:14, 2:9] = 9
  nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "labels.nii.gz")
  volume = Client(address, KEY).open("scan.nii.gz")
  volume.begin_with(tmp_path / "labels.nii.gz")
  np.testing.assert_array_equal(volume.labels().array, labels)
  assert volume.labels().names == {9: "label 9"}


def test_errors_are_the_servers_lines(address, place):
  server = Client(address, KEY)
  for action, says in (
    (lambda: server.open("no.nii.gz"), "is no volume of the folder"),
    (lambda: server.upload(FILE), "client.py: is no name of a volume"),
    (lambda: server.open("scan.nii.gz").track([]), "no prompt"),
    (lambda: server.open("scan.nii.gz").segment(), "--model"),
    (lambda: Client(address, "wrong").server(), "key is missing or wrong"),
    (lambda: Client("http://127.0.0.1:9", KEY).server(), "is the server running"),
  ):
    with pytest.raises(ServerError, match=says):
      action()
  with pytest.raises(ValueError, match="no address"):
    Client("ftp://127.0.0.1")
  with pytest.raises(ValueError, match="ending"):
    server.open("scan.nii.gz").save("labels.txt")
  assert server.server()["files"] == ["scan.nii.gz"]


def test_what_interrupts_cancels_the_job(address):
  jobs = []

  def stop(job):
    jobs.append(job["job"])
    raise KeyboardInterrupt

  server = Client(address, KEY)
  with pytest.raises(KeyboardInterrupt):
    server.open("scan.nii.gz").track([box(1, (4, 6, 5), (11, 13, 5))], progress=stop)
  last = server._json("GET", f"/jobs/{jobs[0]}")
  while last["state"] in ("queued", "running"):
    last = server._json("GET", f"/jobs/{jobs[0]}")
  assert last["state"] == "cancelled"


def test_the_key_goes_to_no_other_server():
  heard = []

  class Redirects(BaseHTTPRequestHandler):
    def do_GET(self):
      heard.append(self.path)
      self.send_response(302)
      self.send_header("Location", "/elsewhere")
      self.end_headers()

    def log_message(self, *words):
      pass

  with HTTPServer(("127.0.0.1", 0), Redirects) as other:
    threading.Thread(target=other.serve_forever, daemon=True).start()
    with pytest.raises(ServerError) as told:
      Client(f"http://127.0.0.1:{other.server_port}/#k").server()
    other.shutdown()
  assert told.value.status == 302 and heard == ["/api/v1/server"]


def test_a_folder_of_dicom_is_sent_as_an_archive(address, tmp_path):
  sitk = pytest.importorskip("SimpleITK")
  from tests_data import save_series

  image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 99, (6, 9, 8), np.int16))
  image.SetSpacing((1.5, 1.5, 3.0))
  save_series(tmp_path / "series", image)
  volume = Client(address, KEY).upload(tmp_path / "series")
  assert sorted(volume.shape) == [6, 8, 9] and volume.name == "series.zip"
