"""The commands as a user gives them: results on the input's grid, one clear line when wrong."""

import gzip
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from tests_data import ORIENTATIONS, reoriented, save_series

import rfmedsam2_jax
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.data.volumes import load_image, load_label_map


@pytest.fixture(scope="module")
def unseen(phantoms) -> Path:
  return sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0]


def run(capsys, *arguments) -> tuple[int, str, str]:
  status = main([str(a) for a in arguments])
  captured = capsys.readouterr()
  return status, captured.out, captured.err


def world(path: Path) -> np.ndarray:
  """The label map in RAS+ order, whatever way it is stored."""
  return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


def test_predict_writes_on_exactly_the_inputs_grid(tiny_run, unseen, tmp_path, capsys):
  image = nib.load(unseen)
  affine = image.affine.copy()
  affine[:3, 3] += (3.25, -7.5, 11.0)
  image = nib.Nifti1Image(np.asarray(image.dataobj), affine)
  image.set_qform(affine, 1)
  image.set_sform(affine, 4)
  image.header.set_xyzt_units("mm", "sec")
  nib.save(image, tmp_path / "scan.nii.gz")
  status, _, error = run(capsys, "predict", tiny_run, tmp_path / "scan.nii.gz", "--out",
                         tmp_path / "out", "--save-stages")
  assert status == 0, error
  for folder in ("", "stage0", "stage1", "stage2"):
    written = tmp_path / "out" / folder / "scan.nii.gz"
    found = nib.load(written)
    assert found.shape == image.shape and found.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(found.affine, nib.load(tmp_path / "scan.nii.gz").affine)
    assert (found.get_qform(coded=True)[1], found.get_sform(coded=True)[1]) == (1, 4)
    assert found.header.get_xyzt_units() == image.header.get_xyzt_units()
    before, after = (sitk.ReadImage(str(p)) for p in (tmp_path / "scan.nii.gz", written))
    assert before.GetSize() == after.GetSize()
    for what in ("GetOrigin", "GetSpacing", "GetDirection"):
      np.testing.assert_array_equal(getattr(before, what)(), getattr(after, what)())
  assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.parametrize("orientations", [
  # Every order of the axes is among them, and every set of flips.
  pytest.param(ORIENTATIONS[::5], id="ten"),
  pytest.param(ORIENTATIONS, id="all", marks=pytest.mark.full),
])
def test_all_orders_and_flips_are_segmented_alike_in_world_space(
  tiny_run, unseen, tmp_path, orientations
):
  model = rfmedsam2_jax.load(tiny_run)
  expected = None
  for number, orientation in enumerate(orientations):
    path, out = tmp_path / f"{number}.nii.gz", tmp_path / f"{number}_labels.nii.gz"
    nib.save(reoriented(nib.load(unseen), orientation), path)
    rfmedsam2_jax.segment_file(model, path, out)
    found = world(out)
    if expected is None:
      expected = found
      assert len(np.unique(expected)) > 1, "the tiny run must segment something"
    np.testing.assert_array_equal(found, expected)


def test_array_and_file_and_command_agree(tiny_run, unseen, tmp_path, capsys):
  model = rfmedsam2_jax.load(tiny_run)
  image = sitk.DICOMOrient(sitk.ReadImage(str(unseen)), "LPS")
  by_array = rfmedsam2_jax.segment(model, sitk.GetArrayFromImage(image), image.GetSpacing()[::-1])
  by_file = rfmedsam2_jax.segment_file(model, unseen)
  assert run(capsys, "predict", tiny_run, unseen, "--out", tmp_path)[0] == 0
  name = unseen.name.replace("_0000", "")
  np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / name).dataobj), by_file)
  lps = sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / name)), "LPS")
  np.testing.assert_array_equal(sitk.GetArrayFromImage(lps), by_array)


def test_several_runs_are_averaged(tiny_run, unseen, tmp_path, capsys):
  """The same run twice is that run once; probabilities are averaged, not labels."""
  assert run(capsys, "predict", tiny_run, unseen, "--out", tmp_path / "one")[0] == 0
  assert run(capsys, "predict", tiny_run, tiny_run, unseen, "--out", tmp_path / "two")[0] == 0
  name = unseen.name.replace("_0000", "")
  np.testing.assert_array_equal(world(tmp_path / "one" / name), world(tmp_path / "two" / name))


@pytest.fixture
def prompts_seen(monkeypatch):
  """The prompts of every volume that is refined; refinement itself runs as always."""
  from rfmedsam2_jax.segmentation import segmenter

  seen = []
  refine_volume = segmenter.refine_volume

  def record(model, params, config, slices, prompts, *rest):
    seen.append(prompts)
    return refine_volume(model, params, config, slices, prompts, *rest)

  monkeypatch.setattr(segmenter, "refine_volume", record)
  return seen


def liver_slice(truth) -> tuple[int, np.ndarray]:
  """The axial axis of a label file, and the liver's voxels [n, 3] on its middle slice."""
  voxels = np.argwhere(np.asarray(truth.dataobj) == 1)
  axial = int(np.flatnonzero(nib.io_orientation(truth.affine)[:, 0] == 2)[0])
  return axial, voxels[voxels[:, axial] == int(np.median(voxels[:, axial]))]


def test_oracle_prompts_are_the_true_boxes(
  tiny_run, phantoms, unseen, tmp_path, capsys, prompts_seen
):
  status, _, error = run(capsys, "predict", tiny_run, unseen, "--out", tmp_path,
                         "--prompts", "oracle", "--labels", phantoms / "labelsTs")
  assert status == 0, error
  (prompts,) = prompts_seen
  truth = nib.load(phantoms / "labelsTs" / unseen.name.replace("_0000", ""))
  axial, _ = liver_slice(truth)
  liver = np.asarray(truth.dataobj) == 1
  extent = np.ptp(np.argwhere(liver)[:, axial]) + 1
  assert abs(prompts.has_box[0].sum() - extent * prompts.has_box.shape[1] / liver.shape[axial]) <= 2
  np.testing.assert_array_equal(prompts.has_box, prompts.presence > 0)


def test_given_boxes_and_points_reach_their_slice(
  tiny_run, phantoms, unseen, tmp_path, capsys, prompts_seen
):
  name = unseen.name.replace("_0000.nii.gz", "")
  truth = nib.load(phantoms / "labelsTs" / f"{name}.nii.gz")
  axial, here = liver_slice(truth)
  corners = [here.min(axis=0).tolist(), here.max(axis=0).tolist()]
  given = tmp_path / "given.json"
  given.write_text(json.dumps({name: [
    {"structure": "liver", "box": corners},
    {"label": 1, "points": [[*here[0].tolist(), 1], [*here[-1].tolist(), 0]]},
  ]}))
  status, _, error = run(capsys, "predict", tiny_run, unseen, "--out", tmp_path / "out",
                         "--prompts", "given", "--given", given)
  assert status == 0, error
  (prompts,) = prompts_seen
  assert np.argwhere(prompts.given)[:, 0].tolist() == [0]  # the liver, on one slice
  box, labels = prompts.boxes[prompts.given][0], prompts.point_labels[prompts.given][0]
  plane = [axis for axis in range(3) if axis != axial]
  # Sides of the box as shares of the image, whatever the file's axes are.
  shares = sorted((here.max(axis=0) + 1 - here.min(axis=0))[a] / truth.shape[a] for a in plane)
  np.testing.assert_allclose(sorted((box[2:] + 1 - box[:2]) / 64), shares, rtol=1e-5)
  assert labels.tolist() == [1, 0]


def test_a_given_mask_is_kept_where_the_network_has_no_objection(
  tiny_run, phantoms, unseen, tmp_path, capsys
):
  """A residual network that learned nothing repeats the mask that a person drew."""
  name = unseen.name.replace("_0000.nii.gz", "")
  truth = nib.load(phantoms / "labelsTs" / f"{name}.nii.gz")
  _, here = liver_slice(truth)
  sparse = np.zeros(truth.shape, np.uint8)
  sparse[tuple(here.T)] = 1
  (tmp_path / "sparse").mkdir()
  nib.save(nib.Nifti1Image(sparse, truth.affine), tmp_path / "sparse" / f"{name}.nii.gz")
  status, _, error = run(capsys, "predict", tiny_run, unseen, "--out", tmp_path / "out",
                         "--prompts", "given", "--labels", tmp_path / "sparse")
  assert status == 0, error
  found = np.asarray(nib.load(tmp_path / "out" / f"{name}.nii.gz").dataobj)
  assert (found[tuple(here.T)] == 1).mean() > 0.8


def test_evaluate_prints_a_table_and_writes_json(phantoms, tmp_path, capsys):
  shutil.copytree(phantoms / "labelsTs", tmp_path / "pred")
  status, out, _ = run(capsys, "evaluate", tmp_path / "pred", phantoms / "labelsTs", "--labels",
                       phantoms)
  assert status == 0 and "liver" in out and "1.0000" in out
  scores = json.loads((tmp_path / "pred" / "scores.json").read_text("utf-8"))
  assert scores["mean"]["dice"] == 1.0 and len(scores["cases"]) == 2


def damaged(kind: str, unseen: Path, folder: Path) -> Path:
  """An input with something wrong, and where it lies."""
  image = nib.load(unseen)
  voxels = np.asarray(image.dataobj).astype(np.float32)
  path = folder / "bad.nii.gz"
  if kind == "missing":
    return path
  if kind == "truncated":
    path.write_bytes(unseen.read_bytes()[: unseen.stat().st_size // 2])
  elif kind == "4D":
    nib.save(nib.Nifti1Image(np.stack([voxels] * 3, axis=-1), image.affine), path)
  elif kind == "NaN":
    voxels[2, 3, 4] = np.nan
    nib.save(nib.Nifti1Image(voxels, image.affine), path)
  elif kind == "empty file":
    path.write_bytes(b"")
  elif kind == "not NIfTI":
    path.write_bytes(gzip.compress(b"hello" * 200))
  elif kind == "empty folder":
    (folder / "empty").mkdir()
    return folder / "empty"
  return path


@pytest.mark.parametrize(
  "kind, says",
  [
    ("missing", "no such file"),
    ("truncated", "truncated"),
    ("4D", "has 4 axes"),
    ("NaN", "NaN"),
    ("empty file", ""),
    ("not NIfTI", ""),
    ("empty folder", "has no volumes"),
  ],
)
def test_a_bad_input_is_one_line_and_leaves_nothing(tiny_run, unseen, tmp_path, capsys, kind, says):
  path = damaged(kind, unseen, tmp_path)
  # Quiet: after three seconds a slow machine's progress would be said, too.
  status, _, error = run(capsys, "predict", tiny_run, path, "--out", tmp_path / "out", "--quiet")
  assert status == 2
  assert error.startswith("rfmedsam2: ") and error.count("\n") == 1
  assert path.name in error and says in error
  assert not list((tmp_path / "out").rglob("*.nii.gz")) if (tmp_path / "out").exists() else True


def broken_dataset(kind: str, phantoms: Path, folder: Path) -> Path:
  data = folder / "data"
  shutil.copytree(phantoms, data)
  label = sorted((data / "labelsTr").iterdir())[0]
  image = nib.load(label)
  voxels = np.asarray(image.dataobj).copy()
  affine = image.affine.copy()
  if kind == "unknown label":
    voxels[0, 0, 0] = 77
  elif kind == "other space":
    affine[:3, 3] += 50.0
  nib.save(nib.Nifti1Image(voxels, affine), label)
  return data


@pytest.mark.parametrize(
  "kind, says", [("unknown label", "labels 77 are not in dataset.json"), ("other space", "space")]
)
def test_a_bad_label_is_one_line(phantoms, tiny_config, tmp_path, capsys, kind, says):
  data = broken_dataset(kind, phantoms, tmp_path)
  status, _, error = run(capsys, "train", tiny_config, f"data.dataset={data}", "--quiet", "--out",
                         tmp_path / "run")
  assert status == 2 and error.count("\n") == 1 and says in error and "labelsTr" in error


@pytest.mark.parametrize(
  "arguments, says",
  [
    (["train", "no_such.yaml", "--out", "x"], "no_such.yaml"),
    (["predict", "no_such_run", "scan.nii.gz", "--out", "x"], "no_such_run"),
    (["evaluate", "no_such", "nor_this"], "no_such"),
  ],
)
def test_paths_that_do_not_exist_are_named(tmp_path, monkeypatch, capsys, arguments, says):
  monkeypatch.chdir(tmp_path)
  status, _, error = run(capsys, *arguments)
  assert status == 2 and error.count("\n") == 1 and says in error
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "numbers.csv"])
def test_an_existing_prediction_is_not_lost(
  tiny_run, unseen, tmp_path, capsys, monkeypatch, name
):
  target = tmp_path / (name or unseen.name.replace("_0000", ""))
  target.write_text("mine")
  monkeypatch.delattr("rfmedsam2_jax.model.load")  # said before the networks are read
  status, _, error = run(capsys, "predict", tiny_run, unseen, "--out", tmp_path)
  assert status == 2 and "--overwrite" in error and target.read_text("utf-8") == "mine"


@pytest.mark.parametrize("arguments, says", [
  (["no_such.nii.gz"], "no such file"),
  (["SCAN", "--prompts", "oracle"], "--labels"),
  (["SCAN", "--prompts", "given"], "--given"),
  (["SCAN", "--given", "no_such.json"], "--prompts"),
  (["SCAN", "--prompts", "given", "--given", "no_such.json"], "no_such.json"),
  (["SCAN", "--prompts", "given", "--given", '{"scan": []}'], "case scan is not among the inputs"),
  (["SCAN", "--prompts", "given", "--given", '{"CASE": [{"structure": "nose"}]}'], "liver"),
  (["SCAN", "--prompts", "oracle", "--labels", "no_such"], "no_such"),
  (["SCAN", "--structures", "spleen,Lever"], "--structures Lever: is no structure of this model; "
   "the nearest known one is liver"),
  (["SCAN", "--structures", 'spleen, "kidney, left"'], "--structures kidney, left: is no"),
  (["SCAN", "--structures", ","], "--structures: names none"),
  (["SCAN", "--min-volume", "nan"], "--min-volume nan: is no volume"),
  (["SCAN", "--min-volume", "inf"], "--min-volume inf: is no volume"),
  (["SCAN", "--min-volume", "-0.1"], "--min-volume -0.1: is no volume"),
])
def test_a_mistake_is_said_before_the_networks_are_read(
  tiny_run, unseen, tmp_path, capsys, monkeypatch, arguments, says
):
  monkeypatch.delattr("rfmedsam2_jax.model.load")
  arguments = [unseen if a == "SCAN" else a for a in arguments]
  if arguments[-1] and str(arguments[-1]).startswith("{"):
    (tmp_path / "given.json").write_text(
      arguments[-1].replace("CASE", unseen.name.replace("_0000.nii.gz", "")))
    arguments[-1] = tmp_path / "given.json"
  status, _, error = run(capsys, "predict", tiny_run, *arguments, "--out", tmp_path / "out")
  assert status == 2 and error.count("\n") == 1 and says in error
  assert not (tmp_path / "out").exists()


def test_an_unfinished_run_says_how_to_finish_it(tiny_run, unseen, tmp_path, capsys):
  shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("params"))
  status, _, error = run(capsys, "predict", tmp_path / "run", unseen, "--out", tmp_path / "out")
  assert status == 2 and "resume its training" in error


def test_a_damaged_checkpoint_is_one_line(tiny_run, unseen, tmp_path, capsys):
  shutil.copytree(tiny_run, tmp_path / "run")
  for file in (tmp_path / "run" / "refiner" / "params").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  status, _, error = run(capsys, "predict", tmp_path / "run", unseen, "--quiet", "--out",
                         tmp_path / "out")
  assert status == 2 and error.count("\n") == 1 and "checkpoint" in error


def test_help_answers_without_loading_jax():
  code = (
    "import sys; from rfmedsam2_jax.cli import main\n"
    "try: main(['--help'])\nexcept SystemExit: pass\n"
    "assert 'jax' not in sys.modules, 'jax was imported'"
  )
  subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_there_are_48_orientations():
  assert len(ORIENTATIONS) == len(set(ORIENTATIONS)) == 6 * 8
  assert {order for order, _ in ORIENTATIONS} == set(itertools.permutations(range(3)))


def test_other_formats_get_the_same_label_map(tiny_run, phantoms, tmp_path, capsys):
  scan = sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0]
  image = sitk.ReadImage(str(scan))
  inputs = tmp_path / "in"
  inputs.mkdir()
  shutil.copy(scan, inputs / "nifti.nii.gz")
  sitk.WriteImage(image, str(inputs / "nrrd.nrrd"))
  save_series(inputs / "series", image)
  like = load_image(scan).geometry
  for form, ending in (("nifti", ".nii.gz"), ("nrrd", ".seg.nrrd")):
    out = tmp_path / form
    assert main(["predict", str(tiny_run), str(inputs), "--out", str(out), "--format", form]) == 0
    maps = [load_label_map(out / f"{name}{ending}", like) for name in ("nifti", "nrrd", "series")]
    for other in maps[1:]:
      np.testing.assert_array_equal(other, maps[0])
    assert maps[0].any(), "nothing was segmented"
  names = (out / "itksnap_labels.txt").read_text("utf-8")
  assert '"liver"' in names
  status, said, _ = run(capsys, "evaluate", tmp_path / "nrrd", tmp_path / "nifti")
  assert status == 0 and "1.0000" in said
