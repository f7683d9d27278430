"""Draws docs/accuracy.md's figures from the result files, and pictures of cases from a run.

python benchmarks/accuracy/figures.py plots RESULTS --out FOLDER
python benchmarks/accuracy/figures.py cases RUN FILE.json --out FOLDER

RESULTS is the folder of the JSON files, those of the ablation on a weak generator in its folder
`weak`. `cases` segments two cases: the one whose Dice after the last stage is the median of
FILE.json, and the worst.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from results import by_case, difference, mean_of
from score_run import CORRUPTIONS

from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.data.datasets import read_dataset
from rfmedsam2_jax.model import load
from rfmedsam2_jax.report.contact_sheet import SheetCase, save_contact_sheet
from rfmedsam2_jax.training.validation import stage_maps

BUDGETS = (30, 90)  # minutes
STUDY = yaml.safe_load((Path(__file__).parent / "rows" / "hippocampus.yaml").read_text("utf-8"))
ROWS = tuple(STUDY["refiners"])
CORRUPTED = tuple(name for name, how in STUDY["scored"].items() if "--corrupt" in how)
SCORED = tuple(name for name in STUDY["scored"] if name not in CORRUPTED)


def stages_of(path: Path) -> dict[str, Any]:
  return json.loads(path.read_text("utf-8"))["stages"] if path.exists() else {}


def save(figure: Figure, path: Path) -> None:
  FigureCanvasAgg(figure)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110, bbox_inches="tight")
  print(path)


def draw_against(results: Path, out: Path) -> None:
  """Each validation case as a point: nnU-Net's Dice and ours."""
  figure = Figure(figsize=(8, 4))
  for number, minutes in enumerate(BUDGETS):
    theirs, ours = (stages_of(results / f"{who}-{minutes}.json") for who in ("nnunet", "ours"))
    axes = figure.add_subplot(1, len(BUDGETS), number + 1)
    axes.set_title(f"{minutes} minutes on two cores")
    axes.set_xlabel("nnU-Net, mean Dice of a case")
    axes.set_ylabel("RFMedSAM 2, last stage")
    axes.axline((0.85, 0.85), slope=1, color="gray", linewidth=0.8)
    if theirs and ours:
      x, y = by_case(theirs["nnU-Net"], "dice"), by_case(list(ours.values())[-1], "dice")
      axes.scatter([x[case] for case in sorted(x)], [y[case] for case in sorted(x)], s=14)
    axes.set_aspect("equal")
  save(figure, out / "against.png")


def draw_ablation(results: Path, out: Path) -> None:
  """The change of the Dice from the generator to the last stage, with its interval, by row."""
  names = (*ROWS, *SCORED)
  panels = {"160 cases": results, "5 cases": results / "weak"}
  panels = {title: folder for title, folder in panels.items() if folder.is_dir()}
  figure = Figure(figsize=(5.5 * len(panels), 0.8 + 0.3 * len(names)))
  for number, (title, folder) in enumerate(panels.items()):
    found = {name: list(stages_of(folder / f"{name}.json").values()) for name in reversed(names)}
    shown = {name: stages for name, stages in found.items() if len(stages) > 1}
    axes = figure.add_subplot(1, len(panels), number + 1)
    for height, stages in enumerate(shown.values()):
      mean, low, high = difference(stages[-1], stages[0])
      axes.errorbar(mean, height, xerr=[[mean - low], [high - mean]], fmt="o", color="tab:blue")
    axes.set_yticks(range(len(shown)), list(shown))
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_title(f"generator of {title}")
    axes.set_xlabel("Dice of the last stage less the generator's (95 %)")
  figure.tight_layout()
  save(figure, out / "ablation.png")


def draw_weak(results: Path, out: Path) -> None:
  """Mean Dice by stage: of weak generators, and of a good one's masks with mistakes put in, dotted
  where the refiner was trained on such."""
  titles = {
    "generator-5": "5 cases", "generator-20": "20 cases", next(iter(ROWS)): "160 cases",
    "cases-5": "5, and the refiner no others", "cases-20": "20, and the refiner no others",
  }
  figure = Figure(figsize=(10, 4))
  for number, rows in enumerate((titles, CORRUPTED)):
    axes = figure.add_subplot(1, 2, number + 1)
    axes.set_title(("a generator of", "a good one, masks with")[number])
    colours = len(CORRUPTIONS) if rows is CORRUPTED else len(rows)
    for index, name in enumerate(rows):
      stages = list(stages_of(results / f"{name}.json").values())
      if not stages:
        continue
      axes.plot(
        range(len(stages)), [mean_of(stage, "dice") for stage in stages],
        f"C{index % colours}{':' if name.endswith('-trained') else '-'}", marker="o",
        label=titles.get(name, name),
      )
    axes.set_xticks(range(3), ["generator", "stage 1", "stage 2"])
    axes.set_ylabel("mean Dice of 40 cases")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
  figure.tight_layout()
  save(figure, out / "weak.png")


def draw_cases(run: Path, scores: Path, out: Path) -> None:
  """The typical case and the worst, with the contours of every stage."""
  last = by_case(list(stages_of(scores).values())[-1], "dice")
  ordered = sorted(last, key=last.__getitem__)
  config, segmenter = load_config(run / "config.yaml"), load(run)
  dataset = read_dataset(config.data.dataset, config.data.structures)
  sheets = []
  for name in (ordered[len(ordered) // 2], ordered[0]):
    case = next(case for case in dataset.cases if case.identifier == name)
    volume, truth, maps = stage_maps(segmenter, case)
    titles = ["generator", *(f"stage {n}" for n in range(1, len(maps)))]
    sheets.append(SheetCase(
      f"{name} ({last[name]:.3f})", volume.array[0], truth, dict(zip(titles, maps, strict=True)),
      volume.geometry.spacing, slice_axis=segmenter.plan.slice_axis,
    ))
  out.mkdir(parents=True, exist_ok=True)
  print(save_contact_sheet(
    out / "cases.png", sheets, segmenter.plan.labels.structures, slices_per_case=2
  ))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  commands = parser.add_subparsers(dest="command", required=True)
  plots = commands.add_parser("plots")
  plots.add_argument("results", type=Path)
  cases = commands.add_parser("cases")
  cases.add_argument("run", type=Path)
  cases.add_argument("scores", type=Path)
  for command in (plots, cases):
    command.add_argument("--out", type=Path, required=True)
  options = parser.parse_args()
  if options.command == "cases":
    draw_cases(options.run, options.scores, options.out)
    return
  for draw in (draw_against, draw_ablation, draw_weak):
    draw(options.results, options.out)


if __name__ == "__main__":
  main()
