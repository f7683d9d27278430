"""The rooms of the package and the way through them: who may import whom (docs/architecture.md)."""

import ast
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rfmedsam2_jax"

LEAVES = {"errors", "interruption", "progress"}
# What each room may import besides itself and the leaves.
ALLOWED = {
  "errors": set(),
  "interruption": set(),
  "progress": set(),
  "nn": set(),
  "losses": set(),
  "metrics": set(),
  "data": set(),
  "parallel": set(),
  "weights": {"nn"},
  "memory": {"nn"},
  "tracking": {"nn", "memory"},
  "refinement": {"nn", "parallel", "memory", "tracking"},
  "inference": {"nn", "data", "metrics", "parallel", "memory", "tracking", "refinement"},
  "training": {
    "nn", "data", "losses", "metrics", "parallel", "weights", "memory", "tracking", "refinement",
    "inference",
  },
  "report": {"nn", "data", "losses", "metrics", "inference", "training"},
}
LAST = {
  "config", "phases", "networks", "experiment", "shard", "api", "prompting", "serve", "cli",
  "quickstart", "validation", "__init__", "__main__",
}


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


def room_of(path: Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_is_part_of_the_wheel():
  settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))
  rooms = {f"rfmedsam2_jax.{p.parent.name}" for p in PACKAGE.glob("*/__init__.py")}
  listed = set(settings["tool"]["setuptools"]["packages"])
  assert listed == rooms | {"rfmedsam2_jax", "rfmedsam2_jax.configs"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_rooms_import_only_what_lies_before_them(path):
  room = room_of(path)
  if room in LAST:
    return
  assert room in ALLOWED, f"{room} is a new room: say what it may import"
  assert imports_of(path) <= ALLOWED[room] | LEAVES | {room}


def test_the_package_never_imports_torch_or_the_converter():
  for path in PACKAGE.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
      names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
      assert not any(name.split(".")[0] in ("torch", "convert") for name in names), path
