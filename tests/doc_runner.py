"""Runs one documented command as a reader would, or says why only its arguments are checked."""

import argparse
import contextlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

from api_server import KEY
from doc_lines import ROOT, commands_of
from doc_places import Places, small

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli import entry
from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.data.phantom import PhantomConfig

# Programs whose commands no test runs, and why. CONTRIBUTING.md has the same list.
NOT_RUN = {
  "pip": "installs from the network; the extras that it names are compared with pyproject.toml",
  "docker": "needs a container engine",
  "make": "sets everything up or runs all tests; `make -n` shows that its target exists",
  "pytest": "these tests run by themselves; that the command selects some is checked",
  "benchmarks": "take minutes; their arguments go through their own parsers",
  "srun": "needs a cluster; the command behind it is parsed, its config read",
  "mpirun": "needs a cluster; the command behind it is parsed, its config read",
  "gcloud": "needs a cloud; commands within are parsed, their configs read",
  "--distributed": "needs several processes; the command is parsed, its config read",
  "gs://BUCKET": "needs a bucket; the command is parsed; tests/test_buckets.py does the like",
  "rfmedsam2_jax.report.niivue": "downloads; that the module exists is checked",
  "rfmedsam2 fetch": "downloads; its arguments are parsed",
  "--programs": "traces networks for three platforms; tests/test_programs.py does it",
  "run_programs.py": "is in what `--programs` makes; tests/test_programs.py runs it",
  "unzip": "unpacks what `--programs` makes",
  "scontrol": "needs a cluster",
  "sudo": "changes the machine",
  "tensorboard": "is not installed with the package",
}
SHELL_WORDS = ("cd", "[", "export", "set", "mkdir", "source", "exit")  # nothing to check
HELP = """
Correct the line. If it names a file that a reader has and the test has not, add a stand-in for the
path to STAND_INS in tests/doc_places.py. If no test can run its program, add the program and the
reason to NOT_RUN in tests/doc_runner.py and to CONTRIBUTING.md. Output goes into a block ```text.
"""
# Instead of paths and numbers in the pattern of a command: such a line is parsed, not run. CT and
# MR are modalities.
PLACEHOLDER = re.compile(
  r"^(?!(?:CT|MR)$)\[?-*[A-Z][A-Z0-9]*[A-Z.]*\]?$|^[NK]$|^\[path=value$|^\.\.\.\]?$")


class Wrong(AssertionError):
  def __init__(self, words: list[str], reason: str):
    super().__init__(f"{' '.join(words)}\n{reason}\n{HELP}")


class _Parsed(Exception):
  pass


class Runner:
  """Runs commands in `folder`, where results of earlier ones are there for later ones.

  Args:
    places: gives what the commands read; None: arguments and configs are checked, nothing is run.
  """

  def __init__(self, places: Places | None, folder: Path):
    self._places, self._folder = places, folder
    self._variables: dict[str, str] = {}

  def __call__(self, text: str) -> None:
    text = re.sub(r"\b([A-Z]+)\|[A-Z]+\b", r"\1", text)  # RUN|PREDICTIONS, in a pattern
    if "$SERVER" in text:
      self._ask_server(text)
      return
    for words in commands_of(text):
      try:
        self._command(words)
      except UserError as error:
        raise Wrong(words, str(error)) from None
      except SystemExit as error:
        if error.code:
          raise Wrong(words, "its arguments are wrong; see below") from None

  def _ask_server(self, text: str) -> None:
    """A script that asks a server by curl: run by bash, with the address of one of the tests."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    if self._places is None or shutil.which("curl") is None:
      return
    self._places.provide(re.findall(r"[\w./]+\.nii\.gz", text), self._folder)
    with self._places.server(self._folder) as address:
      own = re.sub(r"^SERVER=http://[^/]+", f"SERVER={address}", text, flags=re.M)
      done = subprocess.run(
        ["bash", "-euo", "pipefail"], input=own, cwd=self._folder, capture_output=True, text=True,
        env={**os.environ, "RFMEDSAM2_KEY": KEY})
    print(done.stdout, done.stderr)
    if done.returncode:
      raise Wrong(["bash"], f"exit status {done.returncode}; what it said is above")

  def _command(self, words: list[str]) -> None:
    words = list(words)
    while words and (match := re.match(r"^([A-Z][A-Z_0-9]*)=(.*)$", words[0], re.S)):
      self._variables[match[1]] = match[2]
      words.pop(0)
    if len(words) < 2:  # nothing, or a program that is only named
      return
    program = Path(words[0]).name  # ~/venv/bin/pip is pip
    if program == "rfmedsam2":
      self._rfmedsam2(words[1:])
    elif program in ("python", "python3"):
      self._python(words)
    elif program in ("srun", "mpirun"):
      start = [i for i, word in enumerate(words) if Path(word).name == "rfmedsam2"]
      if not start:
        raise Wrong(words, "launches nothing of this project")
      self._parse_rfmedsam2(words[start[0] + 1:])
    elif program == "gcloud":
      for word in words:
        if word.startswith("--command="):
          Runner(None, self._folder)(word.removeprefix("--command="))
    elif program == "make":
      done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
      if done.returncode:
        raise Wrong(words, done.stderr)
    elif program == "pip":
      self._pip(words)
    elif program == "pytest":
      self._pytest(words)
    elif program not in NOT_RUN and program not in SHELL_WORDS:
      raise Wrong(words, f"no test knows what {program} is")

  def _rfmedsam2(self, words: list[str]) -> None:
    named = len(words) == 1
    # No network, no cluster, no minute.
    parsed = words[0] == "fetch" or "--distributed" in words or "--programs" in words
    parsed = parsed or any("gs://BUCKET" in word or "s3://BUCKET" in word for word in words)
    if "--topology" in words:  # its compiler is in an extra of its own
      parsed = parsed or importlib.util.find_spec("libtpu") is None
    if self._places is None or named or _is_pattern(words) or parsed:
      self._parse_rfmedsam2(words)
      return
    words = [self._moved(word) for word in words]
    options = self._parse_rfmedsam2(words, configs=False)
    self._make_room(options)
    command = words[0]
    if command in ("train", "quickstart"):
      words = small(words)
    if command == "serve":
      words += ["--port", "0"]
    if command == "convert" and words[1] != "nnunet" and not (
      options.to_torch or options.to_safetensors or options.config
    ):
      words += ["--config", str(self._places.network(self._folder))]
    if command == "shard":  # has devices of its own: a process of its own
      line = [sys.executable, "-m", "rfmedsam2_jax", *words, "--no-compile"]
      done = subprocess.run(line, cwd=self._folder, capture_output=True, text=True)
      status = done.returncode
      print(done.stderr)
    else:
      # The server would wait for a browser, and thirty phantoms take a minute.
      with mock.patch("uvicorn.Server.run"), mock.patch(
        "rfmedsam2_jax.data.phantom.PhantomConfig", few_phantoms
      ):
        status = entry.main(words)
    if status:
      raise Wrong(["rfmedsam2", *words], f"exit status {status}; its line is below")

  def _python(self, words: list[str]) -> None:
    rest = words[1:]
    if rest[:2] == ["-m", "convert"]:
      if rest[2:]:
        self._rfmedsam2(["convert", *rest[2:]])
    elif rest[:2] == ["-m", "rfmedsam2_jax"]:
      if rest[2:]:
        self._rfmedsam2(rest[2:])
    elif rest[0] == "-m" and rest[1] in NOT_RUN and importlib.util.find_spec(rest[1]):
      pass
    elif Path(rest[0]).name in NOT_RUN:
      pass
    elif rest[:2] == ["-m", "pip"]:
      self._pip(rest[1:])
    elif rest[:2] == ["-m", "venv"]:
      pass
    elif rest and rest[0].startswith(("benchmarks/", "tests/")):
      self._parse_script(rest)
    else:
      raise Wrong(words, "no test knows what this is")

  def _make_room(self, options: argparse.Namespace) -> None:
    """Stand-ins for what is read; what a line before has written elsewhere on the page is moved."""
    out = getattr(options, "out", None)
    keeps = getattr(options, "resume", False) or getattr(options, "overwrite", False)
    if out is not None and not keeps:
      path = self._folder / out
      if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
      else:
        path.unlink(missing_ok=True)
    read: list[str] = []
    for name, value in vars(options).items():
      for one in value if isinstance(value, list) else [value]:
        if isinstance(one, Path | str) and name != "out":
          read.append(str(one))
    assert self._places
    self._places.provide([path for path in read if path != str(out)], self._folder)

  def _moved(self, word: str) -> str:
    """Absolute paths of an example lie below the folder."""
    return re.sub(r"(^|=)/(?=data|shared)", rf"\g<1>{self._folder.parent}/", word)

  def _parse_rfmedsam2(self, words: list[str], configs: bool = True) -> argparse.Namespace:
    words = [self._value(word) for word in words]
    if _is_pattern(words):
      words = [word.strip("[].").replace("path=value", "seed=1") for word in words]
      words = ["1" if word == "N" else word for word in words if word and word != "COMMAND"]
    if len(words) == 1:  # the command's name alone
      if words[0] not in (*entry.COMMANDS, "--help", "--version"):
        raise Wrong(["rfmedsam2", *words], "there is no such command")
      return argparse.Namespace()
    options = entry.parse(words)
    if configs and getattr(options, "config", None) and (ROOT / options.config).is_file():
      load_config(ROOT / options.config, options.overrides)
    return options

  def _value(self, word: str) -> str:
    """A word that is a variable of the block."""
    return self._variables.get(word[1:], word) if word.startswith("$") else word

  def _parse_script(self, words: list[str]) -> None:
    if not (ROOT / words[0]).is_file():
      raise Wrong(words, "there is no such file")
    words = ["1" if word == "N" else word.strip("[]") for word in words]

    def only(parse):
      def parse_only(self, *arguments, **options):
        parse(self, *arguments, **options)
        raise _Parsed

      return parse_only

    parser = argparse.ArgumentParser
    folders = [str((ROOT / words[0]).parent), *sys.path]
    with contextlib.ExitStack() as stack:
      for name in ("parse_args", "parse_intermixed_args"):
        stack.enter_context(mock.patch.object(parser, name, only(getattr(parser, name))))
      stack.enter_context(mock.patch.object(sys, "argv", words))
      stack.enter_context(mock.patch.object(sys, "path", folders))
      try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
      except _Parsed:
        return
      except SystemExit:
        pass
    raise Wrong(words, "its own parser does not take these arguments")

  def _pytest(self, words: list[str]) -> None:
    """Whether some test has the name and the mark; collecting them would import everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="*", default=["tests"])
    parser.add_argument("-k", default="")
    parser.add_argument("-m", default="")
    parser.add_argument("-s", action="store_true")
    options = parser.parse_intermixed_args(words[1:])
    for path in options.paths:
      file = ROOT / path.partition("::")[0]
      for test in sorted(file.rglob("test_*.py")) if file.is_dir() else [file]:
        if not test.is_file():
          continue
        text = test.read_text("utf-8")
        names = [test.stem, *re.findall(r"def (test_\w+)", text)]
        marked = not options.m or f"mark.{options.m}" in text
        if marked and any(k in name for k in options.k.split(" or ") for name in names):
          break
      else:
        raise Wrong(words, f"selects no test of {path}")

  def _pip(self, words: list[str]) -> None:
    if words[1:] and words[1] not in ("install", "wheel"):
      raise Wrong(words, "no test knows what this is")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
      "optional-dependencies"
    ]
    for names in re.findall(r"(?:rfmedsam2-jax|\.)\[([^\]]*)\]", " ".join(words)):
      for name in names.split(","):
        if name not in extras:
          raise Wrong(words, f"pyproject.toml has no extra {name}")


def _is_pattern(words: list[str]) -> bool:
  return any(PLACEHOLDER.match(word) for word in words)


def few_phantoms(seed: int = 0) -> PhantomConfig:
  """Instead of thirty large ones, which take a minute."""
  return PhantomConfig(
    cases=4, test_cases=2, slice_spacing=(9.0, 10.0), pixel_spacing=(5.0, 6.0), seed=seed
  )
