"""How good prompted masks are on volumes with reference labels, and what the predicted IoU says.

python benchmarks/prompted.py [--checkpoint CKPT] --out FILE.json
    [--case NAME IMAGE LABELS VALUES WINDOW ...] [--dataset FOLDER --splits FILE [--cases N]]
    [--ways slices boxes middle ends clicks] [--curve FILE.png] [--sheet FILE.png]

Every structure is prompted from its reference, in five ways:
  slices: a box on every slice, each slice for itself, as if it were the volume;
  boxes: a box on every slice;
  middle: one box, on the middle one of its slices, and followed;
  ends: a box on its first, its middle and its last slice, and followed between these;
  clicks: the innermost point there, followed, and two corrections, each on the slice with most
    wrong voxels, in the middle of the largest error (SAM 2's "center"), followed again.
Dice is of whole volumes, on the image's grid, each structure for itself. Beside it stand the filled
boxes of every slice and an ellipse in each. VALUES: 1,2 or 1=spleen,2=liver. WINDOW as in `track`:
soft-tissue, percentiles, ...
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from scipy.stats import spearmanr

from rfmedsam2_jax import TrackingConfig, VoxelPrompt
from rfmedsam2_jax.data.datasets import Structure, read_dataset
from rfmedsam2_jax.data.splits import load_split
from rfmedsam2_jax.data.volumes import Volume, load_image, load_label_map
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.prompted.reference_boxes import box_of, boxes_of_ends
from rfmedsam2_jax.prompted.tracked import (
  PERCENTILES,
  PromptedVolume,
  TrackedVolume,
  parse_window,
)
from rfmedsam2_jax.report.contact_sheet import SheetCase, save_contact_sheet
from rfmedsam2_jax.weights.checkpoint import load_checkpoint

WAYS = "slices", "boxes", "middle", "ends", "clicks"
TITLES = {"slices": "a box on every slice", "boxes": "the same, followed",
          "middle": "one box, followed", "ends": "three boxes, followed between them",
          "clicks": "three clicks, followed"}
CORRECTIONS = 2


class Labelled(NamedTuple):
  name: str
  volume: Volume
  truth: dict[int, np.ndarray]  # bool [D, H, W] by value
  window: tuple[float, float] | None
  names: dict[int, str]


class Found(NamedTuple):
  """mask: bool [D, H, W]. iou: predicted, float32 [D]. presence: probabilities [D]."""

  mask: np.ndarray
  iou: np.ndarray
  presence: np.ndarray


def volumes(options: argparse.Namespace) -> Iterator[Labelled]:
  for name, image, labels, values, window in options.case:
    volume = load_image(image)
    array = load_label_map(labels, volume.geometry)
    pairs = [each.partition("=") for each in values.split(",")]
    names = {int(value): called or value for value, _, called in pairs}
    truth = {value: array == value for value in names}
    yield Labelled(name, volume, truth, parse_window(window), names)
  if options.dataset is None:
    return
  dataset, split = read_dataset(options.dataset), load_split(options.splits)
  wanted = set(split.validation)
  for case in [c for c in dataset.cases if c.identifier in wanted][: options.cases]:
    volume = load_image(case.images, len(dataset.channels))
    array = load_label_map(case.label, volume.geometry)
    truth = {s.values[0]: np.isin(array, s.values) for s in dataset.labels.structures}
    names = {s.values[0]: s.name for s in dataset.labels.structures}
    yield Labelled(case.identifier, volume, truth, parse_window(options.window), names)


def innermost(mask: np.ndarray) -> tuple[int, int]:
  """Row and column furthest from the border of a mask [H, W], the image's border included."""
  distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
  row, column = np.unravel_index(distance.argmax(), mask.shape)
  return int(row), int(column)


def correction(truth: np.ndarray, found: np.ndarray, value: int, number: int) -> VoxelPrompt | None:
  """A click in the middle of the largest error of the slice with most wrong voxels."""
  wrong = truth != found
  if not wrong.any():
    return None
  z = int(wrong.sum(axis=(1, 2)).argmax())
  missed, added = truth[z] & ~found[z], found[z] & ~truth[z]
  depths = [ndimage.distance_transform_edt(np.pad(m, 1)).max() for m in (missed, added)]
  inside = depths[0] > depths[1]
  y, x = innermost(missed if inside else added)
  return VoxelPrompt(value, points=((z, y, x, bool(inside)),), round=number)


def found_of(tracked: TrackedVolume) -> Found:
  return Found(tracked.labels > 0, tracked.iou[0], tracked.presence[0])


def follow(
  opened: Callable[..., PromptedVolume], case: Labelled, way: str, truth: np.ndarray,
  value: int,
) -> Found:
  """One structure, prompted in one of WAYS."""
  slices = np.flatnonzero(truth.any(axis=(1, 2)))
  if way == "slices":
    parts = {int(z): each_for_itself(opened, case, truth, value, int(z)) for z in slices}
    nothing = Found(np.zeros_like(truth[:1]), np.zeros(1), np.zeros(1))
    return Found(*map(np.concatenate, zip(
      *(parts.get(z, nothing) for z in range(len(truth))), strict=True)))
  prompted = opened(case.volume, between=way == "ends")
  middle = int(slices[len(slices) // 2])
  if way == "boxes":
    return found_of(prompted.track([box_of(truth, value, int(z)) for z in slices]))
  if way == "middle":
    return found_of(prompted.track([box_of(truth, value, middle)]))
  if way == "ends":
    return found_of(prompted.track(boxes_of_ends(truth, value)))
  y, x = innermost(truth[middle])
  tracked = prompted.track([VoxelPrompt(value, points=((middle, y, x, True),))])
  found = found_of(tracked)
  for number in range(1, CORRECTIONS + 1):
    click = correction(truth, found.mask, value, number)
    if click is None:
      break
    tracked = prompted.correct(tracked, [click])
    found = found_of(tracked)
  return found


def each_for_itself(
  opened: Callable[[Volume], PromptedVolume], case: Labelled, truth: np.ndarray, value: int, z: int
) -> Found:
  alone_here = dataclasses.replace(case.volume, array=case.volume.array[:, z : z + 1])
  tracked = opened(alone_here).track([box_of(truth[z : z + 1], value, 0)])
  return found_of(tracked)


def shapes(truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The filled box of every slice, and the ellipse in it: bool [D, H, W] each."""
  boxes, ellipses = np.zeros_like(truth), np.zeros_like(truth)
  rows, columns = np.ogrid[: truth.shape[1], : truth.shape[2]]
  for z in np.flatnonzero(truth.any(axis=(1, 2))):
    places = np.argwhere(truth[z])
    low, high = places.min(axis=0), places.max(axis=0) + 1
    boxes[z, low[0] : high[0], low[1] : high[1]] = True
    middle, radius = (low + high) / 2 - 0.5, (high - low) / 2
    ellipses[z] = (((rows - middle[0]) / radius[0]) ** 2
                   + ((columns - middle[1]) / radius[1]) ** 2) <= 1
  return boxes, ellipses


def dice(one: np.ndarray, other: np.ndarray) -> float:
  return float(2 * (one & other).sum() / max(one.sum() + other.sum(), 1))


def percentiles(volume: Volume) -> tuple[float, float]:
  """Centre and width of the window that `track` takes where it is given none."""
  array = volume.array[0]
  low, high = np.percentile(array[array != 0], PERCENTILES)
  return float(low + high) / 2, float(high - low)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  rows: list[dict[str, Any]] = []
  cells: dict[str, list[tuple[float, float]]] = {way: [] for way in options.ways}
  sheets: list[SheetCase] = []
  names: dict[int, str] = {}
  network = load_checkpoint(options.checkpoint)
  config = TrackingConfig(dynamic_multimask=options.dynamic, looks=options.looks)
  for case in volumes(options):
    window = case.window or percentiles(case.volume)
    names |= case.names
    maps = {way: np.zeros(case.volume.array.shape[1:], np.uint16)
            for way in ("reference", *options.ways)}

    def opened(volume: Volume, between: bool = False, window=window) -> PromptedVolume:
      how = dataclasses.replace(config, between=between)
      return PromptedVolume(SAM2(network.config), network.params, volume, how, window=window,
                            zoom=options.zoom)

    for value, truth in case.truth.items():
      if not truth.any():
        continue
      boxes, ellipses = shapes(truth)
      maps["reference"][truth] = value
      row: dict[str, Any] = {"case": case.name, "structure": value,
                             "box": dice(boxes, truth), "ellipse": dice(ellipses, truth)}
      for way in options.ways:
        began = time.perf_counter()
        found = follow(opened, case, way, truth, value)
        row[way], row[f"{way} s"] = dice(found.mask, truth), time.perf_counter() - began
        maps[way][found.mask] = value
        for z in np.flatnonzero(found.presence > 0.5):
          union = (found.mask[z] | truth[z]).sum()
          cells[way].append(
            (float(found.iou[z]), float((found.mask[z] & truth[z]).sum() / max(union, 1))))
      rows.append(row)
      print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else str(v) for k, v in row.items()),
            flush=True)
    truth = maps.pop("reference")
    titles = {TITLES[way]: found for way, found in maps.items()}
    centre, width = window
    sheets.append(SheetCase(case.name, case.volume.array[0], truth, titles, case.volume.spacing,
                            (centre - width / 2, centre + width / 2)))
  if options.sheet:
    structures = [Structure(name, tuple(v for v, n in names.items() if n == name))
                  for name in dict.fromkeys(names.values())]
    save_contact_sheet(options.sheet, sheets, structures)
  return {"checkpoint": str(options.checkpoint), "zoom": options.zoom, "rows": rows,
          "cells": cells}


def summary(measured: dict[str, Any]) -> str:
  """Means by case and over all, as a table of Markdown; what predicted IoU says."""
  rows = measured["rows"]
  names = ["box", "ellipse", *(way for way in WAYS if way in rows[0])]
  cases = list(dict.fromkeys(row["case"] for row in rows))
  lines = ["| case | structures | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
  groups = [(case, [r for r in rows if r["case"] == case]) for case in cases] if (
    len(cases) <= 8) else []
  for name, some in [*groups, ("all", rows)]:
    means = [f"{np.mean([r[n] for r in some]):.3f} (least {min(r[n] for r in some):.2f})"
             for n in names]
    lines.append(f"| {name} | {len(some)} | " + " | ".join(means) + " |")
  for way, found in measured["cells"].items():
    predicted, true = np.array(found).T
    lines.append(f"{way}: {len(found)} masks, predicted IoU {predicted.mean():.3f}, true "
                 f"{true.mean():.3f}, rank correlation {spearmanr(predicted, true)[0]:.3f}")
  return "\n".join(lines)


def curve(cells: dict[str, list[tuple[float, float]]], path: Path) -> None:
  """Mean true IoU of masks by their predicted one, in bins of a tenth."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(figsize=(4.5, 4.5))
  axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
  for way, found in cells.items():
    predicted, true = np.array(found).T
    bins = np.clip((predicted * 10).astype(int), 0, 9)
    at = [b for b in range(10) if (bins == b).sum() >= 5]
    axes.plot([predicted[bins == b].mean() for b in at], [true[bins == b].mean() for b in at],
              marker="o", label=f"{way} ({len(found)} masks)")
  axes.set(xlabel="predicted IoU", ylabel="true IoU", xlim=(0, 1), ylim=(0, 1))
  axes.legend()
  figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--checkpoint", default="builtin")
  add("--out", type=Path, required=True)
  add("--case", nargs=5, action="append", default=[],
      metavar=("NAME", "IMAGE", "LABELS", "VALUES", "WINDOW"))
  add("--dataset", type=Path)
  add("--splits", type=Path)
  add("--window", default="percentiles")
  add("--cases", type=int)
  add("--ways", nargs="+", choices=WAYS, default=WAYS)
  add("--zoom", type=float)
  add("--looks", type=int, help="times that every mask is decoded")
  add("--dynamic", action="store_true", help="of several masks where a single one is unstable")
  add("--curve", type=Path, help="picture of the true IoU by the predicted one")
  add("--sheet", type=Path, help="picture of the masks beside the reference")
  options = parser.parse_args()
  measured = measure(options)
  options.out.write_text(json.dumps(measured, indent=1) + "\n")
  print(summary(measured))
  if options.curve:
    curve(measured["cells"], options.curve)


if __name__ == "__main__":
  main()
