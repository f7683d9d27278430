"""The order in which the files of tests are given out: those that take long first."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

from order import long_files_first

ROOT = Path(__file__).parents[1]


def item(file, name, *marks):
  return SimpleNamespace(
    path=Path(file), name=name, get_closest_marker=lambda mark: mark if mark in marks else None)


def test_files_with_a_slow_test_come_first_and_stay_whole():
  items = [item("a", 1), item("a", 2), item("b", 1), item("b", 2, "slow"), item("b", 3),
           item("c", 1, "full"), item("d", 1, "slow", "full")]
  found = [(x.path.name, x.name) for x in long_files_first(items)]
  assert found == [("b", 1), ("b", 2), ("b", 3), ("d", 1), ("a", 1), ("a", 2), ("c", 1)]


def test_the_files_of_this_run_are_in_this_order(request):
  """In every process that has a part in it; xdist runs nothing if two have different ones."""
  items = request.session.items
  long = {item.path for item in items if item.get_closest_marker("slow")}
  files = list(dict.fromkeys(item.path for item in items))
  assert set(files[:len(long)]) == long
  places = {file: [n for n, item in enumerate(items) if item.path == file] for file in files}
  assert all(where == list(range(where[0], where[-1] + 1)) for where in places.values())


def test_make_leaves_the_files_in_this_order():
  command = ["make", "-n", "test", "-o", "lint"]
  said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  assert "--dist loadfile --no-loadscope-reorder" in said
