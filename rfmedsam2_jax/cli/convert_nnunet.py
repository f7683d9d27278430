"""`rfmedsam2 convert nnunet`: turn a trained nnU-Net v2 (3D, plain or with a residual encoder, one
fold or several) into a prompt generator and the config that goes with it."""

import argparse
from pathlib import Path

from rfmedsam2_jax.cli.console import Console
from rfmedsam2_jax.cli.convert import check_paths, convert


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("source", type=Path,
      help="the model's folder nnUNetTrainer__nnUNetPlans__3d_fullres, or a .pth")
  add("out", type=Path, help="the checkpoint's folder")
  add("--fold", nargs="+", default=["0"], metavar="FOLD",
      help="of a model's folder: 0 to 4 or all; the logits of several are averaged")
  add("--checkpoint", choices=("final", "best"), default="final", help="of a model's folder")
  add("--configuration", help="of the plans; that of the checkpoint unless given")
  add("--like", type=Path, metavar="VOLUME",
      help="a volume that it was trained on: its orientation is the network's")
  add("--overwrite", action="store_true", help="replace OUT")


def run(options: argparse.Namespace, console: Console) -> None:
  check_paths(options, "file; give nnU-Net's model folder or a checkpoint file")
  convert(options, console, "nnunet", "convert_nnunet", folds=tuple(options.fold),
          checkpoint=options.checkpoint, configuration=options.configuration, like=options.like)
