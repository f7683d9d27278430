"""The rooms of the package and the way through them: who may import whom (docs/architecture.md)."""

import ast
import collections
import re
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rfmedsam2_jax"

# From the ground up: a room imports itself and what stands before it.
ORDER = (
  "base", "nn", "data", "programs", "parallel", "weights", "tracking", "refinement", "evaluation",
  "segmentation", "report", "prompted", "config", "model", "archive", "client", "serve",
  "training", "cli",
)
# Rooms that stand side by side.
APART = [{"evaluation", "segmentation"}, {"evaluation", "prompted"}, {"segmentation", "prompted"}]
# What only the rooms from one on may import of other people's packages.
FIRST_ROOM = {"optax": "training", "tensorboardX": "training"}


def imports_of(path: Path) -> set[str]:
  """Rooms that a file imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names = [node.module]
      if node.module == "rfmedsam2_jax":
        names = [f"rfmedsam2_jax.{alias.name}" for alias in node.names]
    for name in names:
      if name.startswith("rfmedsam2_jax."):
        found.add(name.split(".")[1])
  return found


def packages_of(path: Path) -> set[str]:
  """Top-level packages that a file imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    found |= {name.split(".")[0] for name in names}
  return found


def room_of(path: Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_is_part_of_the_wheel():
  settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))
  rooms = {f"rfmedsam2_jax.{p.parent.name}" for p in PACKAGE.glob("*/__init__.py")}
  listed = set(settings["tool"]["setuptools"]["packages"])
  others = {"rfmedsam2_jax", "rfmedsam2_jax.configs", "rfmedsam2_jax.convert"}
  assert listed == rooms | others


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_rooms_import_only_what_lies_before_them(path):
  room = room_of(path)
  if room in ("__init__", "__main__"):
    return
  assert room in ORDER, f"{room} is a new room: say where it stands"
  before = set(ORDER[: ORDER.index(room) + 1])
  neighbours = set().union(*(pair - {room} for pair in APART if room in pair))
  assert imports_of(path) <= before - neighbours


@pytest.mark.parametrize("package", FIRST_ROOM)
def test_rooms_before_training_do_not_know_its_packages(package):
  first = ORDER.index(FIRST_ROOM[package])
  for path in PACKAGE.rglob("*.py"):
    if room_of(path) in ORDER[:first]:
      assert package not in packages_of(path), path


def test_the_architecture_page_lists_the_rooms_in_their_order():
  page = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
  table = page[page.index("## Rooms") : page.index("## Training")]
  assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.M)) == ORDER


def test_no_three_modules_have_one_name():
  names = collections.Counter(path.stem for path in PACKAGE.rglob("*.py"))
  assert [name for name, n in names.items() if n > 2 and name != "__init__"] == []


def test_the_package_never_imports_torch_or_the_converter():
  for path in PACKAGE.rglob("*.py"):
    assert not packages_of(path) & {"torch", "convert"}, path
    assert "convert" not in imports_of(path), path
  # But for its command, and that by name, when it runs.
  by_name = [p for p in PACKAGE.rglob("*.py") if "rfmedsam2_jax.convert" in p.read_text("utf-8")]
  assert by_name == [PACKAGE / "cli" / "convert.py"]


def test_the_client_knows_nothing_of_the_package():
  assert not imports_of(PACKAGE / "client.py")
  for path in PACKAGE.rglob("*.py"):
    assert "client" not in imports_of(path), path
