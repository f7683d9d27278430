"""Curves of a run: losses and validation Dice over the steps, from log.jsonl to a PNG or a page."""

import io
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.files import replacing

Curves = dict[str, list[tuple[int, float]]]

_VALIDATION = "validation/"
# What the log has beside what is drawn.
_OTHER = {
  "phase", "step", "time", "gradient_norm", "steps_per_second", "volumes_per_second",
  "slices_per_second", "cells_per_second", "tflops_per_device", "mfu", "peak_gib",
}


def read_log(path: str | Path) -> dict[str, Curves]:
  """The numbers of a log by phase and name, in the order of the steps.

  Raises:
    UserError: no log.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f"{path}: does not exist; give the log.jsonl of a run that has begun")
  phases: dict[str, Curves] = defaultdict(lambda: defaultdict(list))
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      entry = json.loads(line)
      phase, step = str(entry["phase"]), int(entry["step"])
    except (ValueError, KeyError, TypeError):
      continue  # the last line of a run that was killed
    for name, value in entry.items():
      if name not in _OTHER and isinstance(value, int | float) and math.isfinite(value):
        phases[phase][name].append((step, value))
  return {phase: {n: sorted(points) for n, points in c.items()} for phase, c in phases.items()}


def save_curves(log: str | Path, path: str | Path) -> Path:
  """Draws one row per phase: losses on the left, validation scores on the right if there are any.

  Args:
    log: log.jsonl of a run: lines {"phase", "step", name: number, "validation/NAME": number}.
    path: of the PNG, which is returned.
  """
  figure = _figure(read_log(log))
  with replacing(path) as temporary:
    figure.savefig(temporary, format="png")
  return Path(path)


def curves_svg(phases: dict[str, Curves]) -> str:
  """The same as SVG elements for a page, one per phase, in the page's own font and text colour."""
  colour = "#010203"  # stands for the page's until the picture is in it
  text = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
  style: dict[Any, Any] = {
    **dict.fromkeys(text, colour), "svg.fonttype": "none", "svg.hashsalt": "curves",
    "font.family": "sans-serif", "legend.framealpha": 0,
  }
  none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
  found = []
  for phase, curves in phases.items():
    buffer = io.StringIO()
    with matplotlib.rc_context(style):
      _figure({phase: curves}).savefig(buffer, format="svg", transparent=True, metadata=none)
    picture = buffer.getvalue()
    found.append(picture[picture.index("<svg"):].replace(colour, "currentColor"))
  return "\n".join(found)


def _figure(phases: dict[str, Curves]) -> Figure:
  validated = any(name.startswith(_VALIDATION) for curves in phases.values() for name in curves)
  rows, columns = max(len(phases), 1), 2 if validated else 1
  figure = Figure(figsize=(5.5 * columns, 3.2 * rows), dpi=100, layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False)
  for row, (phase, curves) in zip(grid, phases.items(), strict=False):
    scores = {n: p for n, p in curves.items() if n.startswith(_VALIDATION)}
    losses = {n: p for n, p in curves.items() if n not in scores and n != "learning_rate"}
    _draw(row[0], losses, f"{phase}: training")
    # Parts of the loss span decades.
    if all(value > 0 for points in losses.values() for _, value in points):
      row[0].set_yscale("log")
    if validated:
      _draw(row[1], scores, f"{phase}: validation", marker="o")
      row[1].set_visible(bool(scores))
  return figure


def _draw(axes, curves: Curves, title: str, marker: str = "") -> None:
  for name, points in curves.items():
    steps, values = zip(*points, strict=True)
    label = name.removeprefix(_VALIDATION)
    width = 1.8 if label == "loss" else 1  # the total stands out among its parts
    axes.plot(steps, values, label=label, marker=marker, markersize=3, linewidth=width)
  axes.set_title(title, fontsize=10)
  axes.set_xlabel("step")
  axes.grid(alpha=0.3)
  if curves:
    axes.legend(fontsize=7)
