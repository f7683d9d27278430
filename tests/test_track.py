"""`rfmedsam2 track`: prompts of every form, on the input's grid, and one clear line when wrong."""

import json

import jax
import nibabel as nib
import numpy as np
import pytest
from small_sam2 import SMALL, drawn
from tests_data import ORIENTATIONS, reoriented

import rfmedsam2_jax
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.cli.prompt_options import parse_box, parse_point
from rfmedsam2_jax.data.volumes import load_image
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.prompted.files import result_paths
from rfmedsam2_jax.prompted.slice_frame import read_prompts
from rfmedsam2_jax.tracking import SlicePrompt, VolumeTracker, tracker
from rfmedsam2_jax.weights.checkpoint import load_checkpoint, save_checkpoint

SHAPE = (30, 26, 11)  # x, y, z of the scan


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp("checkpoint") / "small"
  save_checkpoint(folder, SMALL, drawn(), {"source": "drawn"})
  return folder


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
  """Two bright blocks in noise; RAS axes, uneven spacing, an origin."""
  rng = np.random.default_rng(0)
  voxels = rng.normal(0, 30, SHAPE)
  voxels[4:12, 6:14, 2:9] += 200
  voxels[16:26, 12:22, 4:11] += 120
  affine = np.diag([2.0, 2.5, 4.0, 1.0])
  affine[:3, 3] = -20, 15, 7
  path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
  nib.save(nib.Nifti1Image(voxels.astype(np.int16), affine), path)
  return path


def run(capsys, *arguments):
  status = main([str(a) for a in arguments])
  captured = capsys.readouterr()
  return status, captured.out, captured.err


def track(capsys, scan, checkpoint, out, *arguments):
  return run(capsys, "track", scan, "--checkpoint", checkpoint, "--out", out, *arguments)


def test_a_file_with_two_geometries_is_named_before_it_is_tracked(
  scan, checkpoint, tmp_path, capsys
):
  image = nib.load(scan)
  image.set_qform(image.affine, 1)
  image.set_sform(image.affine + np.pad([[100.0]], ((2, 1), (3, 0))), 4)
  nib.save(image, tmp_path / "two.nii.gz")
  status, _, error = track(capsys, tmp_path / "two.nii.gz", checkpoint, tmp_path / "out", "--world",
                           "--point", "1:107,-20,15,+")  # the sform's place, not the qform's
  assert status == 2 and "lies outside of two.nii.gz" in error
  assert "two.nii.gz: its qform and sform contradict each other by up to 100 mm" in error


BOXES = ("--box", "2:5,4,6,11,13", "--box", "7:8,16,12,25,21")


def test_weights_that_are_not_finite_follow_nothing(scan, tmp_path, capsys):
  params = jax.tree.map(np.array, drawn())
  params["memory_encoder"]["out_proj"]["bias"][0] = np.inf
  save_checkpoint(tmp_path / "bad", SMALL, params, {})
  status, _, error = track(capsys, scan, tmp_path / "bad", tmp_path / "out", *BOXES, "--quiet")
  assert status == 2 and error.count("\n") == 1
  assert "bad: memory_encoder/out_proj/bias has 1 of" in error and "NaN or infinite" in error
  assert not list((tmp_path / "out").iterdir())


def test_results_are_named_by_the_link_that_was_given(scan, checkpoint, tmp_path, capsys):
  (tmp_path / "VISIT_1.NII.GZ").symlink_to(scan)
  out = result_paths(tmp_path / "out", tmp_path / "VISIT_1.NII.GZ", False, "nifti")
  assert [path.name for path in out] == ["VISIT_1.nii.gz", "VISIT_1.json", "VISIT_1.png"]


def test_structures_are_followed_on_the_inputs_grid(scan, checkpoint, tmp_path, capsys):
  status, _, error = track(
    capsys, scan, checkpoint, tmp_path, *BOXES, "--point", "7:4,20,17,+", "--window", "40,400"
  )
  assert status == 0, error
  image, found = nib.load(scan), nib.load(tmp_path / "scan.nii.gz")
  assert found.shape == image.shape and found.get_data_dtype() == np.uint8
  np.testing.assert_array_equal(found.affine, image.affine)
  labels = np.asarray(found.dataobj)
  assert set(np.unique(labels)) == {0, 2, 7}
  scores = json.loads((tmp_path / "scan.json").read_text("utf-8"))["structures"]
  voxel_ml = 2.0 * 2.5 * 4.0 / 1000
  for value in (2, 7):
    volume = scores[str(value)]["volume_ml"]
    assert volume == pytest.approx((labels == value).sum() * voxel_ml, abs=1e-3)
  prompted = [s["slice"] for s in scores["7"]["slices"] if s["prompted"]]
  assert prompted == [4, 8]
  assert (tmp_path / "scan.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_every_order_and_flip_is_tracked_alike_in_world_space(scan, checkpoint, tmp_path, plane):
  box = {"axial": "1:27.5,-12,30,2,47", "coronal": "1:40,-12,15,2,39",
         "sagittal": "1:-4,30,15,47,39"}[plane]
  expected = None
  for number, orientation in enumerate(ORIENTATIONS[::5]):
    path = tmp_path / f"{number}.nii.gz"
    nib.save(reoriented(nib.load(scan), orientation), path)
    volume = load_image(path)
    prompted = rfmedsam2_jax.open_volume(checkpoint, volume, plane)
    found = prompted.track([parse_box(box, volume.geometry, plane, world=True)])
    rfmedsam2_jax.write_tracked(tmp_path / "out", volume, found)
    labels = nib.as_closest_canonical(nib.load(tmp_path / "out" / path.name))
    labels = np.asarray(labels.dataobj)
    expected = labels if expected is None else expected
    assert 0 < labels.mean() < 1
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("orientation", ORIENTATIONS[::11])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_voxels_millimetres_and_json_say_the_same(scan, tmp_path, orientation, plane):
  """A voxel of the scan, said in each way for a copy with other axes, is one place."""
  image = nib.load(scan)
  moved = reoriented(image, orientation)
  nib.save(moved, tmp_path / "moved.nii.gz")
  geometry = load_image(tmp_path / "moved.nii.gz").geometry
  world = (image.affine @ [9, 7, 5, 1])[:3]
  voxel = np.rint(np.linalg.inv(moved.affine) @ [*world, 1])[:3].astype(int)
  # The option names the file's axes by where they run.
  runs_along = {"xyz"[int(axis)]: int(index) for index, axis in
                zip(voxel, nib.io_orientation(moved.affine)[:, 0], strict=True)}
  order = {"axial": "zxy", "coronal": "yxz", "sagittal": "xyz"}[plane]
  by_voxel = ",".join(str(runs_along[axis]) for axis in order)
  by_world = ",".join(str(world["xyz".index(axis)]) for axis in order)
  (tmp_path / "prompts.json").write_text(json.dumps(
    [{"label": 3, "points": [[*map(int, voxel), 1]]}]
  ))
  (by_json,) = read_prompts(tmp_path / "prompts.json", geometry)
  expected = np.linalg.inv(geometry.canonical_affine) @ [*world, 1]
  for prompt in (
    parse_point(f"3:{by_voxel},+", geometry, plane),
    parse_point(f"3:{by_world},+", geometry, plane, world=True),
    by_json,
  ):
    assert prompt.label == 3
    np.testing.assert_allclose(prompt.points[0], [*expected[:3], True], atol=1e-3)


def test_a_sparse_label_map_prompts_with_masks(scan, checkpoint, tmp_path, capsys):
  """On the prompted slices, the result is what was drawn; others are followed."""
  image = nib.load(scan)
  drawn_masks = np.zeros(image.shape, np.uint8)
  drawn_masks[4:12, 6:14, 3] = drawn_masks[5:12, 7:14, 7] = 4
  nib.save(nib.Nifti1Image(drawn_masks, image.affine), tmp_path / "masks.nii.gz")
  status, _, error = track(
    capsys, scan, checkpoint, tmp_path / "out", "--masks", tmp_path / "masks.nii.gz"
  )
  assert status == 0, error
  labels = np.asarray(nib.load(tmp_path / "out" / "scan.nii.gz").dataobj)
  for z in (3, 7):
    # Through SAM's coarse square (16 cells) and back, borders move by a voxel.
    assert ((labels[..., z] == 4) == (drawn_masks[..., z] == 4)).mean() > 0.95
  assert (labels[..., 5] == 4).any()


def test_a_correction_reads_cached_features_and_changes_its_slice(scan, checkpoint, monkeypatch):
  encoded = []
  encode = tracker._encode

  def count(model, params, images):
    encoded.append(len(images))
    return encode(model, params, images)

  monkeypatch.setattr(tracker, "_encode", count)
  volume = load_image(scan)
  first = rfmedsam2_jax.VoxelPrompt(1, box=((5, 6, 4), (5, 13, 11)))
  later = rfmedsam2_jax.VoxelPrompt(1, points=((8.0, 10.0, 8.0, True), (8.0, 20.0, 25.0, False)))
  results = {}
  for cache in ("bfloat16", "none"):
    encoded.clear()
    config = rfmedsam2_jax.TrackingConfig(cache=cache)
    prompted = rfmedsam2_jax.open_volume(checkpoint, volume, config=config)
    before = prompted.track([first])
    calls = len(encoded)
    # No call sees more than a batch of slices, and no slice is encoded twice.
    assert max(encoded) == config.slices_per_batch and calls <= -(-SHAPE[2] // 4) + 2
    after = prompted.correct(before, [later])
    assert (len(encoded) == calls) == (cache == "bfloat16")
    assert (0, 8) in after.prompted
    assert (before.labels[8] != after.labels[8]).any()
    results[cache] = after
  # What lies in memory as bfloat16 has 8 bits of mantissa.
  agree = (results["bfloat16"].labels == results["none"].labels).mean()
  assert agree > 0.97


def test_a_correction_follows_what_it_changes_and_a_structure_may_begin_later(
  scan, checkpoint, monkeypatch
):
  Prompt = rfmedsam2_jax.VoxelPrompt
  prompted = rfmedsam2_jax.open_volume(checkpoint, load_image(scan))
  swept, arrived = [], {}
  sweep = tracker._sweep
  monkeypatch.setattr(
    tracker, "_sweep",
    lambda *args: swept.append(int(args[4].run.any(1).sum())) or sweep(*args)
  )
  first = [Prompt(7, box=((5, 6, 4), (5, 13, 11)))]
  point = [Prompt(7, points=((8, 10, 8, True),), round=1)]
  other = [Prompt(2, box=((6, 3, 15), (6, 9, 25)), round=2)]
  early = [Prompt(2, points=((1, 6, 20, True),), round=3)]
  found = prompted.correct(prompted.track(first), point)
  swept.clear()
  more = prompted.correct(found, other, lambda z, labels: arrived.update({z: labels.copy()}))
  assert set(swept) == {1} and more.structures == (7, 2)  # one track runs of two
  for ours, before in zip(more.parts[0].tracks.cells, found.parts[0].tracks.cells, strict=True):
    np.testing.assert_array_equal(ours[0], before[0])
  np.testing.assert_array_equal(np.stack([arrived[z] for z in range(SHAPE[2])]), more.labels)
  assert set(np.unique(more.labels)) == {0, 2, 7}
  # Both directions set out from the first prompted slice: an earlier one moves everything.
  swept.clear()
  last = prompted.correct(more, early)
  assert 2 in swept
  assert (last.parts[0].tracks.cells.logits[0] != more.parts[0].tracks.cells.logits[0]).any()
  whole = prompted.track(first + point + other + early)
  np.testing.assert_array_equal(whole.labels, last.labels)
  # Followed afresh from what is prompted, nothing of what was kept shows.
  tracked = more.parts[0]
  afresh = prompted._view(tracked.cut).tracker._collected(
    tracked.tracks.prompted, set(), None, lambda *args: None)
  for ours, theirs in zip(more.parts[0].tracks.cells, afresh.cells, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.02)


def test_depth_and_direction_share_one_compilation(checkpoint):
  config, params, _ = load_checkpoint(checkpoint)
  sweep = tracker._sweep
  sizes = []
  for depth, at in ((7, 0), (7, 6), (12, 5), (30, 17)):
    images = np.random.default_rng(depth).standard_normal((depth, 64, 64, 3), np.float32)
    followed = VolumeTracker(
      SAM2(config), params, rfmedsam2_jax.TrackingConfig(), lambda z, x=images: x[z], depth
    )
    tracks = followed.track([SlicePrompt(0, at, box=(10.0, 12.0, 40.0, 37.0))])
    assert (tracks.cells.logits > -1024).any(axis=(2, 3)).all(), "every slice is run"
    sizes.append(sweep._cache_size())
  assert len(set(sizes)) == 1


@pytest.mark.parametrize("arguments, says", [
  ([], "no prompt"),
  (["--box", "1:5,4,6,11"], "LABEL:z,x0,y0,x1,y1"),
  (["--box", "x:5,4,6,11,13"], "LABEL:z,x0,y0,x1,y1"),
  (["--box", "1:5,4,6,eleven,13"], "no number"),
  (["--box", "0:5,4,6,11,13"], "label 0"),
  (["--box", "1:11,4,6,11,13"], "outside"),
  (["--box", "1:5,4,6,11,nan"], "no coordinates"),
  (["--box", "1:5,-9,6,11,13"], "outside"),
  (["--point", "1:5,4,6"], "LABEL:z,x,y,+"),
  (["--point", "1:5,4,6,?"], "+ (inside) or - (outside)"),
  ([*BOXES, "--box", "7:8,1,1,9,9"], "two boxes"),
  ([*BOXES, "--window", "pink"], "window pink"),
  ([*BOXES, "--window", "40,-4"], "window 40,-4"),
  ([*BOXES, "--image-size", "100"], "image_size 100"),
  ([*BOXES, "--prompts", "no_such.json"], "no_such.json"),
  ([*BOXES, "--masks", "no_such.nii.gz"], "no_such.nii.gz"),
  ([*BOXES, "--checkpoint", "no_such"], "no_such"),
])
def test_a_bad_prompt_is_one_line_before_the_network_is_loaded(
  scan, checkpoint, tmp_path, capsys, monkeypatch, arguments, says
):
  monkeypatch.delattr("rfmedsam2_jax.prompted.files.load_checkpoint")
  status, _, error = track(capsys, scan, checkpoint, tmp_path / "out", *arguments)
  assert status == 2 and error.count("\n") == 1 and says in error
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, says", [
  ("[", "JSON"),
  ("{}", "list"),
  ('[{"label": 1}]', "box is two corners"),
  ('[{"label": "liver", "box": [[1, 2, 3], [4, 5, 3]]}]', "whole number"),
  ('[{"label": 1, "boxes": []}]', "keys besides"),
  ('[{"label": 1, "box": [[1, 2, 3], [4, 5, 6]]}]', "spans"),
  ('[{"label": 1, "box": [[1, 2, 3], [4, 5, 3]], "round": 1}]', None),
])
def test_a_bad_file_of_prompts_is_one_line(scan, checkpoint, tmp_path, capsys, content, says):
  path = tmp_path / "prompts.json"
  path.write_text(content)
  status, _, error = track(capsys, scan, checkpoint, tmp_path / "out", "--prompts", path)
  if says is None:  # a file may begin with any round
    assert status == 0, error
  else:
    assert status == 2 and error.count("\n") == 1 and says in error
    assert "prompts.json" in error or "label 2" in error


def test_results_that_exist_are_not_lost(scan, checkpoint, tmp_path, capsys):
  (tmp_path / "scan.nii.gz").write_text("mine")
  status, _, error = track(capsys, scan, checkpoint, tmp_path, *BOXES)
  assert status == 2 and "--overwrite" in error
  assert (tmp_path / "scan.nii.gz").read_text("utf-8") == "mine"
  status, _, error = track(capsys, scan, checkpoint, scan.parent, *BOXES, "--overwrite")
  assert status == 2 and "own result" in error
