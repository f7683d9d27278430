"""Addresses where a file or folder is expected: those of buckets, and those that are refused."""

import argparse
from pathlib import Path

import pytest

from rfmedsam2_jax.base.addresses import ENVIRONMENT, address_of, check_place, copy_of, shown
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.places import word_or_path
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.cli.entry import make_parser
from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.data.files import claim, replacing, replacing_whole
from rfmedsam2_jax.data.inputs import find_inputs
from rfmedsam2_jax.training.lock import check_folder
from rfmedsam2_jax.weights.orbax import save_params


def commands() -> dict[str, argparse.ArgumentParser]:
  parser = make_parser()
  (listed,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
  return listed.choices


def given(action: argparse.Action, value: str) -> list[str]:
  values = [value] * 2 if action.nargs == "+" else [value]
  return [action.option_strings[0], *values] if action.option_strings else values


KINDS = (Path, word_or_path)
PATHS = [(name, action.dest) for name, command in commands().items()
         for action in command._actions if action.type in KINDS]


def test_every_command_has_paths():
  assert {name for name, _ in PATHS} == set(commands()) - {"models", "fetch"}
  assert len(PATHS) >= 25


@pytest.mark.parametrize(("name", "dest"), PATHS)
def test_an_address_as_any_path_is_one_line_and_makes_no_folder(
  name, dest, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  words = name.split("-")
  for action in commands()[name]._actions:
    is_path = action.type in KINDS
    if action.dest == dest:
      words += given(action, "az://bucket/a")
    elif is_path and (action.required or not action.option_strings):
      words += given(action, "here")
    elif action.required:
      words += given(action, "1")
  assert main(words) == 2
  error = capsys.readouterr().err
  assert error.startswith("rfmedsam2: az://bucket/a: is an address") and error.count("\n") == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [
  "http://x.org/a.nii.gz", "file:///home", "s3a://b", "GS://b", "gs://", "gs://b/../c"])
def test_addresses_that_cannot_be_opened_are_refused_whether_as_text_or_as_paths(text):
  for path in (text, Path(text)):
    with pytest.raises(UserError, match=text.partition(":")[0] + "://"):
      check_place(path)


@pytest.mark.parametrize("text", ["gs://b", "s3://b/c", "gs://b/c/d.nii.gz", "gs://b/c/"])
def test_the_copy_of_a_bucket_says_its_address(text, tmp_path, monkeypatch):
  monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
  address = text.rstrip("/")
  for place in (text, Path(text)):
    assert address_of(place) == address
    for shelf in ("read", "written"):
      copy = copy_of(place, shelf)
      assert copy.is_relative_to(tmp_path) and address_of(copy) == address
      assert copy_of(copy, "read") == copy and shown(f"{copy}: no") == f"{address}: no"
  assert address_of(tmp_path) is address_of(tmp_path / "records" / "gs" / "b") is None


@pytest.mark.parametrize("text", ["a:b", "C:/data", "a/b:/c", "./gs", "/gs:/b", "10:30", ""])
def test_names_with_colons_are_names(text):
  check_place(text)
  check_place(Path(text))


@pytest.mark.parametrize(
  "key", ["data.dataset", "generator.init_from", "tracker.init_from", "refiner.init_from"])
def test_an_address_in_a_config_is_refused_by_its_key(key, tmp_path):
  path = tmp_path / "a.yaml"
  path.write_text("{}")
  with pytest.raises(UserError, match=f"{key}: https://b/c: is an address"):
    load_config(path, [f"{key}=https://b/c"])


def test_the_functions_that_write_make_no_folder_of_an_address(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for write in (
    lambda path: claim(path, [], False), lambda path: check_folder(Path(path), False, False),
    lambda path: replacing(path).__enter__(), lambda path: replacing_whole(path).__enter__(),
    lambda path: save_params(path, {}, {}), lambda path: find_inputs([path]), load_config,
  ):
    with pytest.raises(UserError, match="az://b/c: is an address"):
      write("az://b/c")
  assert not list(tmp_path.iterdir())
