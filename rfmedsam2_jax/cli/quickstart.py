"""`rfmedsam2 quickstart`: the whole way on generated phantoms."""

import argparse
import importlib.resources
from pathlib import Path

from rfmedsam2_jax.cli.console import Console

HELP = "generate phantoms, train on them, segment unseen ones, score and picture"


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("overrides", nargs="*", help="values of the config, by path")
  parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (demo)")
  parser.add_argument("--resume", action="store_true", help="go on where it stopped")
  parser.add_argument("--overwrite", action="store_true", help="start anew")


def packaged_config(name: str) -> Path:
  """A config of configs/, in a clone or in an installed package."""
  clone = Path(__file__).parents[2] / "configs" / name
  if clone.is_file():
    return clone
  return Path(str(importlib.resources.files("rfmedsam2_jax.configs") / name))


def run(options: argparse.Namespace, console: Console) -> None:
  from rfmedsam2_jax.cli.demo import quickstart

  means = quickstart(
    packaged_config("quickstart.yaml"), options.overrides, options.out, options.resume,
    options.overwrite, console.line, console.warning,
  )
  each = "  ".join(f"{k} {v:.4f}" for k, v in means.items() if v is not None)
  console.result(
    f"mean Dice of unseen phantoms: {each}\nall results: {options.out}; "
    f"open {options.out / 'report' / 'index.html'} in a browser",
    {"out": options.out, "dice": means},
  )
