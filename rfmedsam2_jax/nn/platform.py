"""What a network is traced for: the same sums are formed differently where the devices differ.

A `Platform` is a field of SAM2 and UNet, which hand it to all that chooses a form (attention, 3D
and depth-wise convolutions, bands of rows). So it is part of the keys under which JAX keeps
programs, and a network can be traced for devices that this machine does not have.
"""

import dataclasses
import re
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Platform:
  """A kind of device.

  `name`: "cpu", "gpu" or "tpu". `capability`: the compute capability of an NVIDIA GPU, (9, 0) for
  Hopper, whose attention is then cuDNN's where that fits; None of all others, and of a GPU that is
  to do without cuDNN.
  """

  name: str
  capability: tuple[int, int] | None = None

  @property
  def is_cpu(self) -> bool:
    return self.name == "cpu"


def platform_of(device: Any) -> Platform:
  """The platform of a jax.Device, which may be one that is only compiled for."""
  # AMD's are called by name, as in "gfx90a".
  found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
  return Platform(device.platform, (int(found[1]), int(found[2])) if found else None)


def default_platform() -> Platform:
  """The platform that JAX computes on unless it is told otherwise."""
  config: Any = jax.config
  chosen = config.jax_default_device  # a device or the name of a backend; JAX's caches know of it
  return platform_of(chosen if isinstance(chosen, jax.Device) else jax.devices(chosen)[0])
