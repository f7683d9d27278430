"""What the documents tell a reader to type works: every command and every block of code.

Commands run in a folder with stand-ins for the files that they name, small enough for seconds
(doc_places); what no test can run is listed with its reason (doc_runner.NOT_RUN). Blocks of a
tutorial follow each other in one folder, others have one each.
"""

import contextlib
import json
import re
import shlex
import subprocess
from dataclasses import replace

import pytest
import yaml
from api_server import KEY
from doc_lines import PAGES, ROOT, SHELL, Block, blocks_of
from doc_places import Places, prepare
from doc_runner import NOT_RUN, Runner, few_phantoms

from rfmedsam2_jax.client import Client
from rfmedsam2_jax.config import parse_config

BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def whole_tutorials(blocks: list[Block]) -> list[Block]:
  """The shell blocks of a tutorial as one."""
  pages: dict[str, list[Block]] = {}
  for block in blocks:
    key = block.page if block.page.startswith("docs/tutorials/") else block.place
    pages.setdefault(key, []).append(block)
  return [replace(first, text="\n".join(b.text for b in (first, *rest)))
          for first, *rest in pages.values()]


# What the text around a page's Python takes as given.
GIVEN = {
  "README.md": """
import jax, numpy as np, rfmedsam2_jax
array = np.random.default_rng(0).normal(50, 20, (20, 40, 40)).astype(np.float32)
images = np.zeros((1, 192, 192, 3), np.float32)
boxes = np.array([[20.0, 30.0, 100.0, 120.0]], np.float32)
""",
  "docs/trust.md": 'import rfmedsam2_jax; model = rfmedsam2_jax.load("runs/hippocampus")',
}
# Pages whose Python asks a server.
SERVED = ("docs/api.md",)
# What a page's Python makes itself.
MADE = {"docs/tutorials/own_data.md": {"phantoms"}}


def _trains_once_more(block: Block) -> bool:
  """Training and its compilation take long: only one page of it is part of make test."""
  trains = re.search("rfmedsam2 (train|quickstart)", block.text)
  return bool(trains) and block.page != "docs/tutorials/own_data.md"


def of(*languages: str, inline: bool = False, join=list, full=lambda block: False):
  """The blocks of some languages; a command within the text once, wherever it stands."""
  found: dict[str, Block] = {}
  chosen = [b for b in BLOCKS if b.language in languages and b.inline == inline]
  for block in join(chosen):
    found.setdefault(block.text if inline else block.place, block)
  return [
    pytest.param(b, id=b.place, marks=[pytest.mark.full] if full(b) else []) for b in found.values()
  ]


@pytest.fixture(scope="module")
def places(phantoms, tiny_run, tmp_path_factory):
  return Places(phantoms, tiny_run, tmp_path_factory.mktemp("stand_ins"))


def _is_script(block: Block) -> bool:
  return block.text.startswith("#!")


@pytest.fixture
def runner(places, tmp_path, monkeypatch):
  here = prepare(tmp_path)
  monkeypatch.chdir(here)
  monkeypatch.setenv("RFMEDSAM2_HOME", str(tmp_path / "home"))
  return Runner(places, here)


@pytest.mark.parametrize("block", of(*SHELL) + of("", inline=True))
def test_arguments_and_configs_of_a_command_are_taken(block, tmp_path):
  Runner(None, tmp_path)(block.text)


@pytest.mark.slow
@pytest.mark.parametrize("block", of(*SHELL, join=whole_tutorials, full=_trains_once_more))
def test_the_commands_of_a_block_run(block, runner):
  if _is_script(block):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
  runner(block.text)


@pytest.mark.slow
@pytest.mark.parametrize("block", of("", inline=True, full=_trains_once_more))
def test_a_command_within_the_text_runs(block, runner):
  runner(block.text)


@pytest.fixture
def stack():
  with contextlib.ExitStack() as stack:
    yield stack


@pytest.mark.slow
@pytest.mark.parametrize(
  "page", sorted({block.page for block in BLOCKS if block.language == "python"})
)
def test_the_python_of_a_page_runs(page, places, tmp_path, monkeypatch, stack):
  here = prepare(tmp_path)
  monkeypatch.chdir(here)
  monkeypatch.setattr("rfmedsam2_jax.data.phantom.PhantomConfig", few_phantoms)
  names: dict = {}
  code = GIVEN.get(page, "")
  if page in SERVED:
    address = stack.enter_context(places.server(here))
    monkeypatch.setenv("RFMEDSAM2_KEY", KEY)
    monkeypatch.setattr("rfmedsam2_jax.client.Client", lambda documented: Client(address))
  for block in BLOCKS:
    if (block.page, block.language) == (page, "python"):
      named = set(re.findall(r'"([^"\n]+)"', code + block.text))
      places.provide(named - MADE.get(page, set()), here)
      exec(compile(code, f"what {page} takes as given", "exec"), names)
      code = ""
      exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)


@pytest.mark.parametrize("block", of("yaml", "json"))
def test_configs_and_json_can_be_read(block, tmp_path):
  if block.language == "json":
    json.loads(block.text)
    return
  for document in yaml.safe_load_all(block.text):
    if "apiVersion" in document:  # of Kubernetes
      for words in _commands_in(document):
        Runner(None, tmp_path)(shlex.join(words))
    else:
      parse_config(document, block.place)


def _commands_in(tree):
  if isinstance(tree, dict):
    yield from [tree["command"]] if "command" in tree else []
    tree = [*tree.values()]
  for item in tree if isinstance(tree, list) else []:
    yield from _commands_in(item)


def test_every_block_is_of_a_kind_that_is_tested_or_output():
  known = (*SHELL, "python", "yaml", "json", "text", "toctree", "eval-rst")
  unknown = [f"{b.place}: {b.language}" for b in BLOCKS if b.language not in known]
  assert not unknown, f"teach tests/test_docs.py what to do with {unknown}"
  hidden = [
    f"{b.place}: {line}" for b in BLOCKS if b.language == "text" for line in b.text.split("\n")
    if re.match(r"(rfmedsam2|python|make|pip|pytest) ", line)
  ]
  assert not hidden, f"commands in a block of text: {hidden}"


def test_contributing_says_what_is_not_run():
  text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
  assert [name for name in NOT_RUN if f"`{name}`" not in text] == []
