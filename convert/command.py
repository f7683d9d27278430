"""`python -m convert SOURCE OUT` and back, `python -m convert --to-torch CHECKPOINT OUT.pt`.

`python -m convert nnunet MODEL OUT` brings a trained nnU-Net.

Exit status: 0 done, 2 something that the user can mend (one line says what), 130 interrupted
(Ctrl-C, SIGTERM). In the last two cases nothing was written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Passing
from rfmedsam2_jax.cli.console import Console
from rfmedsam2_jax.cli.entry import place_line, quiet_libraries


def main(arguments: Sequence[str] | None = None) -> int:
  """Converts one checkpoint; returns the exit status."""
  given = list(sys.argv[1:] if arguments is None else arguments)
  nnunet = given[:1] == ["nnunet"]
  if nnunet:
    from convert.nnunet import parser as nnunet_parser

    parser, given = nnunet_parser(), given[1:]
  else:
    parser = _parser()
  Console.arguments(parser)
  options = parser.parse_args(given, argparse.Namespace(nnunet=nnunet))
  console = Console(options.quiet, options.as_json, "convert")
  console.on_interruption("interrupted; nothing was written")
  console.line(Passing("starting"))
  try:
    said = _convert(options, console)
  except UserError as error:
    message = str(error)
  except OSError as error:
    message = place_line(error, str(options.out))
  else:
    console.result(f"{options.out}: {said}", {"out": options.out, "converted": said})
    return 0
  console.error(message, 2)
  return 2


def _convert(options: argparse.Namespace, console: Console) -> str:
  quiet_libraries()
  if options.nnunet:
    from convert.nnunet import convert_nnunet

    return convert_nnunet(options, console.detail, console.line)
  if options.to_torch:
    from convert.to_torch import to_torch

    return to_torch(options.source, options.out, options.overwrite, console.detail, console.line)
  from convert.to_orbax import to_orbax

  return to_orbax(options, console.detail, console.line)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m convert",
    description="Turns a checkpoint of SAM 2 (official, MedSAM2, training, Hugging Face) into one "
    "of this program, or back.",
  )
  parser.add_argument(
    "source", type=Path,
    help="a .pt or .safetensors file, or a folder of save_pretrained; with --to-torch a checkpoint "
    "of this program",
  )
  parser.add_argument("out", type=Path, help="the checkpoint's folder, or the .pt file")
  parser.add_argument("--to-torch", action="store_true",
                      help="write a .pt file that the official class loads")
  parser.add_argument("--overwrite", action="store_true", help="replace OUT")

  forward = parser.add_argument_group("towards this program")
  forward.add_argument("--config", metavar="NAME",
                       help="the network, where it is not recognised: sam2.1_hiera_tiny and so on, "
                       "or the YAML file of a training config")
  forward.add_argument("--image-size", type=int, metavar="PIXELS",
                       help="side of the square image; 1024 if the source does not say otherwise")
  forward.add_argument("--allow", action="append", default=[], metavar="NAME",
                       help="a tensor that may be missing, left over or of another shape, by its "
                       "official name or a pattern; `memory` is all that Sam2Model lacks; may be "
                       "given again")
  forward.add_argument("--adapters", action="store_true",
                       help="with fresh adapters, which change nothing; training adds them anyway")
  forward.add_argument("--verify", action="store_true",
                       help="run the PyTorch network beside and print the largest differences")
  return parser
