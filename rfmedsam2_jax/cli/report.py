"""`rfmedsam2 report`: make pages of a run and of predictions, with a viewer of the volumes."""

import argparse
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.kept import run_at
from rfmedsam2_jax.base.places import word_or_path
from rfmedsam2_jax.cli.console import Console, exists


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("folders", nargs="+", type=word_or_path, metavar="RUN|PREDICTIONS",
      help="a run or installed model, a folder that predict wrote, or one of each")
  add("--ref", type=Path, help="folder of references, to score the predictions")
  add("--images", type=Path, help="folder of the inputs, to show them")
  add("--out", type=Path, required=True, help="folder of the report")
  add("--max-voxels", type=float, default=20.0,
      help="millions of voxels that a viewer shows, larger volumes are thinned (20); 0: no viewer")
  add("--overwrite", action="store_true", help="replace a report")


def run(options: argparse.Namespace, console: Console) -> None:
  from rfmedsam2_jax.report.target import is_taken
  folders = [run_at(folder) for folder in options.folders]
  runs = [folder for folder in folders if (folder / "config.yaml").is_file()]
  predictions = [folder for folder in folders if folder not in runs]
  for several in (runs, predictions):
    if len(several) > 1:
      raise UserError(f"{several[1]}: is a second folder of the kind of {several[0]}; "
                      "give one run, one folder of predictions, or one of each")
  for name in ("ref", "images"):
    if getattr(options, name) and not predictions:
      raise UserError(f"--{name}: belongs to predictions; name the folder that predict wrote too")
  if not 0 <= options.max_voxels < 1e6:
    raise UserError(f"--max-voxels {options.max_voxels:g}: give millions of voxels, or 0")
  for folder in (*predictions, options.ref, options.images):
    if folder is not None and not folder.is_dir():
      raise UserError(f"{folder}: is not a folder; check the path")
  if is_taken(options.out) and not options.overwrite:
    raise exists(options.out)

  from rfmedsam2_jax.report.folder import write_report  # loads much
  written = write_report(
    options.out, next(iter(runs), None), next(iter(predictions), None), options.ref,
    options.images, options.overwrite, round(options.max_voxels * 1e6), console.line)
  said = [*written.warnings, *written.remarks]
  for remark in said:
    console.warning(remark)
  dice = written.scores.mean.dice if written.scores else None
  scored = "" if dice is None else f", mean Dice {dice:.4f}"
  size = f", {written.volumes_bytes / 2**20:.1f} MiB of volumes" if written.volumes_bytes else ""
  console.result(
    f"{written.index}: {len(written.cases)} cases{scored}{size}; open it in a browser",
    {"index": written.index, "cases": len(written.cases), "dice": dice, "warnings": said})
