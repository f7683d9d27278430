"""The folder that `rfmedsam2 report` writes, and the fetch of its viewer."""

import base64
import gzip
import hashlib
import http.server
import io
import json
import re
import sys
import tarfile
import threading

import nibabel as nib
import numpy as np
import pydantic
import pytest
from tests_data import ORIENTATIONS, reoriented

from rfmedsam2_jax.cli import main
from rfmedsam2_jax.data.volumes import load_image
from rfmedsam2_jax.report import niivue
from rfmedsam2_jax.report.layers import thinning, viewer_layers
from rfmedsam2_jax.report.plots import box_plot
from rfmedsam2_jax.report.predictions import CaseFile

EVIL = "<script>alert(1)<_script>'&"
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def save(path, array, affine=AFFINE):
  path.parent.mkdir(parents=True, exist_ok=True)
  nib.save(nib.Nifti1Image(array, affine), path)


def case_json(shape, structures, warnings=(), inputs=("scan.nii.gz",)):
  """CASE.json as predict writes it; structures: name to (label, first and last corner of a box)."""
  return {
    "case": "x", "inputs": list(inputs), "runs": ["run"], "shape": list(shape),
    "spacing_mm": [2.0, 2.0, 3.0], "slice_axis": 2, "stages": 2, "files": {},
    "warnings": [{"kind": "stages", "message": text} for text in warnings],
    "structures": {
      name: {
        "label": label, "volume_ml": 1.5, "presence": 0.9, "predicted_iou": iou,
        "probability": 0.8,
        "stages": [
          {"stage": n, "volume_ml": 1.5, "predicted_iou": iou if n else None, "presence": None,
           "dice_with_last": 1.0} for n in range(2)
        ],
        "boxes": [{"slice": 2, "box": box, "predicted_iou": iou, "presence": 0.9}],
      } for name, (label, box, iou) in structures.items()
    },
  }


@pytest.fixture
def folders(tmp_path):
  """Three cases: one good, one bad with a hostile name, one without reference and CASE.json."""
  shape = (12, 10, 6)
  truth = np.zeros(shape, np.uint8)
  truth[2:8, 2:8, 1:5] = 1
  truth[9:11, 2:8, 1:5] = 7
  bad = np.zeros(shape, np.uint8)
  bad[2:5, 2:8, 1:5] = 1
  image = np.arange(truth.size, dtype=np.int16).reshape(shape)
  structures = {"liver": (1, [2, 2, 7, 7], 0.9), "<b>bone</b>": (7, [9, 2, 10, 7], 0.4)}
  for name, labels in (("good", truth), (EVIL, bad)):
    save(tmp_path / "pred" / f"{name}.nii.gz", labels)
    for stage in range(2):
      save(tmp_path / "pred" / f"stage{stage}" / f"{name}.nii.gz", labels if stage else truth)
    save(tmp_path / "ref" / f"{name}.nii.gz", truth)
    save(tmp_path / "images" / f"{name}_0000.nii.gz", image)
    warnings = ["the stages <i>disagree</i>"] if name == EVIL else []
    content = case_json(shape, structures, warnings, (f"{name}_0000.nii.gz",))
    (tmp_path / "pred" / f"{name}.json").write_text(json.dumps(content))
  save(tmp_path / "pred" / "lonely.nii.gz", truth)
  return tmp_path


def report(folder, *arguments):
  out = ["--out", str(folder / "report")]
  return main(["report", str(folder / "pred"), *out, *map(str, arguments)])


def payload(folder, name):
  (path,) = (p for p in (folder / "report" / "volumes").glob("*.js") if p.stem.endswith(name))
  text = path.read_text("utf-8").removeprefix("window.reportCase = ").removesuffix(";\n")
  return json.loads(text)


def volume(layer):
  return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(layer["data"])))


def test_scores_are_those_of_evaluate_and_the_worst_case_is_first(folders, monkeypatch, capsys):
  monkeypatch.setattr(niivue, "bundle", lambda: niivue._FOLDER / niivue.LICENSE)
  (folders / "pred" / "lonely.nii.gz").unlink()
  assert report(folders, "--ref", folders / "ref", "--images", folders / "images") == 0
  found = json.loads((folders / "report" / "report.json").read_text("utf-8"))
  assert found["scores"]["cases"]["good"]["liver"]["dice"] == 1
  values = folders / "scores.json"
  both = [str(folders / "pred"), str(folders / "ref")]
  assert main(["evaluate", *both, "--scores", str(values)]) == 0
  theirs = json.loads(values.read_text("utf-8"))["cases"][EVIL]
  assert found["scores"]["cases"][EVIL] == {"liver": theirs["1"], "<b>bone</b>": theirs["7"]}
  assert [case["case"] for case in found["cases"]] == [EVIL, "good"]
  index = (folders / "report" / "index.html").read_text("utf-8")
  assert index.index("1-_script_alert_1_") < index.index("2-good")
  # The generator had it right: the stages' table says so.
  assert re.search(r"Dice after every stage.*?1\.000.*?0\.667", index, re.S)


def test_names_and_messages_are_text_and_nothing_else(folders):
  assert report(folders, "--ref", folders / "ref") == 0
  for page in folders.glob("report/**/*.html"):
    text = page.read_text("utf-8")
    assert "<script>alert" not in text and "<b>bone" not in text and "<i>disagree" not in text
    assert "&lt;script&gt;alert" in text
  assert "the stages &lt;i&gt;disagree" in (folders / "report" / "index.html").read_text("utf-8")
  for path in folders.glob("report/**/*"):
    assert re.fullmatch(r"[\w.-]+", path.name), path


def test_pages_load_nothing_from_elsewhere_and_every_link_has_its_file(folders):
  assert report(folders, "--ref", folders / "ref", "--images", folders / "images") == 0
  for page in folders.glob("report/**/*.html"):
    for link in re.findall(r'(?:src|href)="([^"]*)"', page.read_text("utf-8")):
      if link[0] != "#" and link != "data:,":
        assert (page.parent / link).is_file(), link
    assert str(folders) not in page.read_text("utf-8")


def test_volumes_are_the_files_and_stages_lie_beside(folders, monkeypatch):
  monkeypatch.setattr(niivue, "bundle", lambda: niivue._FOLDER / niivue.LICENSE)
  assert report(folders, "--ref", folders / "ref", "--images", folders / "images") == 0
  content = payload(folders, "good")
  layers = {layer["title"]: volume(layer) for layer in content["layers"]}
  assert list(layers) == [
    "image", "prediction (stage 1)", "reference", "generator", "boxes", "predicted IoU"
  ]
  image = nib.load(folders / "images" / "good_0000.nii.gz")
  # Both in the orientation of the page.
  np.testing.assert_array_equal(layers["image"].affine, image.affine)
  np.testing.assert_array_equal(layers["image"].get_fdata(), image.get_fdata())
  truth = nib.load(folders / "ref" / "good.nii.gz").get_fdata()
  shown = layers["prediction (stage 1)"].get_fdata()
  np.testing.assert_array_equal(shown, np.select([truth == 1, truth == 7], [1, 2]))
  boxes = layers["boxes"].get_fdata()
  assert np.argwhere(boxes == 1)[:, :2].min(0).tolist() == [2, 2]
  assert set(np.nonzero(boxes)[2]) == {2} and boxes[4, 4, 2] == 0 and boxes[7, 5, 2] == 1
  certainty = layers["predicted IoU"].get_fdata()
  assert certainty[4, 4, 2] == 91 and certainty[9, 4, 2] == 41 and certainty[4, 4, 3] == 0
  assert content["labels"][1]["slices"] == {"2": [0.4, 0.9]}
  assert content["exact"] and content["factors"] == [1, 1, 1]


@pytest.mark.parametrize("orientation", ORIENTATIONS[::7], ids=str)
def test_boxes_lie_around_their_structure_whatever_the_file_s_axes(tmp_path, orientation):
  labels = np.zeros((12, 10, 6), np.uint8)
  labels[2:8, 3:6, 2] = 1
  turned = reoriented(nib.Nifti1Image(labels, AFFINE), orientation)
  nib.save(turned, tmp_path / "x.nii.gz")
  native = np.asarray(turned.dataobj)
  at = np.argwhere(native)
  axis = int(np.flatnonzero(at.min(0) == at.max(0))[0])
  others = [a for a in range(3) if a != axis]
  box = [*at.min(0)[others].tolist(), *at.max(0)[others].tolist()]
  content = case_json(native.shape, {"liver": (1, box, 0.5)})
  content["structures"]["liver"]["boxes"][0]["slice"] = int(at[0, axis])
  details = pydantic.TypeAdapter(CaseFile).validate_python({**content, "slice_axis": axis})
  geometry = load_image(tmp_path / "x.nii.gz").geometry
  canonical = geometry.to_canonical(native)
  found = viewer_layers(geometry, {1: "liver"}, None, {"p": canonical}, details, 10**6)
  drawn = volume(found["layers"][2]).get_fdata()
  inside = volume(found["layers"][1]).get_fdata()
  corners = [np.argwhere(v) for v in (drawn, inside)]
  assert corners[0].min(0).tolist() == corners[1].min(0).tolist()
  assert corners[0].max(0).tolist() == corners[1].max(0).tolist()
  assert found["axis"] == int(np.flatnonzero(corners[1].min(0) == corners[1].max(0))[0])


def test_large_volumes_are_thinned_in_place_and_the_page_is_told(tmp_path):
  array = np.zeros((40, 40, 10), np.uint8)
  array[20:, :, :] = 3
  save(tmp_path / "x.nii.gz", array)
  volume_ = load_image(tmp_path / "x.nii.gz")
  labels = volume_.array[0].astype(int)
  image = np.random.default_rng(0).normal(size=labels.shape).astype(np.float32)
  found = viewer_layers(volume_.geometry, {3: "bone"}, image, {"p": labels}, None, 5000)
  assert found["factors"] == (2, 2, 1) and not found["exact"]
  shown = volume(found["layers"][0])
  kept = image[:, ::2, ::2]
  np.testing.assert_allclose(shown.get_fdata(), kept.T, atol=2e-4)
  np.testing.assert_array_equal(shown.affine @ [10, 0, 0, 1], AFFINE @ [20, 0, 0, 1])
  assert thinning((4000, 4, 4), (1.0, 1.0, 1.0), 10**6) == (2, 1, 1)  # too long for a texture


def test_what_is_missing_or_damaged_is_said_and_the_rest_is_made(folders, monkeypatch, capsys):
  monkeypatch.setattr(niivue, "bundle", lambda: niivue._FOLDER / niivue.LICENSE)
  pred = folders / "pred"
  (pred / "good.json").write_text('{"shape": "no"}')
  (pred / f"{EVIL}.nii.gz").write_bytes(b"no volume")
  bad = case_json((12, 10, 6), {"liver": (1, [-(10**30), 10**30, 5, 5], float("nan"))})
  (pred / "nan.json").write_text(json.dumps(bad))
  save(pred / "nan.nii.gz", np.zeros((12, 10, 6), np.uint8))
  wild = {"liver": (1, [-(10**30), 10**30, 5, 5], 3e9), "new": (99, [0] * 4, 1)}
  bad = case_json((12, 10, 6), wild)
  (pred / "far.json").write_text(json.dumps(bad))
  save(pred / "far.nii.gz", np.zeros((12, 10, 6), np.uint8))
  save(pred / "image.nii.gz", np.arange(720 * 5).reshape(60, 10, 6).astype(np.int16))
  (pred / "lost.json").write_text(json.dumps({"case": "lost", "structures": {}}))
  assert report(folders, "--ref", folders / "ref", "--images", folders / "images") == 0
  said = capsys.readouterr().err
  index = (folders / "report" / "index.html").read_text("utf-8")
  for text in (
    "good.json: shape", "cannot be read as NIfTI", "lost: its label map is missing",
    "lonely: has no reference", "lonely: its image is not in the folder",
    "lonely: lonely.json: does not exist", "nan.json: has numbers that are not finite",
    "image.nii.gz: has 3600 values",
  ):
    assert text in said and text in index, text
  assert "Traceback" not in said and len(list(folders.glob("report/cases/*.html"))) == 7


@pytest.mark.parametrize("given, said", [
  (["empty"], "neither a run"), (["nowhere"], "not a folder"), (["pred", "pred"], "second folder"),
  (["pred", "--ref", "images"], "no label map of any case"),
  (["pred", "--ref", "nowhere"], "not a folder"), (["pred", "--max-voxels", "-1"], "max-voxels"),
  (["run", "--ref", "ref"], "belongs to predictions"),
])
def test_bad_input_is_one_line_and_writes_nothing(folders, capsys, given, said):
  (folders / "empty").mkdir()
  (folders / "run").mkdir()
  (folders / "run" / "config.yaml").write_text("seed: 0")
  before = sorted(folders.iterdir())
  places = [str(folders / part) if part[0].isalpha() else part for part in given]
  assert main(["report", *places, "--out", str(folders / "report")]) == 2
  error = capsys.readouterr().err
  assert said in error and error.count("\n") == 1
  assert sorted(folders.iterdir()) == before


def test_a_mistake_is_said_before_anything_is_loaded(folders, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "rfmedsam2_jax.report.folder", None)  # cannot be imported
  (folders / "report").mkdir()
  (folders / "report" / "report.json").write_text('{"made_by": "rfmedsam2 report 1"}')
  for given, said in (
    (["nowhere"], "is not a folder"), (["pred", "--images", "nowhere"], "is not a folder"),
    (["pred"], "choose another --out or replace it: --overwrite"),
  ):
    places = [str(folders / part) if part[0].isalpha() else part for part in given]
    assert main(["report", *places, "--out", str(folders / "report")]) == 2
    assert said in capsys.readouterr().err


def test_only_a_report_is_replaced_and_a_failed_one_leaves_the_old(folders, monkeypatch, capsys):
  out = ["--out", str(folders / "pred"), "--overwrite"]
  assert main(["report", str(folders / "pred"), *out]) == 2
  assert "is not a report" in capsys.readouterr().err and (folders / "pred" / "good.json").exists()
  assert report(folders) == 0
  old = (folders / "report" / "report.json").read_bytes()
  assert report(folders) == 2
  monkeypatch.setattr("rfmedsam2_jax.report.folder._write_pages", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    report(folders, "--overwrite")
  assert (folders / "report" / "report.json").read_bytes() == old
  monkeypatch.undo()
  (folders / "report" / "stale").touch()
  assert report(folders, "--ref", folders / "ref", "--overwrite") == 0
  assert not (folders / "report" / "stale").exists()
  assert not [path for path in folders.iterdir() if path.name.startswith(".")]


def test_an_unfinished_run_says_what_it_lacks(tmp_path, capsys):
  run = tmp_path / "run"
  run.mkdir()
  (run / "config.yaml").write_text("seed: 0")
  assert main(["report", str(run), "--out", str(tmp_path / "a")]) == 0
  index = (tmp_path / "a" / "index.html").read_text("utf-8")
  assert "No validation scores" in index and "No curves" in index and "plan.json" in index
  line = {"phase": "<x>", "step": 1, "loss": 2.0, "validation/stage0 $Dice": 0.5}
  (run / "log.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(line | {'step': 2})}\n{{")
  assert main(["report", str(run), "--out", str(tmp_path / "b")]) == 0
  index = (tmp_path / "b" / "index.html").read_text("utf-8")
  assert "&lt;x&gt;: training" in index and "currentColor" in index


def test_without_the_viewer_all_else_is_there_and_says_how_to_get_it(folders, monkeypatch, capsys):
  monkeypatch.setattr(niivue, "bundle", lambda: None)
  assert report(folders, "--ref", folders / "ref") == 0
  assert niivue.ADVICE in capsys.readouterr().err
  pages = list(folders.glob("report/cases/*.html"))
  assert len(pages) == 3
  texts = [page.read_text("utf-8") for page in pages]
  assert all(niivue.ADVICE in text and "viewer.js" not in text for text in texts)
  assert not (folders / "report" / "volumes").exists()


def test_a_box_plot_has_its_cases_in_order_and_its_outliers_outside():
  values = {"a": [("x", 0.9), ("y", 0.92), ("z", 0.91), ("w", 0.2), ("n", float("nan"))], "b": []}
  plot = box_plot("Dice", values, 1.0)
  (box,) = plot.boxes
  assert [case for case, _ in box.cases] == ["w", "x", "z", "y"]
  assert plot.x(box.cases[0][1]) == pytest.approx(0) and box.stats["med"] == pytest.approx(0.905)
  assert box.stats["whislo"] > box.cases[0][1] and plot.ticks[-1] == ("1", 1.0)
  assert box_plot("Dice", {"a": [("x", float("nan"))]}) is None
  plot = box_plot("HD95", {"a": [("x", 0.0)]})
  assert plot.x(plot.boxes[0].stats["med"]) == 0


def archive(content, name=niivue.MEMBER):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w:gz") as files:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    files.addfile(member, io.BytesIO(content))
  return buffer.getvalue()


def pin(monkeypatch, packed, content):
  digest = base64.b64encode(hashlib.sha512(packed).digest()).decode()
  monkeypatch.setattr(niivue, "INTEGRITY", f"sha512-{digest}")
  monkeypatch.setattr(niivue, "FILE_SHA256", hashlib.sha256(content).hexdigest())


def test_the_viewer_is_fetched_from_the_named_registry_and_kept_only_if_it_is_the_pinned_one(
  tmp_path, monkeypatch
):
  good, asked = archive(b"viewer"), []

  class Registry(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append(self.path)
      self.send_response(200)
      self.end_headers()
      self.wfile.write(good)

    def log_message(self, *_):
      pass

  server = http.server.HTTPServer(("127.0.0.1", 0), Registry)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/npm/")
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  try:
    with pytest.raises(ValueError, match="expected is sha512-YMjQ"):
      niivue.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []
    pin(monkeypatch, good, b"viewer")
    assert niivue.fetch(tmp_path).read_bytes() == b"viewer"
    assert asked == ["/npm/@niivue/niivue/-/niivue-0.69.0.tgz"] * 2
    niivue.fetch(tmp_path)
    assert len(asked) == 2  # it is there
  finally:
    server.shutdown()
  (tmp_path / niivue.FILE).write_bytes(b"changed")
  with pytest.raises(OSError):
    niivue.fetch(tmp_path, timeout=2)
  monkeypatch.setenv("npm_config_registry", "file:///etc")
  with pytest.raises(ValueError, match="not an address"):
    niivue.fetch(tmp_path)


@pytest.mark.parametrize("packed", [
  archive(b"x", "../../evil.js"), archive(b"x", "/tmp/evil.js"), b"no archive", archive(b"other"),
])
def test_an_archive_of_another_form_is_refused(monkeypatch, packed):
  pin(monkeypatch, packed, b"viewer")
  with pytest.raises(ValueError):
    niivue.unpack(packed)
