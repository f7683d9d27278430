r"""Results of accuracy runs as small JSON files, and tables that compare them case by case.

python benchmarks/accuracy/results.py score WORK DATASET --out FILE.json    a run of nnunet.py
python benchmarks/accuracy/results.py table FILE.json ... [--against NAME] [--group PATTERN]
python benchmarks/accuracy/results.py stages FILE.json ... [--group PATTERN]

A file holds what was run, seconds by part, and the scores of every stage (rfmedsam2_jax's
`evaluate`, the same for all). `table` prints means over the cases and, against one of them, the
mean paired differences of Dice and HD95 with their 95 % intervals: 10,000 resamplings of the cases,
seed 0. With a group (as `data.split.group`) whole groups are drawn. `stages` prints one line per
file: what its last stage has more than its own stage 0.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2_jax.data.datasets import read_dataset
from rfmedsam2_jax.data.splits import grouped
from rfmedsam2_jax.evaluation.scores import as_dict, evaluate_folders

RESAMPLINGS = 10_000
METRICS = ("dice", "surface_dice", "hd95")


def shorter(scores: dict[str, Any]) -> dict[str, Any]:
  """The metrics of every case, rounded: what a comparison needs."""
  return {
    case: {
      name: {m: None if found[m] is None else round(found[m], 5) for m in METRICS}
      for name, found in structures.items()
    }
    for case, structures in scores["cases"].items()
  }


def save(path: Path, about: dict[str, Any], stages: dict[str, dict[str, Any]]) -> None:
  """Writes one file; `stages` by name, each what `as_dict` gives."""
  path.parent.mkdir(parents=True, exist_ok=True)
  content = about | {"stages": {name: shorter(scores) for name, scores in stages.items()}}
  path.write_text(json.dumps(content, indent=None, separators=(",", ":")) + "\n")


def score_nnunet(work: Path, dataset: Path, out: Path) -> None:
  found = read_dataset(dataset)
  scores = evaluate_folders(
    work / "predictions", dataset / "labelsTr", found.labels, partial=True
  )
  save(out, json.loads((work / "about.json").read_text("utf-8")), {"nnU-Net": as_dict(scores)})


def by_case(stage: dict[str, Any], metric: str) -> dict[str, float]:
  """Mean over the structures of each case that have the metric; NaN where none has."""
  found = {}
  for case, structures in stage.items():
    values = [s[metric] for s in structures.values() if s[metric] is not None]
    found[case] = float(np.mean(values)) if values else math.nan
  return found


def mean_of(stage: dict[str, Any], metric: str) -> float:
  names = next(iter(stage.values()))
  means = [
    np.mean([case[name][metric] for case in stage.values() if case[name][metric] is not None])
    for name in names
  ]
  return float(np.mean(means))


def difference(
  a: dict[str, Any], b: dict[str, Any], metric: str = "dice", group: str | None = None
) -> tuple[float, float, float]:
  """Mean of a - b over the cases, and its 95 % interval; groups of cases are drawn whole."""
  if a.keys() != b.keys():
    raise SystemExit("the files have scores of different cases")
  # Structure by structure: the distance of one that a method lost is None, and would make the mean
  # of the others look like progress.
  def change(case: str) -> float:
    pairs = [(a[case][name][metric], b[case][name][metric]) for name in a[case]]
    return float(np.mean([x - y for x, y in pairs if None not in (x, y)] or [np.nan]))

  changes = ([x for x in map(change, cases) if np.isfinite(x)]
             for cases in grouped(sorted(a), group).values())
  changes = [found for found in changes if found]  # groups that make a statement
  sums, counts = (np.array([f(found) for found in changes]) for f in (sum, len))
  drawn = np.random.default_rng(0).integers(len(changes), size=(RESAMPLINGS, len(changes)))
  means = sums[drawn].sum(1) / counts[drawn].sum(1)
  low, high = np.quantile(means, [0.025, 0.975])
  return float(sums.sum() / counts.sum()), float(low), float(high)


def shown_difference(
  a: dict[str, Any], b: dict[str, Any], metric: str, digits: int, group: str | None
) -> str:
  mean, low, high = difference(a, b, metric, group)
  return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def shown_cost(content: dict[str, Any]) -> list[str]:
  """Seconds and peak GiB per volume, where they were measured."""
  per_volume, peak = content["seconds"].get("per volume"), content.get("peak_gib")
  return ["" if value is None else f"{value:.1f}" for value in (per_volume, peak)]


def stages_table(paths: list[Path], group: str | None) -> str:
  lines = [
    "| | Dice of stages 0, 1, 2 | last less first | surface Dice 1 mm | HD95 mm | last less first "
    "| s per volume | GiB |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for path in paths:
    content = json.loads(path.read_text("utf-8"))
    stages = list(content["stages"].values())
    first, last = stages[0], stages[-1]
    cells = [
      path.stem, ", ".join(f"{mean_of(stage, 'dice'):.4f}" for stage in stages),
      shown_difference(last, first, "dice", 4, group), f"{mean_of(last, 'surface_dice'):.3f}",
      f"{mean_of(last, 'hd95'):.2f}", shown_difference(last, first, "hd95", 2, group),
      *shown_cost(content),
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def table(paths: list[Path], against: str | None, group: str | None) -> str:
  rows = {}
  for path in paths:
    content = json.loads(path.read_text("utf-8"))
    seconds = content.get("training", {}).get("seconds", content["seconds"])
    minutes = sum(seconds.get(part, 0) for part in ("preprocessing", "training")) / 60
    for name, stage in content["stages"].items():
      rows[f"{path.stem}: {name}"] = (stage, minutes, shown_cost(content))
  reference = rows[against][0] if against else None
  lines = [
    "| | minutes | Dice | surface Dice 1 mm | HD95 mm | s per volume | GiB | difference of Dice | "
    "of HD95 |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name, (stage, minutes, cost) in rows.items():
    dice, surface, distance = (mean_of(stage, metric) for metric in METRICS)
    cells = [
      name, f"{minutes:.1f}" if minutes else "", f"{dice:.4f}", f"{surface:.4f}", f"{distance:.2f}",
      *cost,
    ]
    for metric, digits in (("dice", 4), ("hd95", 2)):
      compared = reference is not None and name != against
      cells.append(shown_difference(stage, reference, metric, digits, group) if compared else "")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  commands = parser.add_subparsers(dest="command", required=True)
  one = commands.add_parser("score", help="predictions of nnunet.py")
  one.add_argument("work", type=Path)
  one.add_argument("dataset", type=Path)
  one.add_argument("--out", type=Path, required=True)
  all_of = commands.add_parser("table")
  each = commands.add_parser("stages")
  for command in (all_of, each):
    command.add_argument("files", type=Path, nargs="+")
    command.add_argument("--group", help="of cases that are drawn together: a pattern")
  all_of.add_argument("--against", help="a row, as it is printed")
  options = parser.parse_args()
  if options.command == "score":
    score_nnunet(options.work, options.dataset, options.out)
  elif options.command == "stages":
    print(stages_table(options.files, options.group))
  else:
    print(table(options.files, options.against, options.group))


if __name__ == "__main__":
  main()
