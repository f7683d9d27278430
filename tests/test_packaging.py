"""What is installed: a wheel that is whole, and papers that agree with it."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from rfmedsam2_jax.cli import main
from rfmedsam2_jax.report import niivue

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_version_is_the_same_everywhere(capsys):
  with pytest.raises(SystemExit) as status:
    main(["--version"])
  assert status.value.code == 0
  assert capsys.readouterr().out == f"rfmedsam2 {PROJECT['version']}\n"
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
  assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]


def test_the_citation_has_what_its_format_asks_for():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
  assert citation["cff-version"] == "1.2.0" and citation["message"]
  for work in (citation, *citation["references"]):
    assert work["type"] and work["title"] and work["authors"]
    for author in work["authors"]:
      assert set(author) in ({"name"}, {"family-names", "given-names"})


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
  def full(options, console):
    with open("/dev/full", "w") as file:
      file.write("x")

  monkeypatch.setattr("rfmedsam2_jax.cli.evaluate.run", full)
  assert main(["evaluate", str(tmp_path), str(tmp_path)]) == 2
  error = capsys.readouterr().err
  assert error.startswith("rfmedsam2: a result could not be written: No space left on device")
  assert error.count("\n") == 1


@pytest.mark.slow
def test_a_wheel_runs_from_another_folder(tmp_path):
  pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
  # From a copy of what is committed or new, so that nothing is left in the checkout.
  listed = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
    check=True,
  ).stdout.split("\n")
  viewer = f"rfmedsam2_jax/report/static/{niivue.FILE}"  # not in the repository
  fetched = niivue.bundle() is not None
  for name in [*listed, *([viewer] if fetched else [])]:
    if name.startswith(("rfmedsam2_jax/", "configs/", "pyproject", "setup", "README", "LICENSE")):
      (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
  subprocess.run(
    [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels",
     tmp_path / "source"], check=True, capture_output=True,
  )
  (wheel,) = (tmp_path / "wheels").glob("*.whl")
  installed = tmp_path / "installed"
  subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True)
  assert (installed / "rfmedsam2_jax" / "py.typed").is_file()
  assert (installed / "rfmedsam2_jax" / "configs" / "hippocampus.yaml").is_file()
  assert (installed / "rfmedsam2_jax" / "report" / "templates" / "index.html").is_file()
  if fetched:
    assert (installed / viewer).read_bytes() == (ROOT / viewer).read_bytes()
  environment = {**os.environ, "PYTHONPATH": str(installed)}
  said = subprocess.run(
    [sys.executable, "-c", "import rfmedsam2_jax; print(rfmedsam2_jax.__file__)"],
    cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
  ).stdout
  assert said.startswith(str(installed)), "another copy was imported"
  for arguments in (["--version"], ["train", "--help"]):
    done = subprocess.run(
      [sys.executable, "-m", "rfmedsam2_jax", *arguments], cwd=tmp_path, env=environment,
      capture_output=True, text=True,
    )
    assert done.returncode == 0 and "rfmedsam2" in done.stdout, done.stderr
