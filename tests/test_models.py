"""A model as a thing: exported, installed, known by its name; and what is no model is one line."""

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from tiny_config import TINY

import rfmedsam2_jax
from rfmedsam2_jax.base import kept
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.config import load_config, parse_config
from rfmedsam2_jax.config.reading import config_yaml
from rfmedsam2_jax.data.datasets import read_dataset
from rfmedsam2_jax.data.files import save_json
from rfmedsam2_jax.data.fingerprint import make_fingerprint
from rfmedsam2_jax.data.plan import make_plan, save_plan
from rfmedsam2_jax.model import NETWORKS, load, untrained
from rfmedsam2_jax.nn import init_params
from rfmedsam2_jax.nn.initialisation import init_generator
from rfmedsam2_jax.weights.checkpoint import load_checkpoint, save_checkpoint
from rfmedsam2_jax.weights.orbax import save_params


@pytest.fixture(scope="module")
def run(tmp_path_factory, phantoms):
  """A run's folder with networks as they are drawn: everything that a finished one has."""
  folder = tmp_path_factory.mktemp("runs") / "phantom-organs"
  tree = TINY | {"data": TINY["data"] | {"dataset": str(phantoms)},
                 "refiner": TINY["refiner"] | {"init_from": "/home/somebody/ckpt/tiny"}}
  config = parse_config(tree)
  fingerprint = make_fingerprint(read_dataset(phantoms))
  plan = make_plan(fingerprint, config.plan)
  segmenter = untrained(config, plan)
  folder.mkdir()
  (folder / "config.yaml").write_text(config_yaml(config))
  save_plan(folder / "plan.json", plan)
  save_json(folder / "fingerprint.json", fingerprint)
  (folder / "versions.json").write_text(json.dumps({"jax": "1.2.3"}))
  (folder / "splits.json").write_text(json.dumps({"train": ["a", "b"], "validation": ["c"]}))
  about = {"source": {"name": "/home/somebody/ckpt/tiny.pt", "sha256": {"tiny.pt": "abc"}}}
  (folder / "init_from.json").write_text(json.dumps(about))
  key = jax.random.key(0)
  generator = jax.jit(lambda key: init_generator(segmenter.unet, 1, key))(key)
  save_params(folder / "generator" / "params", generator, {"config": tree})
  save_checkpoint(folder / "refiner" / "params", config.sam2, init_params(config.sam2, key), about)
  return folder


@pytest.fixture(scope="module")
def archive(run, tmp_path_factory):
  out = tmp_path_factory.mktemp("archive") / "model.zip"
  assert main(["export", str(run), str(out), "--licence", "CC-BY-4.0"]) == 0
  return out


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  """An empty folder of models, and a working directory in which nothing lies."""
  monkeypatch.setenv(kept.ENVIRONMENT, str(tmp_path / "home"))
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  return tmp_path / "home"


def refused(capsys, *words):
  """The one line of a command that exits with 2."""
  assert main([str(word) for word in words]) == 2
  error = capsys.readouterr().err
  *progress, said = error.splitlines()
  assert all(line.startswith("[") for line in progress) and said.startswith("rfmedsam2: ")
  return said.removeprefix("rfmedsam2: ")


def test_an_installed_model_is_the_run_bit_for_bit(run, archive, home, capsys):
  assert main(["install", str(archive)]) == 0
  assert "licence: CC-BY-4.0" in capsys.readouterr().out
  ours, theirs = load("phantom-organs"), load(run)
  for name in NETWORKS:
    jax.tree.map(np.testing.assert_array_equal, getattr(ours, name), getattr(theirs, name))
  assert ours.plan == theirs.plan and ours.refinement == theirs.refinement
  assert ours.name == "phantom-organs" and ours.sam2 == theirs.sam2
  assert [case.quantiles for case in ours.fingerprint.cases] == [
    case.quantiles for case in theirs.fingerprint.cases]
  # A path is a path: neither a Path of this name nor what lies here is the installed model.
  with pytest.raises(UserError, match="is no run"):
    load(Path("phantom-organs"))
  Path("phantom-organs").mkdir()
  with pytest.raises(UserError, match="is no run"):
    load("phantom-organs")


def test_an_archive_names_neither_the_machine_nor_a_case(run, archive, phantoms):
  with zipfile.ZipFile(archive) as opened:
    texts = {name: opened.read(name) for name in opened.namelist()}
  words = b"\n".join(texts.values())
  for place in (run, phantoms, Path.home(), "/home/somebody", "ckpt/tiny"):
    assert str(place).encode() not in words, place
  for case in sorted(x.name.split(".")[0] for x in (phantoms / "labelsTr").iterdir()):
    assert case.encode() not in words
  card = texts["README.md"].decode()
  assert "tiny.pt, SHA-256 abc" in card and "2 cases, train" in card and "jax 1.2.3" in card
  config = yaml.safe_load(texts["config.yaml"])
  assert config["data"]["dataset"] == phantoms.name and config["refiner"]["init_from"] == "tiny"


def test_the_same_run_gives_the_same_bytes(run, archive, tmp_path):
  again = tmp_path / "again.zip"
  assert main(["export", str(run), str(again), "--licence", "CC-BY-4.0"]) == 0
  assert again.read_bytes() == archive.read_bytes()
  # Also when it comes from the installed model.
  assert main(["install", str(archive), "--name", "other"]) == 0
  assert main(["export", "other", str(again), "--name", "phantom-organs", "--overwrite"]) == 0
  assert again.read_bytes() == archive.read_bytes()


def test_a_text_that_names_this_machine_is_not_exported(run, tmp_path, capsys):
  card, out = tmp_path / "card.md", tmp_path / "x.zip"
  card.write_text(f"Trained at {Path.home()}/runs.")
  assert refused(capsys, "export", run, out, "--card", card).startswith(
    f"{card}: names {Path.home()}, a place of this machine; take it out")
  copy = shutil.copytree(run, tmp_path / "copy")
  (copy / "versions.json").write_text(json.dumps({"cuda": "/opt/cuda/12"}))
  assert "names /opt/cuda/12" in refused(capsys, "export", copy, out)
  card.write_text("Data lay in /data/Task04 of https://example.org/data/of/all.")  # an example
  assert main(["export", str(run), str(out), "--card", str(card)]) == 0
  assert "no licence is stated" in capsys.readouterr().err
  assert sorted(x.name for x in tmp_path.iterdir()) == ["card.md", "copy", "here", "x.zip"]


def test_what_cannot_be_exported_is_one_line(run, tmp_path, capsys):
  out = tmp_path / "x.zip"
  assert "is no run" in refused(capsys, "export", tmp_path, out)
  assert "must end in .zip" in refused(capsys, "export", run, tmp_path / "x")
  assert "is no name of a model" in refused(capsys, "export", run, out, "--name", "../x")
  assert "is no file" in refused(capsys, "export", run, out, "--licence", "none/LICENSE")
  out.write_text("mine")
  assert "replace it with --overwrite" in refused(capsys, "export", run, out)
  copy = shutil.copytree(run, tmp_path / "copy")
  shutil.rmtree(copy / "refiner")
  assert "its refiner is not trained yet" in refused(capsys, "export", copy, out, "--overwrite")
  assert out.read_text() == "mine"


def rezipped(archive, target, change):
  """A copy of an archive whose files go through `change(name, content)`, None leaves them out."""
  with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
    for name in old.namelist():
      if (content := change(name, old.read(name))) is not None:
        new.writestr(name, content)
  return target


def edited(**values):
  return lambda name, content: json.dumps(json.loads(content) | values) if (
    name == "model.json") else content


def listed(name, content):
  """A change that lists and brings one more file."""
  from rfmedsam2_jax.archive.manifest import entry_of

  def change(inside, old):
    if inside != "model.json":
      return old
    tree = json.loads(old)
    tree["files"][name] = dataclasses.asdict(entry_of(content))
    return json.dumps(tree)
  return change


WRONG = {
  "a changed text": (lambda name, x: x + b" " if name == "plan.json" else x,
                     "plan.json does not have the SHA-256"),
  "changed weights": (lambda name, x: x[:-1] + bytes([x[-1] ^ 1]) if "refiner" in name else x,
                      "refiner/params.safetensors does not have the SHA-256"),
  "a file less": (lambda name, x: None if name == "plan.json" else x, "plan.json is missing"),
  "no list": (lambda name, x: None if name == "model.json" else x, "it has no model.json"),
  "a newer format": (edited(format=9), "its format is 9, this version reads 1"),
  "another list": (edited(files=3), "its model.json: files: Input should be"),
  "a name that leads out": (edited(name="../../x"), "'../../x': is no name of a model"),
  "a name of other weights": (edited(name="sam2.1_hiera_tiny"), "is the name of other weights"),
  "the word": (edited(name="builtin"), "is the name of other weights"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_archive_is_one_line_and_leaves_nothing(kind, archive, home, tmp_path, capsys):
  change, says = WRONG[kind]
  wrong = rezipped(archive, tmp_path / "wrong.zip", change)
  assert says in refused(capsys, "install", wrong)
  assert [x for x in home.rglob("*") if x.is_file()] == []


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", "C:out", ".hidden", "a//b",
                                  "a\\..\\b", "refiner/../../out"])
def test_an_archive_cannot_write_elsewhere(name, archive, home, tmp_path, capsys):
  evil = rezipped(archive, tmp_path / "evil.zip", listed(name, b"x"))
  with zipfile.ZipFile(evil, "a") as opened:
    opened.writestr(name, b"x")
  assert "is no plain path below" in refused(capsys, "install", evil)
  only = rezipped(archive, tmp_path / "only.zip", lambda name, content: content)
  with zipfile.ZipFile(only, "a") as opened:
    opened.writestr(name, b"x")
  before = sorted(x for x in tmp_path.rglob("*") if x.is_file())
  assert "is no plain path below" in refused(capsys, "install", only)
  assert sorted(x for x in tmp_path.rglob("*") if x.is_file()) == before


def test_a_link_in_an_archive_is_a_file(archive, home, tmp_path):
  """Whatever kind an entry claims to be, what is written are plain files."""
  with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "x.zip", "w") as new:
    for info in old.infolist():
      info.external_attr = 0o120777 << 16
      new.writestr(info, old.read(info))
  assert main(["install", str(tmp_path / "x.zip")]) == 0
  assert not any(x.is_symlink() for x in home.rglob("*"))


def test_an_archive_that_is_damaged_or_none_is_one_line(archive, run, tmp_path, home, capsys):
  whole, path = archive.read_bytes(), tmp_path / "x.zip"
  for content in (whole[:-100], whole[: len(whole) // 2], b"", b"text",
                  whole[:5000] + b"\0" * 50 + whole[5050:]):
    path.write_bytes(content)
    assert refused(capsys, "install", path).startswith(f"{path}: is damaged or no archive")
  assert "no such file" in refused(capsys, "install", tmp_path / "none.zip")
  assert "not the given one" in refused(capsys, "install", archive, "--sha256", "0" * 64)
  # Its hashes are right, but it cannot be loaded.
  with zipfile.ZipFile(archive) as opened:
    plan = opened.read("plan.json").replace(b'"strides"', b'"steps"')
  wrong = rezipped(archive, path, listed("plan.json", plan))
  wrong = rezipped(wrong, tmp_path / "y.zip", lambda name, x: plan if name == "plan.json" else x)
  assert refused(capsys, "install", wrong).startswith(f"{wrong}: plan.json: strides")
  assert [x for x in home.rglob("*") if x.is_file()] == []


def test_a_taken_name_is_kept_unless_it_may_go(archive, home, tmp_path, capsys):
  assert main(["install", str(archive), "--name", "mine"]) == 0
  (home / "models" / "mine" / "note").touch()
  assert "is installed already" in refused(capsys, "install", archive, "--name", "mine")
  assert (home / "models" / "mine" / "note").exists()
  assert main(["install", str(archive), "--name", "mine", "--overwrite"]) == 0
  assert not (home / "models" / "mine" / "note").exists()
  assert [x.name for x in (home / "models").iterdir()] == ["mine"]


def test_an_unknown_name_is_one_line_with_the_nearest(archive, tmp_path, capsys):
  assert main(["install", str(archive)]) == 0
  near = "the nearest known name is phantom-organs"
  assert near in refused(capsys, "predict", "phantom-organ", tmp_path, "--out", tmp_path / "out")
  assert near in refused(capsys, "export", "phantom-organ", tmp_path / "x.zip")
  assert near in refused(capsys, "evaluate", tmp_path, tmp_path, "--labels", "Phantom_organs")
  with pytest.raises(UserError, match=near):
    load("phantom_organs")
  assert "nearest" not in refused(capsys, "predict", "./x", tmp_path, "--out", tmp_path / "out")
  # As a checkpoint it needs a tracker.
  assert "without a tracker" in refused(capsys, "serve", "phantom-organs", "--port", "0")


def test_the_tracker_of_a_model_is_a_checkpoint_by_name(run, tmp_path, capsys):
  alone = tmp_path / "follower"
  config = parse_config({"sam2": TINY["sam2"], "tracker": {"loop": {"steps": 2}, "data": [
    {"source": "/data/of/mine"}]}, "generator": {"loop": {"steps": 0}},
    "refiner": {"loop": {"steps": 0}}})
  sam2, params, _ = load_checkpoint(run / "refiner" / "params")
  alone.mkdir()
  (alone / "config.yaml").write_text(config_yaml(dataclasses.replace(config, sam2=sam2)))
  assert "its tracker is not trained yet" in refused(capsys, "export", alone, tmp_path / "x.zip")
  save_checkpoint(alone / "tracker" / "params", sam2, params, {"config": "/home/somebody"})
  assert main(["export", str(alone), str(tmp_path / "x.zip")]) == 0
  assert b"somebody" not in (tmp_path / "x.zip").read_bytes()
  assert main(["install", str(tmp_path / "x.zip")]) == 0
  found = load_checkpoint("follower")
  assert found.config == sam2
  jax.tree.map(np.testing.assert_array_equal, found.params, params)
  assert load_config(kept.run_at("follower") / "config.yaml").tracker.data[0].source == "mine"


def test_models_lists_what_is_there(archive, home, capsys):
  assert main(["models"]) == 0
  assert "rfmedsam2 install brings a model" in capsys.readouterr().out
  for name in ("one", "two"):
    assert main(["install", str(archive), "--name", name]) == 0
  (home / "models" / "two" / "model.json").write_text("{}")
  capsys.readouterr()
  assert main(["models", "--json"]) == 0
  found = json.loads(capsys.readouterr().out)["result"]
  one, two = found["models"]
  assert found["home"] == str(home) and found["weights"] == []
  assert (one["name"], one["licence"]) == ("one", "CC-BY-4.0") and "damage" not in one
  assert list(load("one").plan.labels.names) == one["structures"]
  assert "install it again" in two["damage"]
  assert main(["models"]) == 0
  assert "model    two: cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(("environment", "place"), [
  ({}, ".local/share/rfmedsam2_jax"), ({"XDG_DATA_HOME": "data"}, "here/data/rfmedsam2_jax"),
  ({"XDG_DATA_HOME": "data", "RFMEDSAM2_HOME": "~/mine"}, "mine")])
def test_where_they_are_kept_can_be_moved(environment, place, tmp_path, monkeypatch):
  for name in ("XDG_DATA_HOME", "RFMEDSAM2_HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert kept.home() == tmp_path / place


@pytest.mark.slow
def test_a_name_predicts_what_the_run_predicts(run, archive, phantoms, tmp_path):
  assert main(["install", str(archive), "--name", "organs"]) == 0
  image = sorted((phantoms / "imagesTs").iterdir())[0]
  for source, out in ((str(run), "a"), ("organs", "b")):
    assert main(["predict", source, str(image), "--out", str(tmp_path / out)]) == 0
  a, b = (sorted(x for x in (tmp_path / out).iterdir() if x.suffix == ".gz") for out in "ab")
  assert len(a) == 1 and a[0].read_bytes() == b[0].read_bytes()
  (json_b,) = (x for x in (tmp_path / "b").glob("*.json"))
  assert json.loads(json_b.read_text("utf-8"))["runs"] == ["organs"]
  assert main(["evaluate", str(tmp_path / "a"), str(tmp_path / "b"), "--labels", "organs"]) == 0
  assert rfmedsam2_jax.load("organs").name == "organs"
