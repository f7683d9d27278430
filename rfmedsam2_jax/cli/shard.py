"""`rfmedsam2 shard`: show what training would hold and send on a mesh, without its devices."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rfmedsam2_jax.base.accelerators import prepare_tpu_compiler
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli.console import Console
from rfmedsam2_jax.programs.chips import slice_of, table

if TYPE_CHECKING:
  from rfmedsam2_jax.training.shard import Target


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("config", type=Path, nargs="?", help="YAML file, see configs/")
  add("overrides", nargs="*", help="values by path, mesh.fsdp=8")
  add("--devices", type=int, help="number of devices of the mesh, of any kind")
  add("--topology", metavar="NAME",
      help="a TPU slice instead, v5e-16 or v5e:4x4, by its own compiler (extra tpu-compile)")
  add("--slices", type=int, default=1, help="of that topology, joined by the hosts' network (1)")
  add("--topologies", action="store_true", help="only list the slices by name")
  add("--phase", choices=("generator", "tracker", "mask_adapter", "refiner"),
      help="one phase (all that have steps)")
  add("--channels", type=int, default=1, help="of the images (1)")
  add("--structures", type=int, default=15, help="to be segmented (15)")
  add("--no-compile", action="store_true", help="only where arrays lie: seconds, not minutes")


def run(options: argparse.Namespace, console: Console) -> None:
  if options.topologies:
    console.result("\n".join(table()), {"lines": table()})
    return
  _check(options)
  target = _tpu(options) if options.topology else _cpu(options)
  from rfmedsam2_jax.config import load_config
  from rfmedsam2_jax.training.phases import phase_names
  from rfmedsam2_jax.training.shard import shard
  config = load_config(options.config, options.overrides)
  lines: list[str] = []
  phases = [options.phase] if options.phase else phase_names(config)
  found = shard(config, options.channels, options.structures, phases, target, lines.append,
                not options.no_compile, console.line)
  console.result("\n".join(lines), {"lines": lines, "phases": found})


def _check(options: argparse.Namespace) -> None:
  if options.config is None:
    raise UserError("shard: give a config, or --topologies")
  if (options.devices is None) == (options.topology is None):
    raise UserError("shard: give either --devices, a number, or --topology, a TPU slice")
  if options.slices != 1 and not options.topology:
    raise UserError("--slices: are those of a --topology; give one")
  devices = 1 if options.devices is None else options.devices
  if min(devices, options.slices, options.channels, options.structures) < 1:
    raise UserError("--devices, --slices, --channels and --structures: give numbers from 1 on")


def _cpu(options: argparse.Namespace) -> "Target":
  """As many devices as are wanted, of a CPU."""
  import jax
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", options.devices)
  from rfmedsam2_jax.training.shard import Target
  return Target()


def _tpu(options: argparse.Namespace) -> "Target":
  """Devices of a slice, on this machine's CPU."""
  found = slice_of(options.topology)
  prepare_tpu_compiler()
  import jax
  jax.config.update("jax_platforms", "cpu")
  # How long the compiler takes is part of what is said.
  jax.config.update("jax_enable_compilation_cache", False)
  from rfmedsam2_jax.programs.topology import devices_of
  from rfmedsam2_jax.training.shard import Target
  several = f"{options.slices} slices of " if options.slices > 1 else ""
  return Target(devices_of(found, options.slices), found.chip,
                f"{several}{found.name} ({found.shape}, {found.chips} chips)")
