"""Box plots as numbers: what a page's template draws."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from matplotlib.cbook import boxplot_stats
from matplotlib.ticker import MaxNLocator

from rfmedsam2_jax.data.colours import colour


@dataclasses.dataclass(frozen=True)
class Point:
  """A case: its name, value, and place on the axis from 0 to 1."""

  case: str
  value: float
  x: float


@dataclasses.dataclass(frozen=True)
class Box:
  """One structure's cases; whiskers reach the outermost case within 1.5 quartile distances.

  Attributes:
    whiskers, quartiles, median: places on the axis from 0 to 1.
  """

  name: str
  colour: str
  median_value: float
  whiskers: tuple[float, float]
  quartiles: tuple[float, float]
  median: float
  points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class BoxPlot:
  """A row per structure over one axis; `ticks` are texts and places."""

  title: str
  boxes: tuple[Box, ...]
  ticks: tuple[tuple[str, float], ...]


def css_colour(index: int) -> str:
  """The colour of the structure at `index` for a style sheet."""
  return "rgb({}, {}, {})".format(*colour(index))


def box_plot(
  title: str, values: Mapping[str, Sequence[tuple[str, float]]], top: float | None = None
) -> BoxPlot | None:
  """A box plot.

  Args:
    values: (case, value) by structure; nan is left out.
    top: of the axis, if it has an end (1 for a Dice): then it begins below the least value.

  Returns:
    None if no value is known.
  """
  known = {
    name: sorted(((c, v) for c, v in cases if math.isfinite(v)), key=lambda pair: pair[1])
    for name, cases in values.items()
  }
  every = [value for cases in known.values() for _, value in cases]
  if not every:
    return None
  if top is not None:
    low, high = min(math.floor(min(every) * 10) / 10, top - 0.1), top
  else:
    low, high = 0.0, max(every) * 1.05 or 1.0

  def place(value: float) -> float:
    return (value - low) / (high - low)

  boxes = []
  for index, (name, cases) in enumerate(known.items()):
    if cases:
      (box,) = boxplot_stats([value for _, value in cases])
      low_whisker, q1, median, q3, high_whisker = (
        place(float(box[key])) for key in ("whislo", "q1", "med", "q3", "whishi")
      )
      boxes.append(Box(
        name, css_colour(index), float(box["med"]), (low_whisker, high_whisker), (q1, q3), median,
        tuple(Point(case, value, place(value)) for case, value in cases),
      ))
  marks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
  within = [mark for mark in marks if -1e-9 < place(mark) < 1 + 1e-9]
  return BoxPlot(title, tuple(boxes), tuple((f"{mark:g}", place(mark)) for mark in within))
