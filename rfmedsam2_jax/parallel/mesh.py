"""The mesh: how many devices share the batch, the parameters, and the width of layers.

A batch is spread over `data` and `fsdp` together, parameters and optimizer state over `fsdp`
(parallel.rules). Processes hold the rows of a batch that lie on their devices.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from pydantic import Field

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.ranges import STRICT
from rfmedsam2_jax.nn.platform import Platform, platform_of

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each of `AXES`; their product is their number. One may be -1: the rest."""
  __pydantic_config__ = STRICT
  data: int = -1  # copies of the parameters, each with its share of the batch
  fsdp: int = 1   # parts of parameters and optimizer state; memory falls, traffic rises
  model: int = 1  # parts of the widths of attention and MLPs, for networks too large otherwise
  # Devices that `train` makes of a CPU, where JAX has no others. XLA does the 2D convolutions of a
  # device on one core.
  cpu_devices: Annotated[int, Field(ge=1, le=2**10)] = 1

  def __post_init__(self):
    sizes = self.data, self.fsdp, self.model
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
      raise ValueError(f"mesh is {sizes}; give sizes from 1 on, and -1 (the rest) at most once")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh over all devices of all processes, of one slice or of several.

  Args:
    devices: others than these, which may be those of a machine that is only compiled for.

  Raises:
    UserError: there are too few devices, or some left, or slices that the sizes do not fit.
  """
  devices, sizes = list(devices or jax.devices()), [config.data, config.fsdp, config.model]
  known = math.prod(size for size in sizes if size != -1)
  wanted = f"mesh: data {sizes[0]} x fsdp {sizes[1]} x model {sizes[2]}"
  if -1 in sizes:
    if len(devices) % known:
      raise UserError(
        f"{wanted}: {len(devices)} devices are no multiple of {known}; change the sizes")
    sizes[sizes.index(-1)] = len(devices) // known
  count = math.prod(sizes)
  if count > len(devices):
    raise UserError(f"{wanted}: needs {count} devices, but there are {len(devices)}; "
                    "make it smaller, or let one size be -1")
  if count < len(devices) and jax.process_count() > 1:
    raise UserError(f"{wanted}: uses {count} of {len(devices)} devices; with several processes "
                    "all have to be used, let one size be -1")
  types = (AxisType.Auto,) * len(AXES)
  return Mesh(_arranged(devices, count, sizes, wanted), AXES, axis_types=types)


def _arranged(all_devices: list[Any], used: int, sizes: list[int], wanted: str) -> np.ndarray:
  """The first `used` devices [data, fsdp, model], neighbours on the network where most is sent.

  Several slices of TPUs have `data` across them, since between them the network is slow. To JAX the
  hosts of a cluster of GPUs or CPUs are slices too: there it is so where it can be.
  """
  devices, (data, fsdp, model) = all_devices[:used], sizes
  slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
  count, held = len(slices), sorted(set(slices.values()))
  divides = data % count == 0 and len(held) == 1
  if not divides and devices[0].platform == "tpu":
    of_each = " or ".join(map(str, held))
    raise UserError(
      f"{wanted}: {len(devices)} devices are {count} slices of {of_each}, and fsdp x model "
      f"({fsdp} x {model}) have to lie within one; make their product a divisor of {held[0]}"
      + (", and use slices of one size" if len(held) > 1 else ""))
  try:
    if count > 1 and divides:
      return mesh_utils.create_hybrid_device_mesh(
        (data // count, fsdp, model), (count, 1, 1), devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  except (AssertionError, NotImplementedError, ValueError):  # of the wiring of TPUs
    raise UserError(f"{wanted}: the wiring of {used} of {len(all_devices)} devices has "
                    "no room for it; use all of them, or powers of 2") from None


def mesh_platform(mesh: Mesh) -> Platform:
  """What programs over a mesh are traced for: its devices, which this machine need not have.

  Without cuDNN where the compiler is to divide widths over `model`: it cannot cut cuDNN's attention
  within `over_mesh`.
  """
  platform = platform_of(mesh.devices.flat[0])
  return platform if mesh.shape["model"] == 1 else Platform(platform.name)


def batch_shards(mesh: Mesh) -> int:
  """Number of parts that a batch is cut into."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int, name: str) -> None:
  """Raises UserError unless every device has the same share of every microbatch."""
  parts = batch_shards(mesh) * microbatches
  if batch_size % parts:
    times = f" times {microbatches} microbatches" if microbatches > 1 else ""
    raise UserError(
      f"{name}.batch_size is {batch_size}: cannot be spread over {batch_shards(mesh)} devices "
      f"(mesh.data x mesh.fsdp){times}; use a multiple of {parts}")


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """Rows of a global batch that lie on devices of this process, ascending."""
  places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  return sorted({int(row) for place in places.values() for row in np.arange(batch_size)[place]})


def place_batch(batch: Any, mesh: Mesh) -> Any:
  """Puts this process's rows (see `local_rows`) of a batch on the devices."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def batch_shapes(batch: Any, mesh: Mesh) -> Any:
  """Shapes of a whole batch, spread as `place_batch` spreads one."""
  where = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), batch)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of every array of a batch: its first axis over `BATCH_AXES`."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))
