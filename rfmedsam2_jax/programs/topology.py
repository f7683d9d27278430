"""The devices of a TPU slice that this machine need not have: they can be compiled for."""

from typing import Any

from jax.experimental import topologies

from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.programs.chips import Slice


def devices_of(found: Slice, slices: int = 1) -> list[Any]:
  """Devices of some slices alike, of which `slice_index` tells the slice.

  libtpu has to be prepared (base.accelerators). UserError if it does not know the slice.
  """
  name = f"{found.chip.library}:{found.shape}"
  try:
    return list(topologies.get_topology_desc(
      topology_name=name, platform="tpu", **found.options(slices)).devices)
  except (RuntimeError, NotImplementedError) as error:
    raise UserError(f"--topology {found.name}: the TPU compiler knows no {name} "
                    f"({first_line(error)})") from None
