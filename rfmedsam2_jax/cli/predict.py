"""`rfmedsam2 predict`: label maps of volumes by trained runs."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli.console import Console

HELP = "segment volumes with a trained run"


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "paths", nargs="+", type=Path, metavar="RUN... INPUT...",
    help="one run folder, or several to be averaged, then volumes, DICOM series or folders of them",
  )
  parser.add_argument("--out", type=Path, required=True, help="folder of label maps and CASE.json")
  parser.add_argument(
    "--prompts", choices=("generated", "oracle", "given"), default="generated",
    help="automatic (default), boxes from true labels (upper limit), or a person's",
  )
  parser.add_argument("--labels", type=Path, help="folder of label maps for oracle or given")
  parser.add_argument("--given", type=Path, help="JSON of boxes and points for --prompts given")
  parser.add_argument(
    "--format", choices=("nifti", "nrrd"), default="nifti",
    help="of label maps; nrrd: with names and colours, for 3D Slicer",
  )
  parser.add_argument("--save-stages", action="store_true", help="also write every stage")
  parser.add_argument(
    "--probabilities", action="store_true", help="also write a probability map per structure"
  )
  parser.add_argument("--overwrite", action="store_true", help="replace results that exist")


def _split_runs(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
  """Leading run folders, and the inputs behind them."""
  count = 0
  while count < len(paths) and (paths[count] / "config.yaml").is_file():
    count += 1
  runs, inputs = list(paths[: max(count, 1)]), list(paths[max(count, 1) :])
  if not inputs:
    raise UserError(f"{paths[-1]}: no input given behind the run; name volumes or folders")
  return runs, inputs


def run(options: argparse.Namespace, console: Console) -> None:
  from rfmedsam2_jax.base.progress import Passing
  from rfmedsam2_jax.model import load
  from rfmedsam2_jax.segmentation.predict import predict

  runs, inputs = _split_runs(options.paths)
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
    options.save_stages, options.overwrite, console.line,
    options.probabilities, warn, options.format,
  )
  seconds = time.monotonic() - began
  unusual = f"; {len(warnings)} warnings, see above" if warnings else ""
  console.result(
    f"{len(written)} label maps in {options.out}, {seconds:.0f} s{unusual}",
    {"written": written, "seconds": round(seconds, 1), "warnings": warnings},
  )
