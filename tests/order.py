"""The order in which files of tests are given out."""

from collections.abc import Sequence

import pytest


def long_files_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
  """Files with a test that is marked `slow`, then all others; else the order stays as it is.

  So no process ends with minutes to go while the others have nothing left. Marks and the order of
  collection decide and nothing else, since all processes must come to the same order.
  """
  long = {item.path for item in items if item.get_closest_marker("slow")}
  return sorted(items, key=lambda item: item.path not in long)
