"""A checkpoint in one file, and the one that comes with the package; none asks how good it is."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_sam2 import SMALL, drawn
from tiny_config import TINY

import rfmedsam2_jax
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import silent
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.cli.console import Console
from rfmedsam2_jax.cli.entry import parse
from rfmedsam2_jax.cli.quickstart import _tracked
from rfmedsam2_jax.config import parse_config
from rfmedsam2_jax.data.files import sha256_of
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.nn import init_params
from rfmedsam2_jax.parallel.mesh import MeshConfig, make_mesh
from rfmedsam2_jax.training import train_networks as networks
from rfmedsam2_jax.training.loop import Training
from rfmedsam2_jax.training.phases import tracker_phases
from rfmedsam2_jax.training.run import _check_starting_points
from rfmedsam2_jax.weights import single_file
from rfmedsam2_jax.weights.checkpoint import (
  check_starting_point,
  load_checkpoint,
  read_config,
  save_checkpoint,
  starting_params,
)
from rfmedsam2_jax.weights.names import to_official
from rfmedsam2_jax.weights.single_file import BUILTIN_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("checkpoint") / "small"
  save_checkpoint(folder, SMALL, drawn(), {"phase": "drawn"})
  return folder


@pytest.fixture
def file(tmp_path):
  save_checkpoint(tmp_path / "small.safetensors", SMALL, drawn(), {"phase": "drawn"})
  return tmp_path / "small.safetensors"


def test_a_folder_becomes_a_file_of_the_same_values_in_float16(folder, tmp_path, capsys):
  out = tmp_path / "new" / "small.safetensors"
  line = ["convert", "--to-safetensors", str(folder), str(out), "--about"]
  assert main([*line, "licence=CC0=free", "--about", "trained_on=nothing"]) == 0
  found, source = load_checkpoint(out), load_checkpoint(folder)
  assert found.config == source.config
  for (path, x), y in zip(flatten_dict(found.params).items(),
                          flatten_dict(source.params).values(), strict=True):
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, np.float16(y), err_msg=str(path))
  about = read_config(out)[1]
  assert about["phase"] == "drawn" and about["licence"] == "CC0=free"
  assert about["sha256"] == sha256_of(out) and about["sha256"] in capsys.readouterr().out
  assert about["parameters"] == sum(x.size for x in jax.tree.leaves(source.params))
  # Nothing is written over, in the wrong form, or in the program's own words.
  for more, says in (([], "--overwrite"), (["--overwrite", "--about", "sam2=x"], "says sam2"),
                     (["--overwrite", "--about", "early"], "KEY=TEXT")):
    assert main([*line[:-1], *more]) == 2
    assert says in capsys.readouterr().err
  assert read_config(out)[1] == about


def test_what_float16_does_not_hold_is_no_file(tmp_path):
  params = jax.tree.map(np.array, drawn())
  params["memory_encoder"]["out_proj"]["bias"][0] = 1e5
  with pytest.raises(UserError, match="memory_encoder/out_proj/bias has values beyond 65504"):
    save_checkpoint(tmp_path / "a.safetensors", SMALL, params, {})
  assert not list(tmp_path.iterdir())


def rewritten(file, change):
  """The file with other tensors or another description, by a function of both."""
  with safe_open(file, "numpy") as opened:
    about = json.loads(opened.metadata()["about"])
  del about["checksum"]
  tensors = load_file(file)
  text = change(tensors, about)
  save_file(tensors, file, text if text is not None else {"about": json.dumps(about)})


NAME = "memory_encoder/out_proj/bias"


@pytest.mark.parametrize("change, says", [
  (lambda x, about: x[NAME].__setitem__(0, np.nan), f"{NAME} has 1 of .* NaN or infinite"),
  (lambda x, about: x.update({NAME: np.zeros(3, np.float16)}), rf"{NAME} has shape \(3,\), the ne"),
  (lambda x, about: x.__delitem__(NAME), f"{NAME} is missing"),
  (lambda x, about: x.update(more=np.zeros(3, np.float16)), "more is not of the network"),
  (lambda x, about: about.__delitem__("sam2"), "is a checkpoint, but not of SAM 2"),
  (lambda x, about: about["sam2"].update(layers=3), r"another version \(sam2.layers is unknown"),
  (lambda x, about: {}, "does not say of which network; make one from it with rfmedsam2 convert"),
  (lambda x, about: {"about": "{"}, "is damaged"), (lambda x, about: {"about": "1"}, "is damaged"),
])
def test_a_file_that_is_wrong_is_one_line(file, change, says):
  rewritten(file, change)
  with pytest.raises(UserError, match=f"small.safetensors: .*{says}") as found:
    load_checkpoint(file)
  assert "\n" not in str(found.value)


def test_a_file_of_others_is_sent_to_convert(tmp_path, capsys):
  save_file(to_official(drawn()), tmp_path / "a.safetensors", {"format": "pt"})
  with pytest.raises(UserError, match="a.safetensors: is no checkpoint .* rfmedsam2 convert"):
    load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("part", ["the end", "a bit", "all"])
def test_damage_to_a_file_is_seen(file, part):
  content = bytearray(file.read_bytes())
  if part == "a bit":  # of a value
    content[-9] ^= 1
  file.write_bytes({"the end": content[:-1], "a bit": content, "all": b""}[part])
  with pytest.raises(UserError, match=r"small.safetensors: is damaged \(.*copy or make it anew"):
    load_checkpoint(file)


def test_the_weights_in_the_package_are_small_finite_and_say_what_they_are():
  assert BUILTIN_FILE.stat().st_size <= 4e6
  assert {x.dtype for x in load_file(BUILTIN_FILE).values()} == {np.dtype("float16")}
  config, params, about = load_checkpoint("builtin")
  assert about["parameters"] == sum(x.size for x in jax.tree.leaves(params))
  assert about["licence"] == "Apache-2.0"
  assert f"M parameters, trained on {about['trained_on']}" in single_file.builtin_words()
  # As the defaults of tracking want it, and with its network by name in a config.
  assert config.drawn_prompts
  found = parse_config({"sam2": {"preset": "builtin", "image_size": 256}}).sam2
  assert found == dataclasses.replace(config, image_size=256)


def test_the_card_is_of_the_file():
  page = (Path(__file__).parents[1] / "docs" / "builtin.md").read_text("utf-8")
  card = dict(re.findall(r"^\| (\w[\w ]*) \| (.*) \|$", page, re.M))
  config, about = read_config("builtin")
  assert card["trained on"] == about["trained_on"]
  assert card["parameters"].startswith(f"{about['parameters']:,}, ")
  assert card["image side"].startswith(f"{config.image_size} pixels")
  size = f"float16, {BUILTIN_FILE.stat().st_size / 1e6:.2f} MB, SHA-256 `{about['sha256'][:12]}`"
  assert size in card["file"] and BUILTIN_FILE.name in card["file"]
  assert f"{about['licence']}, as the program" in page


def test_the_word_is_not_the_folder_of_that_name(folder, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  shutil.copytree(folder, "builtin")
  config = load_checkpoint(BUILTIN_FILE).config
  assert config != SMALL and load_checkpoint("builtin").config == config
  for place in ("./builtin", Path("builtin"), tmp_path / "builtin"):
    assert load_checkpoint(place).config == SMALL
  assert parse(["serve"]).checkpoint == parse(["serve", "builtin"]).checkpoint == "builtin"
  assert parse(["serve", "./builtin"]).checkpoint == Path("builtin")
  # A run in a folder around the package's file, or around a word, has no start within.
  given = {"sam2": {"preset": "builtin"}, "refiner": {"init_from": "builtin"}}
  _check_starting_points(parse_config(given), tmp_path)
  with pytest.raises(UserError, match="lies in the run"):
    config = parse_config(given | {
      "sam2": json.loads(json.dumps(dataclasses.asdict(SMALL))),
      "refiner": {"init_from": "./builtin"}})
    _check_starting_points(config, tmp_path)


def test_training_starts_from_the_word():
  config, params, _ = load_checkpoint("builtin")
  found = starting_params("builtin", config, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, found, params)
  other = dataclasses.replace(config, decoder_depth=config.decoder_depth + 1)
  with pytest.raises(UserError, match=r"^builtin: its network has decoder_depth=\d, the config has "
                     r"sam2.decoder_depth=\d; set sam2 to \{preset: builtin\}$"):
    check_starting_point("builtin", other)


@pytest.fixture
def scan(tmp_path):
  """A bright block in noise."""
  voxels = np.random.default_rng(0).normal(0, 30, (20, 18, 5))
  voxels[4:12, 6:14, 1:4] += 200
  nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.eye(4)), tmp_path / "scan.nii.gz")
  return tmp_path / "scan.nii.gz"


@pytest.mark.slow
def test_a_volume_is_tracked_without_a_checkpoint(scan, tmp_path, capsys):
  line = ["track", str(scan), "--box", "3:2,4,6,11,13", "--image-size", "64", "--out"]
  assert main([*line, str(tmp_path / "out")]) == 0
  said = capsys.readouterr().err
  assert f"{single_file.builtin_words()}; --checkpoint brings another" in said
  about = json.loads((tmp_path / "out" / "scan.json").read_text("utf-8"))
  assert (about["checkpoint"], about["sha256"]) == ("builtin", sha256_of(BUILTIN_FILE)[:12])
  labels = np.asarray(nib.load(tmp_path / "out" / "scan.nii.gz").dataobj)
  assert set(np.unique(labels)) <= {0, 3}
  # From Python the same, and the same as by the file's own path.
  prompt = rfmedsam2_jax.VoxelPrompt(3, box=((2, 4, 4), (2, 11, 15)))
  for how in ({}, {"checkpoint": BUILTIN_FILE}):
    found = rfmedsam2_jax.open_volume(image=scan, image_size=64, **how).track([prompt])
    assert found.labels.shape == (5, 18, 20)


@pytest.mark.slow
def test_the_quickstart_tracks_a_phantom_it_has_not_seen(phantoms, tmp_path):
  (tmp_path / "phantoms").symlink_to(phantoms)
  assert _tracked(tmp_path, Console()) > 0.7  # phantoms of 9 mm slices
  name = sorted((phantoms / "imagesTs").iterdir())[0].name.removesuffix(".nii.gz")
  found = nib.load(tmp_path / "tracked" / f"{name}.nii.gz")
  assert set(np.unique(found.dataobj)) == {0, 1, 2, 3, 4, 5}
  assert (tmp_path / "tracked" / f"{name}.png").stat().st_size


def test_a_volume_has_to_be_named():
  with pytest.raises(TypeError, match=r"open_volume\(image=...\) takes the built-in"):
    rfmedsam2_jax.open_volume("ct.nii.gz")


def test_a_phase_that_began_does_not_care_for_new_weights_in_the_package(tmp_path, monkeypatch):
  tree = {"sam2": TINY["sam2"], "tracker": {"init_from": "builtin", "loop": {"steps": 2}}}
  config = parse_config(tree)
  first = init_params(config.sam2, jax.random.key(1))
  file = tmp_path / "weights.safetensors"
  save_checkpoint(file, config.sam2, first, {"licence": "CC0"})
  monkeypatch.setattr(single_file, "BUILTIN_FILE", file)
  monkeypatch.setattr(networks, "train_phase", lambda *given: given[-1])  # nothing is learned

  def trained(name):
    (tmp_path / name).mkdir(exist_ok=True)
    training = Training(
      RunFolder(tmp_path / name), make_mesh(MeshConfig()), 0, [], {}, silent, False)
    return networks.train_tracker(training, tracker_phases(config), config.sam2, [])

  params = trained("run")
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.float16(y)), params, first)
  kept = json.loads((tmp_path / "run" / "tracker_init_from.json").read_text("utf-8"))
  assert (kept["licence"], kept["sha256"]) == ("CC0", sha256_of(file))
  file.write_bytes(b"")
  jax.tree.map(np.testing.assert_array_equal, trained("run"), params)
  (tmp_path / "begun" / "tracker" / "checkpoints" / "1").mkdir(parents=True)
  trained("begun")  # it would go on from there
  with pytest.raises(UserError, match="is damaged"):
    trained("another")
