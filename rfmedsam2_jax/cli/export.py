"""`rfmedsam2 export`: pack a finished run, or a checkpoint, into one file that others install."""

import argparse
from pathlib import Path

from rfmedsam2_jax.base.places import word_or_path
from rfmedsam2_jax.cli.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("source", type=word_or_path, metavar="RUN",
      help="the run's folder, the name of an installed model, or a checkpoint (or builtin)")
  add("out", type=Path, help="the archive, model.zip")
  add("--name", help="by which others know it (the run's)")
  add("--card", type=Path,
      help="its model card, Markdown (model_card.md of the run, or one made of the run's files)")
  add("--licence", metavar="FILE|NAME",
      help="of the weights: the file of its text, or CC-BY-4.0 and the like")
  add("--programs", action="store_true",
      help="also programs for CPUs, NVIDIA GPUs and TPUs that need JAX but not this package")
  add("--overwrite", action="store_true", help="replace OUT")


def run(options: argparse.Namespace, console: Console) -> None:
  console.on_interruption("interrupted; nothing was written")
  from rfmedsam2_jax.archive.export import export
  made = export(options.source, options.out, options.name, options.card, options.licence,
                options.programs, options.overwrite, console.line)
  for remark in made.remarks:
    console.warning(f"{made.path}: {remark}")
  manifest, size = made.manifest, made.path.stat().st_size
  console.result(
    f"{made.path}: {manifest.name}, {', '.join(manifest.networks)}, {size / 1e6:.1f} MB\n"
    f"sha256 {made.sha256}",
    {"out": made.path, "name": manifest.name, "networks": manifest.networks, "bytes": size,
     "sha256": made.sha256, "licence": manifest.licence})
