"""`rfmedsam2 evaluate`: score label maps against references."""

import argparse
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.kept import names, nearest, run_at
from rfmedsam2_jax.base.places import word_or_path
from rfmedsam2_jax.base.progress import Progress
from rfmedsam2_jax.cli.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("predictions", type=Path, help="folder or file")
  add("references", type=Path, help="folder or file")
  add("--labels", type=word_or_path, help="data set folder, run or installed model that names the "
      "structures; default: label values are the names")
  add("--tolerance", type=float, default=1.0, help="mm, of the surface Dice (1)")
  add("--missing", default="nan", metavar="nan|worst|MM",
      help="HD95 of a structure that one side lacks: nan (left out of means), worst (the image's "
      "diagonal), or mm (nan)")
  add("--partial", action="store_true", help="not all references are predicted")
  add("--scores", type=Path, help="JSON of all scores (PREDICTIONS/scores.json)")


def run(options: argparse.Namespace, console: Console) -> None:
  from rfmedsam2_jax.data.datasets import Labels, read_dataset
  from rfmedsam2_jax.data.plan import load_plan
  from rfmedsam2_jax.evaluation.metrics import Missing
  from rfmedsam2_jax.evaluation.scores import as_dict, evaluate_folders, save_scores, table
  # What can be seen to be wrong, before any volume is read.
  of_labels = run_at(options.labels) if options.labels else None
  for path in (options.predictions, options.references, of_labels):
    if path is not None and not path.exists():
      near = nearest(options.labels, names("models")) if path is of_labels else ""
      raise UserError(f"{path}: no such file or folder; check the path{near}")
  folder = options.predictions if options.predictions.is_dir() else options.predictions.parent
  try:
    missing: Missing = "worst" if options.missing == "worst" else float(options.missing)
  except ValueError:
    raise UserError(f"--missing {options.missing}: is neither nan nor worst nor a number of mm; "
                    "give one of them") from None
  target = options.scores or folder / "scores.json"
  if target.is_dir():
    raise UserError(f"--scores {target}: is a folder; name a file")
  labels: Labels | None = None
  if of_labels:
    # A run may have been trained on a few of its data set's structures: those are scored.
    plan = of_labels / "plan.json"
    labels = load_plan(plan).labels if plan.is_file() else read_dataset(of_labels).labels
  scores = evaluate_folders(options.predictions, options.references, labels, options.tolerance,
                            options.partial, missing, Progress("cases", console.line),
                            console.warning)
  save_scores(target, scores)
  console.result(f"{table(scores)}\n\nall scores: {target}", as_dict(scores))
