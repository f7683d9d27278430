"""Box plots as numbers: what a page's template draws."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.cbook import boxplot_stats
from matplotlib.ticker import MaxNLocator

from rfmedsam2_jax.data.colours import colour


class Box(NamedTuple):
  """One structure's cases."""

  name: str
  colour: str
  # Matplotlib's whislo, q1, med, q3 and whishi; whiskers reach the outermost case within 1.5
  # quartile distances.
  stats: Mapping[str, float]
  cases: Sequence[tuple[str, float]]  # name and value, the lowest first


class BoxPlot(NamedTuple):
  """A row per structure over one axis from `low` to `high`."""

  title: str
  low: float
  high: float
  boxes: Sequence[Box]

  def x(self, value: float) -> float:
    """The place of a value, from 0 to 1."""
    return (value - self.low) / (self.high - self.low)

  @property
  def ticks(self) -> list[tuple[str, float]]:
    """Texts and places."""
    marks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
    return [(f"{mark:g}", self.x(mark)) for mark in marks if -1e-9 < self.x(mark) < 1 + 1e-9]


def css_colour(index: int) -> str:
  """The colour of the structure at `index` for a style sheet."""
  return "rgb({}, {}, {})".format(*colour(index))


def box_plot(
  title: str, values: Mapping[str, Sequence[tuple[str, float]]], top: float | None = None
) -> BoxPlot | None:
  """None if no value is known.

  Args:
    values: (case, value) by structure; nan is left out.
    top: of the axis, if it has an end (1 for a Dice): then it begins below the least value.
  """
  boxes = []
  for index, (name, cases) in enumerate(values.items()):
    known = sorted(((c, v) for c, v in cases if math.isfinite(v)), key=lambda pair: pair[1])
    if known:
      (stats,) = boxplot_stats([value for _, value in known])
      boxes.append(Box(name, css_colour(index), stats, known))
  if not boxes:
    return None
  if top is None:
    return BoxPlot(title, 0.0, max(box.cases[-1][1] for box in boxes) * 1.05 or 1.0, boxes)
  least = min(box.cases[0][1] for box in boxes)
  return BoxPlot(title, min(math.floor(least * 10) / 10, top - 0.1), top, boxes)
