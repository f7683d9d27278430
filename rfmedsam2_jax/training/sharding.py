"""How arrays lie on devices: a mesh with a data axis, batches spread over it, parameters on each.

Parameters are replicated here; rules that spread them too belong in this file.
"""

import logging
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger(__name__)


def data_mesh(batch_size: int) -> Mesh:
  """All devices of this host that divide the batch, as one data axis."""
  devices = jax.local_devices()
  count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
  if count < len(devices):
    logger.warning(
      "batch_size %d uses %d of %d devices; choose a multiple", batch_size, count, len(devices)
    )
  return Mesh(np.array(devices[:count]), ("data",))


def replicate(tree: Any, mesh: Mesh) -> Any:
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def spread(batch: Any, mesh: Mesh) -> Any:
  """Puts a batch on the devices, its leading axis over the data axis."""
  return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
