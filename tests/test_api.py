"""The versioned HTTP API: its document, its key, automatic segmentation, spaces and lines."""

import gzip
import io
import re
import time

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="pip install 'rfmedsam2-jax[serve]'")
pytest.importorskip("httpx", reason="pip install 'rfmedsam2-jax[test]'")

from api_server import AFFINE, KEY, TOKEN, make_pages, save_scan  # noqa: E402
from small_sam2 import MODEL, drawn  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from rfmedsam2_jax.base.errors import UserError  # noqa: E402
from rfmedsam2_jax.data.datasets import Labels, Structure  # noqa: E402
from rfmedsam2_jax.data.volumes import load_image  # noqa: E402
from rfmedsam2_jax.prompted.slice_frame import VoxelPrompt  # noqa: E402
from rfmedsam2_jax.prompted.tracked import PromptedVolume  # noqa: E402
from rfmedsam2_jax.serve.app import make_app  # noqa: E402

V1 = "/api/v1"


def client_of(pages, host="127.0.0.1", secret=KEY):
  return TestClient(make_app(pages, host, TOKEN, KEY), "http://127.0.0.1:8765",
                    headers={"Authorization": f"Bearer {secret}"})


@pytest.fixture
def folder(tmp_path):
  save_scan(tmp_path / "scan.nii.gz")
  return tmp_path


@pytest.fixture
def client(folder):
  return client_of(make_pages(folder))


def opened(client, name="scan.nii.gz"):
  answer = client.post(f"{V1}/volumes", json={"file": name})
  assert answer.status_code == 200, answer.text
  return answer.json()


def ended(client, volume, kind, asked):
  answer = client.post(f"{V1}/volumes/{volume}/{kind}", json=asked)
  assert answer.status_code == 202, answer.text
  job, until = answer.json(), time.monotonic() + 120
  while job["state"] in ("queued", "running") and time.monotonic() < until:
    time.sleep(0.02)
    job = client.get(f"{V1}/jobs/{job['job']}").json()
  return job


def label_map(client, volume):
  answer = client.get(f"{V1}/volumes/{volume}/labels")
  return np.load(io.BytesIO(answer.content), allow_pickle=False)


def exported(client, volume):
  content = client.get(f"{V1}/volumes/{volume}/export/nii.gz").content
  return nib.Nifti1Image.from_bytes(gzip.decompress(content))


def test_the_document_says_every_route_what_it_wants_and_how_it_fails(client):
  document = client.get(f"{V1}/openapi.json").json()
  assert document["openapi"].startswith("3.")
  known = document["components"]["schemas"]
  refs = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
  assert refs <= set(known)
  names = set()
  for methods in document["paths"].values():
    for operation in methods.values():
      names.add(operation["operationId"])
      assert operation["description"] and operation["security"] == [{"HTTPBearer": []}]
      assert "422" not in operation["responses"]
      for status in ("400", "401", "404", "413"):
        schema = operation["responses"][status]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith("/Error")
  assert names == {
    "server", "open", "upload", "volume", "close", "image", "labels", "values", "label_map",
    "open_labels", "upload_labels", "track", "segment", "details", "export", "job", "cancel"}
  assert "path" in known["Line"]["properties"] and known["Error"]["required"] == ["error"]


def test_every_refusal_is_json_with_one_line(client):
  volume = opened(client)["volume"]
  asked = [
    client.get(f"{V1}/nothing"), client.put(f"{V1}/volumes"), client.get(f"{V1}/jobs/none"),
    client.get(f"{V1}/volumes/{volume}/labels/{'9' * 5000}"),
    client.get(f"{V1}/volumes/{volume}/details"),
    client.post(f"{V1}/volumes/{volume}/segment", json={}),
    client.post(f"{V1}/volumes", content=b'{"file": "scan.nii.gz"}'),
    client.post(f"{V1}/volumes", json={"file": "scan.nii.gz", "more": 1}),
    client.get(f"{V1}/server", headers={"Authorization": "Bearer no"}),
    client.get(f"{V1}/server", headers={"Host": "evil.example", "Authorization": "Bearer no"}),
  ]
  assert [a.status_code for a in asked] == [404, 405, 404, 404, 404, 400, 400, 400, 401, 421]
  for answer in asked:
    assert set(answer.json()) == {"error"} and "\n" not in answer.json()["error"]
  assert "application/json" in asked[6].json()["error"]
  assert asked[8].headers["www-authenticate"] == "Bearer"


def test_the_key_opens_by_any_name_and_the_token_by_this_servers_alone(folder):
  pages = make_pages(folder)

  def status(client, path=f"{V1}/server", **headers):
    return client.get(path, headers=headers).status_code

  program, page = client_of(pages), client_of(pages, secret=TOKEN)
  assert status(program) == status(page) == status(program, host="gpu.example") == 200
  assert status(page, host="gpu.example") == 421
  # A page elsewhere has no key; a proxy with TLS has the name that the browser knows.
  assert status(program, origin="http://evil.example") == 403
  assert status(page, origin="https://127.0.0.1:8765") == 200
  for wrong in ("", "Bearer", "Bearer ", f"Basic {KEY}", f"Bearer {KEY}x", f"bearer{KEY}"):
    assert status(program, authorization=wrong) == 401
  keyless = TestClient(make_app(pages, "127.0.0.1", TOKEN), "http://127.0.0.1:8765")
  assert status(keyless, authorization="Bearer None") == 401
  assert status(keyless, authorization=f"Bearer {TOKEN}") == 200


def test_a_prompt_is_the_same_in_every_space_and_the_array_has_the_files_axes(client, folder):
  affine = np.array(opened(client)["affine"])
  np.testing.assert_allclose(affine, nib.load(folder / "scan.nii.gz").affine, atol=1e-5)
  # On one axial slice; axes of the file are A, L (tilted), S: canonical (z, y, x) = (k, 29 - i, j).
  corners, point = np.array([[4.0, 6, 5], [11, 13, 5]]), np.array([[8.0, 9, 5]])

  def asked(place, space):
    (a, b), (p,) = (place(rows).tolist() for rows in (corners, point))
    return {"space": space, "prompts": [{"label": 7, "box": [a, b], "points": [[*p, True]]}]}

  def canonical(rows):
    return np.stack([rows[:, 2], 29 - rows[:, 0], rows[:, 1]], axis=1)

  found = []
  for space, place in (
    ("ijk", lambda rows: rows), ("zyx", canonical),
    ("ras", lambda rows: nib.affines.apply_affine(AFFINE, rows)),
  ):
    volume = opened(client)["volume"]
    assert ended(client, volume, "track", asked(place, space))["state"] == "done"
    found.append(label_map(client, volume))
  assert set(np.unique(found[0])) == {0, 7} and found[0].shape == (30, 26, 11)
  np.testing.assert_array_equal(found[0], found[1])
  np.testing.assert_array_equal(found[0], found[2])
  np.testing.assert_array_equal(found[0], np.asarray(exported(client, volume).dataobj))
  plain = client.get(f"{V1}/volumes/{volume}/labels", headers={"Accept-Encoding": "identity"})
  np.testing.assert_array_equal(np.load(io.BytesIO(plain.content)), found[0])
  assert client.get(f"{V1}/volumes/{volume}").json()["structures"] == [
    {"label": 7, "name": "label 7"}]


def test_a_line_is_four_points_along_it(client):
  line = {"path": [[8, 2, 5], [8, 10, 5], [16, 10, 5]], "inside": True}  # 16 voxels long
  points = [[8, 4, 5, 1], [8, 8, 5, 1], [10, 10, 5, 1], [14, 10, 5, 1]]
  dot = {"path": [[20, 20, 5]], "inside": False}
  found = []
  for prompt in ({"lines": [line, dot]}, {"points": [*points, [20, 20, 5, 0]]},
                 {"points": [points[0], [20, 20, 5, 0]]}):
    volume = opened(client)["volume"]
    assert ended(client, volume, "track", {"prompts": [{"label": 1, **prompt}]})["state"] == "done"
    found.append(label_map(client, volume))
  np.testing.assert_array_equal(found[0], found[1])
  assert (found[0] != found[2]).any()


def test_slices_of_every_plane_hold_what_the_file_holds(client, folder):
  volume = opened(client)["volume"]
  canonical = load_image(folder / "scan.nii.gz").array[0]
  for plane, axis, number in (("axial", 0, 4), ("coronal", 1, 20), ("sagittal", 2, 25)):
    at = f"{V1}/volumes/{volume}/values/{number}?plane={plane}"
    values = np.frombuffer(client.get(at).content, "<f4")
    np.testing.assert_array_equal(values, canonical.take(number, axis).ravel())
    image = np.frombuffer(client.get(at.replace("values", "image")).content, np.uint8)
    assert np.all(np.diff(image[np.argsort(values)].astype(int)) >= 0)  # windowed, in one order
  assert client.get(f"{V1}/volumes/{volume}/labels/11").status_code == 404
  assert client.get(f"{V1}/volumes/{volume}/labels/11?plane=coronal").status_code == 200


def test_a_mask_of_pieces_is_that_of_track_and_may_be_corrected(client, folder):
  prompts = [{"label": 3, "mask": [[[4, 6, 5], [11, 9, 5]], [[6, 13, 5], [8, 10, 5]]]},
             {"label": 3, "round": 1, "points": [[20, 20, 7, 0]]}]
  volume = opened(client)["volume"]
  assert ended(client, volume, "track", {"prompts": prompts})["state"] == "done"
  read = load_image(folder / "scan.nii.gz")
  native = np.zeros((30, 26, 11), bool)
  native[4:12, 6:10, 5] = native[6:9, 10:14, 5] = True
  found = PromptedVolume(MODEL, drawn(), read).track([
    VoxelPrompt(3, mask=read.geometry.to_canonical(native)),
    VoxelPrompt(3, points=((7.0, 9.0, 20.0, False),), round=1)])
  np.testing.assert_array_equal(label_map(client, volume), read.geometry.to_native(found.labels))
  for wrong, says in (({"mask": [[[0, 0, 0], [30, 0, 0]]]}, "outside"),
                      ({**prompts[0], "points": [[1, 1, 5, 1]]}, "besides")):
    answer = client.post(f"{V1}/volumes/{volume}/track", json={"prompts": [{"label": 1, **wrong}]})
    assert answer.status_code == 400 and says in answer.json()["error"]
  many = client.post(f"{V1}/volumes/{volume}/track", json={"prompts": [prompts[0]] * 33})
  assert many.status_code == 400 and "32 masks" in many.json()["error"]


def test_a_label_map_is_opened_and_its_structures_replaced(client, folder, tmp_path):
  labels = np.zeros((30, 26, 11), np.uint8)
  labels[4:12, 6:14, 2:9], labels[20:25, 15:20, 3:6] = 1, 200
  nib.save(nib.Nifti1Image(labels, AFFINE), folder / "labels.nii.gz")
  volume = opened(client)["volume"]
  at = f"{V1}/volumes/{volume}/labels"
  told = client.post(at, json={"file": "labels.nii.gz"})
  assert told.status_code == 200, told.text
  assert [s["label"] for s in told.json()["structures"]] == [1, 200]
  np.testing.assert_array_equal(label_map(client, volume), labels)
  assert client.get(f"{V1}/volumes/{volume}/details").status_code == 404
  prompts = [{"label": 200, "box": [[19, 14, 4], [25, 20, 4]]}]
  assert ended(client, volume, "track", {"prompts": prompts})["state"] == "done"
  corrected = label_map(client, volume)
  ours = corrected == 200
  assert (ours != (labels == 200)).any()
  np.testing.assert_array_equal(corrected[~ours], np.where(labels == 200, 0, labels)[~ours])
  sent = client.put(f"{at}?name=mine.nii.gz", content=(folder / "labels.nii.gz").read_bytes())
  assert sent.status_code == 200
  np.testing.assert_array_equal(label_map(client, volume), labels)

  nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / "elsewhere.nii.gz")
  nib.save(nib.Nifti1Image(labels.astype(np.uint16) + 200, AFFINE), folder / "large.nii.gz")
  for name, says in (("elsewhere.nii.gz", "different space"), ("large.nii.gz", "from 1 to 255"),
                     ("scan.nii.gz", "scan.nii.gz: "), ("../labels.nii.gz", "is no volume")):
    answer = client.post(at, json={"file": name})
    assert answer.status_code == 400 and says in answer.json()["error"], answer.text
    assert str(tmp_path) not in answer.text and "/tmp" not in answer.text
  assert client.put(f"{at}?name=x.txt", content=b"0").status_code == 400
  assert client.put(f"{at}?name=x.nii", content=b"0" * ((1 << 20) + 1)).status_code == 400
  np.testing.assert_array_equal(label_map(client, volume), labels)


def test_a_closed_volume_is_forgotten(client):
  volume = opened(client)["volume"]
  assert client.delete(f"{V1}/volumes/{volume}").status_code == 204
  assert client.get(f"{V1}/volumes/{volume}").status_code == 404


@pytest.fixture(scope="module")
def model(tiny_run):
  from rfmedsam2_jax.model import load
  return load(tiny_run)


def test_automatic_segmentation_is_what_predict_writes_and_prompts_replace_theirs(
  model, phantoms, tiny_run, tmp_path
):
  from rfmedsam2_jax.cli import main
  from rfmedsam2_jax.serve.automatic import by_name

  scan = sorted((phantoms / "imagesTs").iterdir())[0]
  assert main(["predict", str(tiny_run), str(scan), "--out", str(tmp_path)]) == 0
  predicted = np.asarray(nib.load(next(tmp_path.glob("*.nii.gz"))).dataobj)
  client = client_of(make_pages(phantoms / "imagesTs", by_name([model])))
  told = client.get(f"{V1}/server").json()["models"]
  assert told[0]["name"] == "tiny" and told[0]["structures"]
  volume = opened(client, scan.name)["volume"]
  asked = {"model": "tiny"}
  assert ended(client, volume, "segment", asked)["state"] == "done"
  first = label_map(client, volume)
  np.testing.assert_array_equal(first, predicted)
  assert client.get(f"{V1}/volumes/{volume}").json()["structures"] == told[0]["structures"]
  details = client.get(f"{V1}/volumes/{volume}/details").json()
  assert set(details["structures"]) == {s["name"] for s in told[0]["structures"]}

  # A box of one structure: the others stay.
  present = [s["label"] for s in told[0]["structures"] if (first == s["label"]).any()]
  label = present[0]
  across = int(np.abs(np.array(opened(client, scan.name)["affine"])[2, :3]).argmax())
  box = np.array([[2, 2, 2], np.array(first.shape) // 2])
  box[:, across] = first.shape[across] // 2
  done = ended(client, volume, "track", {"prompts": [{"label": label, "box": box.tolist()}]})
  assert done["state"] == "done", done
  second = label_map(client, volume)
  tracked = second == label
  assert (tracked != (first == label)).any()
  np.testing.assert_array_equal(second[~tracked], np.where(first == label, 0, first)[~tracked])
  for wrong, says in (({"model": "x"}, "choose from tiny"), ({"structures": ["x"]}, "x"),
                      ({"min_volume": -1}, "min_volume")):
    answer = client.post(f"{V1}/volumes/{volume}/segment", json=wrong)
    assert answer.status_code == 400 and says in answer.json()["error"]


def test_models_that_the_server_cannot_run_are_one_line(model):
  import dataclasses

  from rfmedsam2_jax.serve.automatic import by_name

  plan = model.plan
  two = dataclasses.replace(plan, channels=(*plan.channels, *plan.channels))
  large = dataclasses.replace(plan, labels=Labels((Structure("far", (300,)),), False, (300,)))
  for plans, says in (([two], "channels"), ([large], "300"), ([plan, plan], "two models")):
    with pytest.raises(UserError, match=says):
      by_name([dataclasses.replace(model, plan=p) for p in plans])
