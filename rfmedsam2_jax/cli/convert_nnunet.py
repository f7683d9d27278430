"""`rfmedsam2 convert nnunet`: a trained nnU-Net v2 as the prompt generator."""

import argparse
from pathlib import Path

from rfmedsam2_jax.cli.console import Console
from rfmedsam2_jax.cli.convert import check_paths, convert

HELP = "turn a trained nnU-Net v2 (a plain 3D conv U-Net) into a prompt generator and the config " \
  "that goes with it"


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("source", type=Path,
                      help="the model's folder nnUNetTrainer__nnUNetPlans__3d_fullres, or a .pth")
  parser.add_argument("out", type=Path, help="the checkpoint's folder")
  parser.add_argument("--fold", default="0", help="of a model's folder: 0 to 4 or all")
  parser.add_argument("--checkpoint", choices=("final", "best"), default="final",
                      help="of a model's folder")
  parser.add_argument("--configuration", help="of the plans; that of the checkpoint unless given")
  parser.add_argument("--like", type=Path, metavar="VOLUME",
                      help="a volume that it was trained on: its orientation is the network's")
  parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def run(options: argparse.Namespace, console: Console) -> None:
  check_paths(options, "file; give nnU-Net's model folder or a checkpoint file")
  convert(options, console, "nnunet", "convert_nnunet", fold=options.fold,
          checkpoint=options.checkpoint, configuration=options.configuration, like=options.like)
