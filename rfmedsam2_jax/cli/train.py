"""`rfmedsam2 train`: train generator and refiner on a data set, or SAM 2 as a tracker."""

import argparse
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("config", type=Path, help="YAML file, see configs/")
  add("overrides", nargs="*", help="values by path, generator.loop.steps=500")
  add("--out", type=Path, required=True, help="folder of the run")
  add("--resume", action="store_true", help="go on where the run in --out stopped")
  add("--overwrite", action="store_true", help="replace the run in --out")
  add("--profile", action="store_true", help="leave a trace of some steps in --out")
  add("--distributed", default="auto", metavar="HOW",
      help="auto (TPU pods, SLURM, Open MPI, Kubernetes), off, or HOST:PORT,PROCESSES,INDEX")


def run(options: argparse.Namespace, console: Console) -> None:
  from rfmedsam2_jax.training.lock import check_folder
  if options.resume and options.overwrite:
    raise UserError("--resume and --overwrite exclude each other; give one of them")
  # Mistakes are said before what takes long to load, and before processes wait for each other.
  check_folder(options.out, options.resume, options.overwrite)
  from rfmedsam2_jax.config import load_config
  from rfmedsam2_jax.data.datasets import read_dataset
  config = load_config(options.config, options.overrides)
  if config.needs_dataset:
    if not config.data.dataset:
      raise UserError(f"{options.config}: data.dataset is empty; name the folder of the data set")
    read_dataset(config.data.dataset, config.data.structures)
  from rfmedsam2_jax.parallel import hosts
  from rfmedsam2_jax.training.run import train
  hosts.initialise(options.distributed, console.line)
  with hosts.watching():
    scores = train(config, options.out, options.resume, options.overwrite, console.line,
                   options.profile, console.warning)
  if hosts.is_main():
    console.result(f"the run: {options.out}", {"run": options.out, "stages": scores})
