"""`rfmedsam2 convert`: turn a checkpoint of SAM 2 (official, MedSAM2, training, Hugging Face) into
one of this program, or back, or one of this program into a single file; `convert nnunet`: a trained
nnU-Net into a generator."""

import argparse
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli.console import Console, place_line


def arguments(parser: argparse.ArgumentParser) -> None:
  add, forward = parser.add_argument, parser.add_argument_group("towards this program").add_argument
  add("source", type=Path, help="a .pt or .safetensors file, or a folder of save_pretrained; with "
      "--to-torch or --to-safetensors a checkpoint of this program")
  add("out", type=Path, help="the checkpoint's folder, or the file")
  way = parser.add_mutually_exclusive_group().add_argument
  way("--to-torch", action="store_true",
      help="write a .pt file that the official class loads, of a generator nnU-Net's")
  way("--to-safetensors", action="store_true",
      help="write one file of float16 that track, serve and init_from take")
  add("--about", action="append", default=[], metavar="KEY=TEXT",
      help="what the file of --to-safetensors says of itself; may be given again")
  add("--overwrite", action="store_true", help="replace OUT")
  forward("--config", metavar="NAME", help="the network, where it is not recognised: "
          "sam2.1_hiera_tiny and so on, or the YAML file of a training config")
  forward("--image-size", type=int, metavar="PIXELS",
          help="side of the square image; 1024 if the source does not say otherwise")
  forward("--allow", action="append", default=[], metavar="NAME",
          help="a tensor that may be missing, left over or of another shape, by its official name "
          "or a pattern; `memory` is all that Sam2Model lacks; may be given again")
  forward("--adapters", action="store_true",
          help="with fresh adapters, which change nothing; training adds them anyway")
  forward("--verify", action="store_true",
          help="run the PyTorch network beside and print the largest differences")


def run(options: argparse.Namespace, console: Console) -> None:
  if (side := options.image_size) is not None and (side <= 0 or side % 32):
    raise UserError(f"--image-size {side}: the side must be a multiple of 32, such as 512")
  if options.about and not options.to_safetensors:
    raise UserError("--about: is for --to-safetensors alone; leave it out")
  if options.to_safetensors:
    if options.out.suffix != ".safetensors":
      raise UserError(f"{options.out}: must end in .safetensors; give it such a name")
    check_paths(options, "checkpoint; check the path or make one, docs/convert.md",
                options.out.is_file())
    convert(options, console, "to_safetensors", "to_safetensors", about=tuple(options.about))
  elif options.to_torch:
    if importlib.util.find_spec("torch") is None:
      raise UserError("--to-torch needs PyTorch: pip install torch")
    check_paths(options, "checkpoint; check the path or make one, docs/convert.md",
                options.out.is_file())
    convert(options, console, "to_torch", "to_torch")
  else:
    check_paths(options, "file; give a checkpoint (.pt, .safetensors or a folder)")
    convert(options, console, "to_orbax", "to_orbax", config=options.config, image_size=side,
            allow=tuple(options.allow), adapters=options.adapters, verify=options.verify)


def check_paths(options: argparse.Namespace, gives: str, is_ours: bool | None = None) -> None:
  """UserError for no source (which `gives` names), and an output that must or can not be written.

  `is_ours`: what lies there is of the kind that would be written; a checkpoint unless said.
  """
  source, out = options.source, options.out
  if not source.exists():
    raise UserError(f"{source}: no such {gives}")
  if out.exists() and not options.overwrite:
    raise UserError(f"{out}: exists; replace it with --overwrite or choose another name")
  if out.exists() and not ((out / "about").is_dir() if is_ours is None else is_ours):
    raise UserError(
      f"{out}: was not made by this command, --overwrite leaves it; choose another name")
  there = next(parent for parent in out.absolute().parents if parent.exists())
  if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
    raise UserError(f"{there}: cannot be written into; choose another folder")


def convert(options: argparse.Namespace, console: Console, module: str, function: str,
            **wanted: Any) -> None:
  """Runs a function of the converter, with its `Wanted` if there is any, and says what it did."""
  console.on_interruption("interrupted; nothing was written")
  home = converter(module)
  choices = [home.Wanted(**wanted)] if wanted else []
  try:
    said = getattr(home, function)(options.source, options.out, *choices, report=console.detail,
                                   progress=console.line)
  except OSError as error:
    raise UserError(place_line(error, str(options.out))) from None
  console.result(f"{options.out}: {said}", {"out": options.out, "converted": said})


def converter(module: str) -> Any:
  """A module of the converter: that of a clone that Python runs in, else as installed."""
  beside, clone = importlib.util.find_spec("convert"), Path(__file__).parents[2] / "convert"
  in_clone = beside is not None and beside.origin == str(clone / "__init__.py")
  return importlib.import_module(f"{'convert' if in_clone else 'rfmedsam2_jax.convert'}.{module}")
