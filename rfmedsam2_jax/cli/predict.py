"""`rfmedsam2 predict`: segment volumes with a trained run."""

import argparse
import csv
import itertools
import time
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.kept import no_run, run_at
from rfmedsam2_jax.base.places import word_or_path
from rfmedsam2_jax.base.progress import Passing
from rfmedsam2_jax.cli.console import Console, named_options
from rfmedsam2_jax.data.formats import FORMATS, HELP


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("paths", nargs="+", type=word_or_path, metavar="RUN... INPUT...",
      help="one run (its folder, or the name of an installed model), or several to be averaged, "
      "then volumes, DICOM series or folders of them")
  add("--out", type=Path, required=True, help="folder of label maps, CASE.json and numbers.csv")
  add("--prompts", choices=("generated", "oracle", "given"), default="generated",
      help="automatic (default), boxes from true labels (upper limit), or a person's")
  add("--labels", type=Path, help="folder of label maps for oracle or given")
  add("--given", type=Path, help="JSON of boxes and points for --prompts given")
  add("--format", choices=FORMATS, default="nifti", help=HELP)
  add("--series", metavar="UID|NUMBER|NAME",
      help="which series of a study (a folder or .zip), also by its description or modality")
  add("--save-stages", action="store_true", help="also write every stage")
  add("--probabilities", action="store_true", help="also write a probability map per structure")
  add("--structures", metavar="NAME,...",
      help="only these structures, as the run names them; a name with a comma in double quotes")
  add("--min-volume", type=float, default=0.0, metavar="ML",
      help="pieces of a structure that are smaller go, and are counted")
  add("--fast", action="store_true",
      help="at half the resolution across slices: quicker, and worse")
  add("--overwrite", action="store_true", help="replace results that exist")


def _check(options: argparse.Namespace, runs: list[Path], inputs: list[Path]) -> None:
  """UserError for what is wrong with the command line, before networks are read."""
  from rfmedsam2_jax.data.plan import load_plan
  from rfmedsam2_jax.segmentation.chosen import make_choice
  from rfmedsam2_jax.segmentation.request import check_alike, make_request
  if options.prompts == "oracle" and options.labels is None:
    raise UserError("--prompts oracle: needs --labels, the folder of true label maps")
  if options.prompts == "given" and options.labels is None and options.given is None:
    raise UserError("--prompts given: needs --given FILE.json or --labels, sparse label maps")
  if options.prompts == "generated" and (options.labels or options.given):
    raise UserError("--labels and --given: are read with --prompts oracle or given; name one")
  files = [path / "plan.json" for path in runs]
  if all(file.is_file() for file in files):  # else `load` says what the run lacks
    plans = [load_plan(file) for file in files]
    check_alike(plans)
    names = _names(options)
    make_choice(plans[0].labels, names, options.min_volume, ("--structures", "--min-volume"))
    make_request(plans[0], inputs, options.out, options.prompts, options.labels, options.given,
                 options.overwrite, options.format, options.series, names, options.min_volume)


def _names(options: argparse.Namespace) -> list[str] | None:
  """The structures that are asked for, of which one with a comma is quoted; None for all."""
  if options.structures is None:
    return None
  row = next(csv.reader([options.structures], skipinitialspace=True), [])
  return [name for part in row if (name := part.strip())]


def run(options: argparse.Namespace, console: Console) -> None:
  paths = options.paths
  found = itertools.takewhile(lambda path: (path / "config.yaml").is_file(), map(run_at, paths))
  runs = list(found)
  if max(len(runs), 1) == len(paths):
    raise UserError(f"{paths[-1]}: no input given behind the run; name volumes or folders")
  if not runs:
    raise no_run(paths[0])
  inputs = [Path(path) for path in paths[len(runs) :]]
  with named_options():
    _check(options, runs, inputs)

  from rfmedsam2_jax.model import load
  from rfmedsam2_jax.segmentation.predict import predict
  models = []
  for path in runs:
    console.line(Passing(f"reading {path}"))
    models.append(load(path))
  began = time.monotonic()
  warnings: list[dict[str, str]] = []

  def warn(case: str, message: str) -> None:
    warnings.append({"case": case, "message": message})
    console.warning(f"{case}: {message}")

  written = predict(
    models, inputs, options.out, options.prompts, options.labels, options.given,
    options.save_stages, options.overwrite, console.line, options.probabilities, warn,
    options.format, options.series, _names(options), options.min_volume, options.fast)
  seconds = time.monotonic() - began
  unusual = f"; {len(warnings)} warnings, see above" if warnings else ""
  console.result(
    f"{len(written)} label maps in {options.out}, {seconds:.0f} s{unusual}",
    {"written": written, "seconds": round(seconds, 1), "warnings": warnings})
