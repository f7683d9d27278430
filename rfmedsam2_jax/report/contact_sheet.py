"""A contact sheet: slices of some cases with the contours of the truth and of every stage, as PNG.

Rows are slices, columns the image, the reference and the stages. In canonical orientation
(data.volumes) rows run to the back and columns to the left, as radiologists see axial slices.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rfmedsam2_jax.data.colours import colour
from rfmedsam2_jax.data.datasets import Structure
from rfmedsam2_jax.data.files import replacing
from rfmedsam2_jax.evaluation.metrics import dice

_PANEL = 2.1  # inches, width of a panel
_MARGIN = 0.5  # share of the structures' extent that is shown around them, half on either side


@dataclasses.dataclass(frozen=True, eq=False)
class SheetCase:
  """One case of a contact sheet.

  Attributes:
    name: shown beside its rows.
    image: canonical [D, H, W].
    truth: whole-number label map [D, H, W], or None.
    predictions: label map of each stage by its column's title, all cases alike.
    spacing: mm along the axes.
    window: intensities that become black and white; None: by those of the structures.
    ignore: value of `truth` where nothing is known, which no score sees.
  """

  name: str
  image: np.ndarray
  truth: np.ndarray | None
  predictions: Mapping[str, np.ndarray]
  spacing: tuple[float, float, float]
  window: tuple[float, float] | None = None
  slice_axis: int = 0
  ignore: int | None = None


def save_contact_sheet(
  path: str | Path, cases: Sequence[SheetCase], structures: Sequence[Structure],
  slices_per_case: int = 3, crop: bool = True,
) -> Path:
  """Writes the picture; returns its path.

  Args:
    cases: at least one; all with the same columns.
    slices_per_case: rows of each case, spread over the slices that hold a structure.
    crop: show the surroundings of the structures only.
  """
  reference = [] if cases[0].truth is None else ["reference"]
  columns = ["image", *reference, *cases[0].predictions]
  panels = [row for case in cases for row in _rows(case, structures, slices_per_case, crop)]
  # Slices of strange voxels may be a thousand times as high as wide; they are shown smaller.
  heights = [_PANEL * min(max(row["shape"][0] / row["shape"][1], 1 / 8), 8.0) for row in panels]
  title, legend = 0.35, 0.25 + 0.22 * -(-len(structures) // 6)
  width, height = _PANEL * len(columns) + 0.4, sum(heights) + 0.06 * len(panels) + title + legend
  figure = Figure(figsize=(width, height), dpi=100, facecolor="black")
  grid = figure.add_gridspec(
    len(panels), len(columns), height_ratios=heights, wspace=0.03, hspace=0.03,
    left=0.4 / width, right=1 - 0.02 / width, top=1 - title / height, bottom=legend / height,
  )
  named: list[tuple[Structure, Any]] = [
    (s, tuple(c / 255 for c in colour(i))) for i, s in enumerate(structures)
  ]
  axes = grid.subplots(squeeze=False)
  for row, places in zip(panels, axes, strict=True):
    for name, place in zip(columns, places, strict=True):
      _panel(place, row, name, named)
    places[0].set_ylabel(row["title"], color="white", fontsize=7)
  for name, place in zip(columns, axes[0], strict=True):
    place.set_title(name, color="white", fontsize=10)
  handles: list[Any] = [Line2D([], [], color=shown, label=s.name) for s, shown in named]
  handles += [Line2D([], [], color="white", linestyle=":", label=name) for name in reference]
  figure.legend(
    handles=handles, loc="lower center", ncol=min(len(handles), 6), fontsize=8, frameon=False,
    labelcolor="white",
  )
  with replacing(path) as temporary:
    figure.savefig(temporary, format="png", facecolor="black")
  return Path(path)


def _rows(
  case: SheetCase, structures: Sequence[Structure], count: int, crop: bool
) -> list[dict[str, Any]]:
  """What the panels of each slice need: image, label maps, spacing, window."""
  axis = case.slice_axis
  truth = {} if case.truth is None else {"reference": case.truth}
  image = _upright(case.image, axis)
  maps = {name: _upright(array, axis) for name, array in {**truth, **case.predictions}.items()}
  spacing = np.delete(case.spacing, axis).tolist()
  shown = np.isin(next(iter(maps.values())), [value for s in structures for value in s.values])
  if not shown.any():
    shown = np.ones_like(shown)
  window = case.window or window_of(image, shown)
  box = (slice(None), slice(None))
  if crop:
    box = (_surroundings(shown.any(axis=(0, 2))), _surroundings(shown.any(axis=(0, 1))))
  rows, columns = image[0][box].shape
  # Slices at even shares of the structures' volume: each row shows as much as the others.
  areas = shown.sum(axis=(1, 2)).cumsum()
  shares = (np.arange(count) + 0.5) / count * areas[-1]
  return [{
    "title": f"{case.name}  slice {position + 1}/{len(image)}",
    "image": image[position][box],
    "maps": {name: array[position][box] for name, array in maps.items()},
    "shape": (rows * spacing[0], columns * spacing[1]),
    "aspect": spacing[0] / spacing[1],
    "window": window,
    "ignore": case.ignore,
  } for position in sorted({int(np.searchsorted(areas, share)) for share in shares})]


def _upright(volume: np.ndarray, axis: int) -> np.ndarray:
  """Slices first; rows that run along z start at the head."""
  slices = np.moveaxis(volume, axis, 0)
  return slices if axis == 0 else slices[:, ::-1]


def _surroundings(occupied: Any) -> slice:
  """The occupied part of a side, bool [n], and some of what lies around it."""
  hits = np.flatnonzero(occupied)
  reach = _MARGIN * (hits[-1] - hits[0] + 1) / 2 + 4
  return slice(max(0, int(hits[0] - reach)), int(hits[-1] + reach) + 1)


def window_of(image: np.ndarray, shown: np.ndarray) -> tuple[float, float]:
  """What becomes black and white: the structures' own intensities and as much again.

  Air and metal do not decide. `shown`: bool of the image's shape, at least one voxel.
  """
  low, high = np.percentile(image[shown], (1, 99))
  reach = (high - low) / 2
  return float(low - reach), float(high + reach + 1e-6)


def _panel(axes, row: dict[str, Any], name: str, named: list[tuple[Structure, Any]]) -> None:
  low, high = row["window"]
  axes.imshow(
    row["image"], cmap="gray", vmin=low, vmax=high, aspect=row["aspect"], interpolation="bilinear"
  )
  axes.set(xticks=[], yticks=[])
  axes.spines[:].set_visible(False)
  if name == "image":
    return
  scores, truth = [], row["maps"].get("reference")
  for structure, shown in named:
    mask = np.isin(row["maps"][name], structure.values)
    _contour(axes, mask, colors=[shown], linewidths=1.1)
    if truth is not None and name != "reference":
      true_mask = np.isin(truth, structure.values)
      _contour(axes, true_mask, colors="white", linewidths=0.6, linestyles=":")
      known = True if row["ignore"] is None else truth != row["ignore"]
      scores.append(dice(mask & known, true_mask & known))
  # The Dice of what is seen here, not of the volume: it tells where to look.
  if scores and not np.isnan(scores).all():
    axes.text(
      0.02, 0.02, f"{np.nanmean(scores):.3f}", transform=axes.transAxes, color="white",
      fontsize=7, va="bottom", bbox={"facecolor": "black", "alpha": 0.6, "pad": 1, "lw": 0},
    )


def _contour(axes, mask: np.ndarray, **style: Any) -> None:
  if not mask.any():
    return
  # Padded, so that what touches the border is closed there.
  rows, columns = (np.arange(-1, n + 1) for n in mask.shape)
  axes.contour(columns, rows, np.pad(mask, 1).astype(np.float32), [0.5], **style)
  axes.set(xlim=(-0.5, mask.shape[1] - 0.5), ylim=(mask.shape[0] - 0.5, -0.5))
