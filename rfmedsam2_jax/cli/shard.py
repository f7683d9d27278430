"""`rfmedsam2 shard`: show what training would hold and send on a mesh, without its devices."""

import argparse
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("config", type=Path, help="YAML file, see configs/")
  add("overrides", nargs="*", help="values by path, mesh.fsdp=8")
  add("--devices", type=int, required=True, help="number of devices of the mesh")
  add("--phase", choices=("generator", "tracker", "mask_adapter", "refiner"),
      help="one phase (all that have steps)")
  add("--channels", type=int, default=1, help="of the images (1)")
  add("--structures", type=int, default=15, help="to be segmented (15)")
  add("--no-compile", action="store_true", help="only where arrays lie: seconds, not minutes")


def run(options: argparse.Namespace, console: Console) -> None:
  if min(options.devices, options.channels, options.structures) < 1:
    raise UserError("--devices, --channels and --structures: give numbers from 1 on")
  import jax
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", options.devices)
  from rfmedsam2_jax.config import load_config
  from rfmedsam2_jax.training.phases import phase_names
  from rfmedsam2_jax.training.shard import shard
  config = load_config(options.config, options.overrides)
  lines: list[str] = []
  phases = [options.phase] if options.phase else phase_names(config)
  shard(config, options.channels, options.structures, phases, lines.append,
        not options.no_compile, console.line)
  console.result("\n".join(lines), {"lines": lines})
