"""What is installed: a wheel that is whole, and papers that agree with it."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import save_file
from small_sam2 import SMALL, drawn

from rfmedsam2_jax.cli import main
from rfmedsam2_jax.report import niivue
from rfmedsam2_jax.weights.checkpoint import load_checkpoint
from rfmedsam2_jax.weights.names import to_official
from rfmedsam2_jax.weights.single_file import BUILTIN_FILE

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
    if name.startswith(("rfmedsam2_jax/", "configs/", "convert/", "pyproject", "setup", "README",
                        "LICENSE")):
      (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
  built = subprocess.run(
    [*pip, "-v", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels",
     tmp_path / "source"], check=True, capture_output=True, text=True,
  )
  # A folder of data that looks like a package, a field that is going out of use.
  assert not re.search(r"\b_?Warning|Deprecat", built.stdout + built.stderr), built.stdout
  (wheel,) = (tmp_path / "wheels").glob("*.whl")
  installed = tmp_path / "installed"
  subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True)
  assert (installed / "rfmedsam2_jax" / "py.typed").is_file()
  assert (installed / "rfmedsam2_jax" / "configs" / "hippocampus.yaml").is_file()
  assert (installed / "rfmedsam2_jax" / "report" / "templates" / "index.html").is_file()
  weights = Path("rfmedsam2_jax", "weights", BUILTIN_FILE.name)
  assert (installed / weights).read_bytes() == (ROOT / weights).read_bytes()
  if fetched:
    assert (installed / viewer).read_bytes() == (ROOT / viewer).read_bytes()
  environment = {**os.environ, "PYTHONPATH": str(installed)}
  said = subprocess.run(
    [sys.executable, "-c", "import rfmedsam2_jax; print(rfmedsam2_jax.__file__)"],
    cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
  ).stdout
  assert said.startswith(str(installed)), "another copy was imported"
  # Weights are brought without a clone too.
  save_file(to_official(drawn()), tmp_path / "small.safetensors")
  network = json.loads(json.dumps(dataclasses.asdict(SMALL)))
  (tmp_path / "small.yaml").write_text(yaml.safe_dump({"sam2": network}))
  brought = ["convert", "small.safetensors", "ckpt", "--config", "small.yaml"]
  for arguments in (["--version"], ["train", "--help"], ["convert", "--help"],
                    ["convert", "nnunet", "--help"], brought):
    done = subprocess.run(
      [sys.executable, "-m", "rfmedsam2_jax", *arguments], cwd=tmp_path, env=environment,
      capture_output=True, text=True,
    )
    expected = "tensors converted" if arguments is brought else "rfmedsam2"
    assert done.returncode == 0 and expected in done.stdout, done.stderr
  assert load_checkpoint(tmp_path / "ckpt").config == SMALL


UNTOUCHED = """
import logging, signal, sys, warnings
hook, signals = sys.unraisablehook, [signal.getsignal(n) for n in range(1, 32)]
import jax, orbax.checkpoint, nibabel  # whose own doings are not ours
levels = {name: logging.getLogger(name).level for name in ("absl", "orbax", "jax", "asyncio",
                                                            "nibabel.global")}
import rfmedsam2_jax.model, rfmedsam2_jax.data.itk, rfmedsam2_jax.parallel.hosts
assert levels == {name: logging.getLogger(name).level for name in levels}
assert hook is sys.unraisablehook and not [f for f in warnings.filters if "Handler" in str(f[1])]
assert signals == [signal.getsignal(n) for n in range(1, 32)]
"""


def test_the_library_leaves_loggers_hooks_and_signals_to_its_user():
  done = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr


LIGHT = """
import sys
from pathlib import Path
from rfmedsam2_jax.cli import main
for line in ({lines}):
  try:
    assert main(line) == 2, line
  except SystemExit:
    pass
  assert "jax" not in sys.modules, line
"""


def test_a_mistake_in_what_was_typed_is_said_before_jax_is_imported(tmp_path):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine").touch()
  (tmp_path / "x.pt").touch()
  lines = [
    ["--help"], ["predict", "--help"], ["train", "--nonsense"], ["convert", "nnunet", "--help"],
    ["quickstart", "--out", "full"], ["convert", "none.pt", "ckpt"], ["convert", "x.pt", "full"],
    ["convert", "x.pt", "ckpt", "--image-size", "100"], ["convert", "nnunet", "none", "ckpt"],
    ["report", "full", "full", "--out", "report"], ["evaluate", "none", "full"],
    ["shard", "none.yaml", "--devices", "0"],
  ]
  script = LIGHT.format(lines=", ".join(map(repr, lines)))
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
  assert done.returncode == 0, done.stderr
