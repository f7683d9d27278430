"""`rfmedsam2 install`: keep an exported model, so that its name is enough."""

import argparse
from pathlib import Path

from rfmedsam2_jax.cli.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("archive", type=Path, help="model.zip, made by rfmedsam2 export")
  add("--name", help="by which it is to be known (its own)")
  add("--sha256", metavar="HEX", help="that the file must have")
  add("--overwrite", action="store_true", help="replace a model of this name")


def run(options: argparse.Namespace, console: Console) -> None:
  console.on_interruption("interrupted; nothing was installed")
  from rfmedsam2_jax.archive.install import install
  folder, manifest = install(options.archive, options.name, options.overwrite, options.sha256,
                             console.line)
  use = "predict" if "generator" in manifest.networks else "track --checkpoint"
  console.result(
    f"{folder.name}: installed in {folder}, licence: {manifest.licence}\n"
    f"rfmedsam2 {use} {folder.name} takes it; {folder / 'README.md'} is its card",
    {"name": folder.name, "folder": folder, "licence": manifest.licence,
     "networks": manifest.networks})
