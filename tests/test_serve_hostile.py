"""`rfmedsam2 serve` against files, uploads and clients that mean no good, or just break."""

import gc
import gzip
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import weakref

import nibabel as nib
import numpy as np
import pytest
from small_sam2 import MODEL, SMALL, drawn

from rfmedsam2_jax.cli import main
from rfmedsam2_jax.tracking import TrackingConfig
from rfmedsam2_jax.weights.checkpoint import save_checkpoint

pytest.importorskip("fastapi", reason="pip install 'rfmedsam2-jax[serve]'")
pytest.importorskip("httpx", reason="pip install 'rfmedsam2-jax[test]'")

from starlette.testclient import TestClient  # noqa: E402

from rfmedsam2_jax.serve.api import Pages  # noqa: E402
from rfmedsam2_jax.serve.app import make_app  # noqa: E402
from rfmedsam2_jax.serve.studio import Studio  # noqa: E402

COS, SIN = np.cos(0.025), np.sin(0.025)
AFFINE = np.array(
  [[0, -2 * COS, 4 * SIN, 5], [2.5, 0, 0, -7], [0, 2 * SIN, 4 * COS, 9], [0, 0, 0, 1]])
JSON = {"Content-Type": "application/json"}
BOX = {"label": 2, "box": [[5, 6, 4], [5, 13, 11]]}


def voxels(shape=(30, 26, 11)):
  values = np.random.default_rng(0).normal(0, 30, shape)
  values[4:12, 6:14, 2:9] += 200
  return values.astype(np.int16)


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "folder").mkdir()
  return tmp_path / "folder"


@pytest.fixture
def studio():
  return Studio(MODEL, drawn(), TrackingConfig(), keep=2, max_voxels=20_000)


@pytest.fixture
def client(studio, folder):
  app = make_app(Pages(studio, folder, 1 << 20, "small"), "127.0.0.1", "t")
  return TestClient(app, "http://127.0.0.1:8765", headers={"Authorization": "Bearer t"})


def refused(client, name):
  response = client.post("/api/v1/volumes", json={"file": name})
  assert response.status_code == 400, response.text
  error = response.json()["error"]
  assert "\n" not in error and str(os.getcwd()) not in error and "/tmp" not in error
  return error


def opened(client, name):
  response = client.post("/api/v1/volumes", json={"file": name})
  assert response.status_code == 200, response.text
  return response.json()["volume"]


def ended(client, volume, *prompts):
  asked = {"prompts": prompts, "space": "zyx"}
  job = client.post(f"/api/v1/volumes/{volume}/track", json=asked).json()["job"]
  until = time.monotonic() + 120
  while time.monotonic() < until:
    answer = client.get(f"/api/v1/jobs/{job}").json()
    if answer["state"] not in ("queued", "running"):
      return answer["state"]
    time.sleep(0.02)
  raise AssertionError("still running")


def test_headers_of_nifti_that_claim_too_much_are_refused_before_voxels_are_read(client, folder):
  nib.save(nib.Nifti2Image(np.zeros((50, 50, 9), np.uint8), AFFINE), folder / "two.nii.gz")
  assert "22500 voxels where 20000" in refused(client, "two.nii.gz")
  raw = bytearray(nib.Nifti1Image(voxels(), AFFINE).to_bytes())
  raw[40:56] = struct.pack("<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1)
  (folder / "huge.nii.gz").write_bytes(gzip.compress(bytes(raw)))
  assert "voxels where 20000" in refused(client, "huge.nii.gz")
  raw = bytearray(nib.Nifti1Image(voxels(), AFFINE).to_bytes())
  raw[108:112] = struct.pack("<f", 2e9)  # a bomb would be unpacked up to there
  (folder / "far.nii.gz").write_bytes(gzip.compress(bytes(raw)))
  assert "begin at byte" in refused(client, "far.nii.gz")


def test_the_formats_of_itk_are_opened_saved_and_bounded(client, folder):
  sitk = pytest.importorskip("SimpleITK")
  nrrd = pytest.importorskip("nrrd")
  image = sitk.GetImageFromArray(voxels().T.copy())
  image.SetSpacing((2.0, 2.5, 4.0))
  image.SetOrigin((3.0, -4.0, 5.0))
  large = sitk.GetImageFromArray(np.zeros((9, 50, 50), np.uint8))
  for ending in ("nrrd", "mha", "mhd", "nhdr"):
    sitk.WriteImage(image, str(folder / f"scan.{ending}"))
  series = folder / "series"
  series.mkdir()
  writer = sitk.ImageFileWriter()
  writer.KeepOriginalImageUIDOn()
  for z in range(11):
    one = image[:, :, z]
    for tag, value in (
      ("0020|000e", "1.2.3"), ("0020|000d", "1.2"), ("0020|0013", str(z)), ("0008|0060", "CT"),
      ("0020|0032", f"3\\-4\\{5 + 4 * z}"), ("0020|0037", "1\\0\\0\\0\\1\\0"),
    ):
      one.SetMetaData(tag, value)
    writer.SetFileName(str(series / f"{z}.dcm"))
    writer.Execute(one)
  sitk.WriteImage(large, str(folder / "large.mha"))
  listed = client.get("/api/v1/server").json()["files"]
  assert listed == ["large.mha", "scan.mha", "scan.nrrd", "series"]
  assert "22500 voxels where 20000" in refused(client, "large.mha")
  for name in ("scan.mhd", "scan.nhdr"):
    assert "is no volume" in refused(client, name)
  for name in ("scan.nrrd", "scan.mha", "series"):
    volume = opened(client, name)
    assert ended(client, volume, BOX) == "done"
    content = client.get(f"/api/v1/volumes/{volume}/export/seg.nrrd").content
    (folder / "saved.seg.nrrd").write_bytes(content)
    saved = sitk.ReadImage(str(folder / "saved.seg.nrrd"))
    assert saved.GetSize() == image.GetSize() and saved.GetSpacing() == image.GetSpacing()
    np.testing.assert_allclose(saved.GetOrigin(), image.GetOrigin())
    labels = np.asarray(nib.Nifti1Image.from_bytes(
      gzip.decompress(client.get(f"/api/v1/volumes/{volume}/export/nii.gz").content)
    ).dataobj)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(saved).T, labels)
    header = nrrd.read_header(str(folder / "saved.seg.nrrd"))
    assert [header[f"Segment{i}_LabelValue"] for i in (0, 1)] == ["1", "2"]
    colour = [round(255 * float(part)) for part in header["Segment1_Color"].split()]
    told = client.get("/api/v1/server").json()["colours"][1]
    assert "#{:02x}{:02x}{:02x}".format(*colour) == told
    assert "rfmedsam2-" not in str(header)
  # A file of the series that is a link to elsewhere takes the series out.
  (series / "10.dcm").rename(folder.parent / "outside.dcm")
  (series / "10.dcm").symlink_to(folder.parent / "outside.dcm")
  assert "is no volume" in refused(client, "series")


@pytest.mark.parametrize("name, header", [
  ("a.nrrd", "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\n"
             "data file: {secret}\n\n"),
  ("b.nrrd", "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\n"
             "DataFile: {secret}\n\n"),
  ("c.mha", "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\n"
            "ElementDataFile = {secret}\n"),
  ("d.mha", "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\n"
            "ElementDataFile = LIST\n{secret}\n"),
])
def test_a_header_cannot_name_a_file_outside_as_its_voxels(client, folder, name, header):
  pytest.importorskip("SimpleITK")
  secret = folder.parent / "secret.bin"
  secret.write_bytes(bytes(range(64)))
  (folder / name).write_text(header.format(secret=secret))
  assert "names another file" in refused(client, name)
  answer = client.post(f"/api/v1/uploads?name={name}", content=(folder / name).read_bytes())
  assert answer.status_code == 400 and "names another file" in answer.json()["error"]


def test_odd_names_are_told_as_they_are_or_left_out(client, folder):
  good = ["Ünï <b>.nii.gz", "a b'\"&#.nii", "new\nline.nii.gz"]
  for name in good:
    nib.save(nib.Nifti1Image(voxels(), AFFINE), folder / "x.nii")
    (folder / "x.nii").rename(folder / name) if name.endswith(".nii") else (
      folder / name).write_bytes(gzip.compress((folder / "x.nii").read_bytes()))
  (folder / "x.nii").unlink(missing_ok=True)
  (folder / ".hidden.nii").write_bytes(b"")
  with open(os.fsencode(folder) + b"/\xff\xfe.nii.gz", "wb") as file:  # no text at all
    file.write(b"0")
  os.mkfifo(folder / "pipe.nii")
  assert sorted(client.get("/api/v1/server").json()["files"]) == sorted(good)
  for name in good:
    opened(client, name)


def test_odd_requests_are_one_line(client, folder):
  nib.save(nib.Nifti1Image(voxels(), AFFINE), folder / "scan.nii.gz")
  volume = opened(client, "scan.nii.gz")
  for path in (
    "image/-1", "image/1.5", "labels/11", "labels/" + "9" * 400, "image/nan", "export/zip",
  ):
    assert client.get(f"/api/v1/volumes/{volume}/{path}").status_code == 404, path
  for content, says in (
    (b"[" * 100_000, "JSON"), (b'"\\ud800"', "the request"), (b"\xff\xfe", "JSON"),
    (b'{"prompts": 1e999}', "prompts"), (b"", "the request"),
  ):
    response = client.post(
      f"/api/v1/volumes/{volume}/track", content=content, headers=JSON)
    assert response.status_code == 400 and says in response.json()["error"], response.text
  for number in ("1e300", "Infinity", "NaN", "-1", "12", "null"):
    body = f'{{"prompts": [{{"label": 1, "points": [[{number}, 1, 1, true]]}}], "space": "zyx"}}'
    answer = client.post(f"/api/v1/volumes/{volume}/track", content=body, headers=JSON)
    assert answer.status_code == 400


def test_two_pages_follow_two_volumes_and_memory_is_given_back(client, studio, folder):
  nib.save(nib.Nifti1Image(voxels(), AFFINE), folder / "one.nii.gz")
  nib.save(nib.Nifti1Image(voxels()[::-1], AFFINE), folder / "two.nii.gz")
  one, two = opened(client, "one.nii.gz"), opened(client, "two.nii.gz")
  asked = {"prompts": [BOX], "space": "zyx"}
  jobs = [
    client.post(f"/api/v1/volumes/{volume}/track", json=asked).json()["job"]
    for volume in (one, two)
  ]
  for volume, job in zip((one, two), jobs, strict=True):
    assert ended(client, volume, BOX) == "done"
    assert client.get(f"/api/v1/jobs/{job}").json()["state"] == "done"
  held = [weakref.ref(studio.volume(volume)) for volume in (one, two)]
  assert (held[0]().labels != held[1]().labels).any()
  gc.disable()  # what is given back is given back at once
  try:
    for name in ("one.nii.gz", "two.nii.gz"):
      opened(client, name)
    assert held[0]() is None and held[1]() is None
  finally:
    gc.enable()


def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path, capsys):
  assert main(["serve", str(tmp_path), "--port", "0"]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and str(tmp_path) in error


@pytest.mark.slow
def test_a_cut_upload_leaves_nothing_and_an_interrupt_ends_a_tracking(tmp_path):
  save_checkpoint(tmp_path / "small", SMALL, drawn(), {"source": "drawn"})
  (tmp_path / "scans").mkdir()
  (tmp_path / "tmp").mkdir()
  shape = (30, 26, 300)  # long enough to be interrupted
  nib.save(nib.Nifti1Image(voxels(shape), AFFINE), tmp_path / "scans" / "scan.nii.gz")
  process = subprocess.Popen(
    [sys.executable, "-m", "rfmedsam2_jax", "serve", str(tmp_path / "small"), "--json", "--port",
     "0", "--folder", str(tmp_path / "scans")],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
  )

  def ask(path, value=None):
    request = urllib.request.Request(
      f"{site}api/v1/{path}", json.dumps(value).encode() if value else None,
      {"Authorization": f"Bearer {token}", **JSON},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
      return json.load(answer)

  try:
    site, token = json.loads(process.stdout.readline())["result"]["address"].split("#")
    place = urllib.parse.urlparse(site)
    with socket.create_connection((place.hostname, place.port)) as cut:
      cut.sendall(
        f"POST /api/v1/uploads?name=a.nii HTTP/1.1\r\nHost: {place.netloc}\r\n"
        f"Authorization: Bearer {token}\r\nContent-Length: 1000\r\n\r\nhalf".encode()
      )
      time.sleep(0.5)
    volume = ask("volumes", {"file": "scan.nii.gz"})["volume"]
    assert list((tmp_path / "tmp").iterdir()) == []
    job = ask(f"volumes/{volume}/track", {"prompts": [BOX], "space": "zyx"})["job"]
    until = time.monotonic() + 100
    while ask(f"jobs/{job}")["done"] == 0 and time.monotonic() < until:
      time.sleep(0.02)
    assert ask(f"jobs/{job}")["state"] == "running"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - began < 5 and error == ""
  finally:
    process.kill()
