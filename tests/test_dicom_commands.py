"""DICOM through commands and the page: a study in, segmentations and outlines out and in."""

import json
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from small_sam2 import MODEL, SMALL, drawn
from tests_data import save_series

from rfmedsam2_jax.cli import main
from rfmedsam2_jax.config import load_config, parse_config
from rfmedsam2_jax.data.formats import FORMAT_ENDINGS
from rfmedsam2_jax.data.segmentations import write_segmentation
from rfmedsam2_jax.data.segments import load_by_name, segments_of
from rfmedsam2_jax.data.volumes import load_image, load_label_map
from rfmedsam2_jax.tracking import TrackingConfig
from rfmedsam2_jax.weights.checkpoint import save_checkpoint

DICOM = [form for form in FORMAT_ENDINGS if form.startswith("dicom")]


def run(capsys, *arguments) -> tuple[int, str, str]:
  status = main([str(a) for a in arguments])
  captured = capsys.readouterr()
  return status, captured.out, captured.err


@pytest.fixture(scope="module")
def study(phantoms, tmp_path_factory):
  """A study with a CT and a localizer in folders, the same packed, and the CT as NIfTI."""
  place = tmp_path_factory.mktemp("dicom")
  scan = sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0]
  image = sitk.ReadImage(str(scan))
  (place / "patient").mkdir()
  save_series(place / "patient" / "ct", image)
  save_series(place / "patient" / "localizer", image[:, :, :3], series="1.2.4")
  for file in (place / "patient" / "localizer").iterdir():
    one = pydicom.dcmread(file)
    one.Modality = "DX"
    one.save_as(file)
  shutil.make_archive(str(place / "packed"), "zip", place / "patient")
  shutil.copy(scan, place / "patient.nii.gz")
  return place


def test_predictions_are_the_same_in_every_format(tiny_run, study, tmp_path, capsys):
  status, _, error = run(capsys, "predict", tiny_run, study / "patient.nii.gz", "--out",
                         tmp_path / "nifti")
  assert status == 0, error
  truth = load_label_map(tmp_path / "nifti" / "patient.nii.gz",
                         load_image(study / "patient.nii.gz").geometry)
  assert truth.any(), "nothing was segmented"
  series = load_image(study / "patient" / "ct").geometry
  for form in DICOM:
    status, _, error = run(
      capsys, "predict", tiny_run, study / "patient", "--series", "ct", "--out", tmp_path / form,
      "--format", form, *(["--save-stages"] if form == "dicom-seg" else []))
    assert status == 0, error
    path = tmp_path / form / f"patient{FORMAT_ENDINGS[form]}"
    found = load_by_name(path, series, {})
    np.testing.assert_array_equal(found, truth)
    said = json.loads((tmp_path / form / "patient.json").read_text())
    assert said["files"]["labels"] == path.name
    status, table, error = run(capsys, "evaluate", path, tmp_path / "nifti" / "patient.nii.gz",
                               "--labels", tiny_run)
    assert status == 0 and "1.0000" in table, error
  assert (tmp_path / "dicom-seg" / "stage1" / "patient.seg.dcm").exists()
  status, table, error = run(capsys, "evaluate", tmp_path / "dicom-rtstruct" /
                             "patient.rtstruct.dcm", tmp_path / "dicom-seg" / "patient.seg.dcm")
  assert status == 0 and table.count("1.0000") >= 2, error
  status, _, error = run(capsys, "evaluate", tmp_path / "dicom-rtstruct",
                         tmp_path / "dicom-rtstruct")
  assert status == 2 and "is a structure set, which has outlines and no voxels" in error


def test_the_runs_modality_chooses_in_an_archive_and_it_is_said(tiny_run, study, tmp_path, capsys):
  status, _, error = run(capsys, "predict", tiny_run, study / "packed.zip", "--out", tmp_path,
                         "--format", "dicom-seg")
  assert status == 0, error
  assert "of 2 series the one of CT is taken" in error
  written = pydicom.dcmread(tmp_path / "packed.seg.dcm")
  algorithm = written.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
  assert algorithm.AlgorithmParameters == f"runs={tiny_run.name}"


@pytest.mark.parametrize("form", DICOM)
def test_what_is_no_dicom_is_refused_before_anything_is_computed(
    tiny_run, study, tmp_path, capsys, form):
  status, _, error = run(capsys, "predict", tiny_run, study / "patient.nii.gz", "--out",
                         tmp_path / "out", "--format", form)
  assert status == 2 and error.count("\n") == 1
  assert "patient.nii.gz: is not DICOM, and only what was read from DICOM can be" in error
  status, _, error = run(capsys, "track", study / "patient.nii.gz", "--out", tmp_path / "out",
                         "--box", "1:1,1,1,5,5", "--format", form)
  assert status == 2 and error.splitlines()[-1].count("was not read from DICOM") == 1
  assert not (tmp_path / "out").exists()


def test_without_highdicom_the_line_names_the_extra(tiny_run, study, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
  status, _, error = run(capsys, "predict", tiny_run, study / "patient", "--series", "CT", "--out",
                         tmp_path / "out", "--format", "dicom-seg")
  assert status == 2 and "needs highdicom; install it: pip install 'rfmedsam2-jax[dicom]'" in error


def test_a_series_that_is_not_there_is_refused_with_those_that_are(study, tmp_path, capsys):
  for more in ((), ("--series", "7")):
    status, _, error = run(capsys, "track", study / "patient", "--out", tmp_path / "out", "--box",
                           "1:1,1,1,5,5", *more)
    assert status == 2 and "(CT, " in error and "(DX, 3 files, 1.2.4)" in error
  assert not (tmp_path / "out").exists()


def test_masks_of_a_segmentation_are_followed_into_a_structure_set(study, tmp_path, capsys):
  save_checkpoint(tmp_path / "small", SMALL, drawn(), {"source": "drawn"})
  series = load_image(study / "patient" / "ct").geometry
  labels = np.zeros(series.canonical_shape, np.uint8)
  labels[3, 4:12, 4:12] = 3
  write_segmentation(tmp_path / "drawn.seg.dcm", labels, series, {3: "liver"})
  status, _, error = run(
    capsys, "track", study / "patient", "--series", "1.2.3", "--checkpoint", tmp_path / "small",
    "--out", tmp_path / "out", "--masks", tmp_path / "drawn.seg.dcm", "--format", "dicom-rtstruct")
  assert status == 0, error
  path = tmp_path / "out" / "patient.rtstruct.dcm"
  assert [(s.name, s.value) for s in segments_of(path)] == [("liver", 3)]
  found = load_by_name(path, series, {})
  assert (found[3] == labels[3]).mean() > 0.9
  roi = pydicom.dcmread(path).StructureSetROISequence[0]
  assert roi.ROIGenerationAlgorithm == "SEMIAUTOMATIC"


def test_codes_of_a_config_are_read_strictly(tmp_path, capsys):
  config = parse_config({"inference": {"codes": {"chiasm": "SCT 244453006 Optic chiasm"}}})
  assert config.inference.codes == {"chiasm": "SCT 244453006 Optic chiasm"}
  (tmp_path / "config.yaml").write_text("inference: {codes: {chiasm: optic}}\n")
  with pytest.raises(Exception, match="'optic' is no code; give scheme, value and meaning"):
    load_config(tmp_path / "config.yaml")


def test_the_page_opens_an_archive_and_saves_dicom(study, tmp_path):
  pytest.importorskip("fastapi", reason="pip install 'rfmedsam2-jax[serve]'")
  from starlette.testclient import TestClient

  from rfmedsam2_jax.serve.api import Pages
  from rfmedsam2_jax.serve.app import make_app
  from rfmedsam2_jax.serve.studio import Studio

  studio = Studio(MODEL, drawn(), TrackingConfig(), keep=4, max_voxels=10**6)
  client = TestClient(make_app(Pages(studio, study, 1 << 24, "small"), "127.0.0.1", "t0ken"),
                      "http://127.0.0.1:8765", headers={"Authorization": "Bearer t0ken"})
  assert {"patient.nii.gz", "patient/ct", "packed.zip"} <= set(client.get("/api/v1/server").json()[
    "files"])
  shutil.make_archive(str(tmp_path / "ct"), "zip", study / "patient" / "ct")
  sent = client.post("/api/v1/uploads?name=ct.zip", content=(tmp_path / "ct.zip").read_bytes())
  assert sent.status_code == 200, sent.text
  nifti = client.post("/api/v1/volumes", json={"file": "patient.nii.gz"}).json()["volume"]
  several = client.post("/api/v1/volumes", json={"file": "packed.zip"})
  assert several.status_code == 400 and "packed.zip: has 2 series" in several.json()["error"]
  # Which one it is may be said.
  chosen = client.post("/api/v1/volumes", json={"file": "packed.zip", "series": "CT"}).json()
  packed = (study / "packed.zip").read_bytes()
  also = client.post("/api/v1/uploads?name=packed.zip&series=CT", content=packed).json()
  assert chosen["shape"] == also["shape"] == sent.json()["shape"]
  for volume in (sent.json()["volume"], nifti):
    prompt = {"label": 2, "box": [[3, 4, 4], [3, 12, 12]]}
    asked = {"prompts": [prompt], "space": "zyx"}
    job = client.post(f"/api/v1/volumes/{volume}/track", json=asked).json()["job"]
    while (state := client.get(f"/api/v1/jobs/{job}").json()["state"]) in ("queued", "running"):
      pass
    assert state == "done"
  labels = client.get(f"/api/v1/volumes/{nifti}/export/nii.gz").content
  (tmp_path / "labels.nii.gz").write_bytes(labels)
  expected = np.asarray(nib.load(tmp_path / "labels.nii.gz").dataobj)
  for form in DICOM:
    kind = FORMAT_ENDINGS[form][1:]
    saved = client.get(f"/api/v1/volumes/{sent.json()['volume']}/export/{kind}")
    (tmp_path / kind).write_bytes(saved.content)
    like = load_image(study / "patient.nii.gz").geometry
    found = like.to_native(load_by_name(tmp_path / kind, like, {}))
    np.testing.assert_array_equal(found, expected)
    refused = client.get(f"/api/v1/volumes/{nifti}/export/{kind}")
    assert refused.status_code == 400 and "patient.nii.gz: was not read" in refused.json()["error"]
