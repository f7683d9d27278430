"""`rfmedsam2 shard`: what training would hold and send on a mesh, without its devices."""

import argparse
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli.console import Console

HELP = "show what training would hold and send on a mesh, without its devices"


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("config", type=Path, help="YAML file, see configs/")
  parser.add_argument("overrides", nargs="*", help="values by path, mesh.fsdp=8")
  parser.add_argument("--devices", type=int, required=True, help="number of devices of the mesh")
  parser.add_argument("--phase", choices=("generator", "mask_adapter", "refiner"),
                      help="one phase (all that have steps)")
  parser.add_argument("--channels", type=int, default=1, help="of the images (1)")
  parser.add_argument("--structures", type=int, default=15, help="to be segmented (15)")
  parser.add_argument(
    "--no-compile", action="store_true", help="only where arrays lie: seconds, not minutes"
  )


def run(options: argparse.Namespace, console: Console) -> None:
  if options.devices < 1 or options.channels < 1 or options.structures < 1:
    raise UserError("--devices, --channels and --structures: give numbers from 1 on")
  import jax

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", options.devices)
  from rfmedsam2_jax.config import load_config
  from rfmedsam2_jax.training.phases import phase_names
  from rfmedsam2_jax.training.shard import shard

  config = load_config(options.config, options.overrides)
  lines: list[str] = []
  shard(
    config, options.channels, options.structures,
    [options.phase] if options.phase else phase_names(config),
    lines.append, not options.no_compile, console.line,
  )
  console.result("\n".join(lines), {"lines": lines})
