"""What every command says under --quiet and --json, whatever it is that it does."""

import json
import subprocess
import sys

import pytest
from small_sam2 import SMALL, drawn

from rfmedsam2_jax.cli import main
from rfmedsam2_jax.cli.entry import COMMANDS
from rfmedsam2_jax.weights.checkpoint import save_checkpoint


def alone(line: list[str]) -> int:
  """In a process of its own: shard chooses the number of devices, once."""
  return subprocess.run([sys.executable, "-m", "rfmedsam2_jax", *line]).returncode


@pytest.fixture(scope="module")
def monkeypatch_module():
  with pytest.MonkeyPatch.context() as patch:
    yield patch


@pytest.fixture(scope="module")
def commands(tiny_run, tiny_config, phantoms, tmp_path_factory, monkeypatch_module):
  """A command line of each, in an order in which one finds what the one before it wrote."""
  folder = tmp_path_factory.mktemp("said")
  save_checkpoint(folder / "small", SMALL, drawn(), {"source": "drawn"})
  monkeypatch_module.setenv("RFMEDSAM2_HOME", str(folder / "home"))
  scans, truth = phantoms / "imagesTs", phantoms / "labelsTs"
  scan = sorted(scans.glob("*.nii.gz"))[0]
  out = folder / "predictions"
  lines = {
    "predict": [tiny_run, scan, "--out", out, "--overwrite"],
    "evaluate": [out, truth, "--partial"],
    "report": [out, "--ref", truth, "--out", folder / "report", "--overwrite"],
    "track": [scan, "--checkpoint", folder / "small", "--out", folder / "tracked", "--overwrite",
              "--point", "1:3,10,10,+"],
    "shard": [tiny_config, "--devices", "1", "--no-compile"],
    "export": [tiny_run, folder / "model.zip", "--overwrite"],
    "install": [folder / "model.zip", "--overwrite"],
    "models": [],
    "fetch": [],  # says what there is
    # Errors are lines too.
    "train": [tiny_config, "--out", tiny_run],
    "quickstart": ["--out", folder],
    "serve": [folder / "none", "--port", "0"],
    "convert": ["--to-torch", folder / "small", folder / "back.pt", "--overwrite"],
    "convert nnunet": [folder / "none", folder / "generator"],
  }
  return {
    name: (alone if name == "shard" else main, [*name.split(), *map(str, line)])
    for name, line in lines.items()
  }


pytestmark = pytest.mark.slow
FAILS = {"train", "quickstart", "serve", "convert nnunet"}


def test_no_command_is_left_out(commands):
  assert set(COMMANDS) | {"convert nnunet"} == set(commands)


def test_json_lines_parse_and_the_last_one_is_the_result(commands, capfd):
  for name, (program, line) in commands.items():
    status = program([*line, "--json"])
    out, error = capfd.readouterr()
    said = [json.loads(text, parse_constant=pytest.fail) for text in out.splitlines()]
    assert status == (2 if name in FAILS else 0), out
    assert [key for each in said for key in ("result", "error") if key in each] == [
      "error" if name in FAILS else "result"
    ], name
    assert "result" in said[-1] or said[-1]["status"] == 2, name
    assert not error, name


def test_quiet_is_the_result_or_one_line_that_says_why_not(commands, capfd):
  for name, (program, line) in commands.items():
    status = program([*line, "--quiet"])
    out, error = capfd.readouterr()
    told = [text for text in error.splitlines() if "warning: " not in text]
    if name in FAILS:
      assert (status, out, len(told)) == (2, "", 1), name
    else:
      assert (status, told) == (0, []) and out, name
