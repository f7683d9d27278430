"""The devices of a TPU slice that this machine need not have: they can be compiled for."""

from typing import Any

from jax.experimental import topologies

from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.programs.chips import Slice


def devices_of(found: Slice, slices: int = 1) -> list[Any]:
  """Devices of some slices alike, of which `slice_index` tells the slice.

  libtpu has to be prepared (base.accelerators). UserError if it is held or does not know the slice.
  """
  name = f"{found.chip.library}:{found.shape}"
  try:
    return list(topologies.get_topology_desc(
      topology_name=name, platform="tpu", **found.options(slices)).devices)
  except (RuntimeError, NotImplementedError) as error:
    raise UserError(
      f"--topology {found.name}: libtpu gives no {name} ({first_line(error)}); if another program "
      "holds it, set ALLOW_MULTIPLE_LIBTPU_LOAD=1; if it is older than the chip, pip install -U "
      "'rfmedsam2-jax[tpu-compile]'") from None
