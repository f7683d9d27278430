"""How many devices a CPU is; what devices can do at most, and hold."""

import os
import resource

import jax

from rfmedsam2_jax.programs.chips import CHIPS

# Products of dense matrices in bfloat16, FLOP/s of one device, from the vendors' data sheets; the
# names begin as JAX's device_kind does. TPUs: programs.chips.
PEAK_FLOPS = (
  ("NVIDIA B200", 2250e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA H200", 989e12),
  ("NVIDIA H100 NVL", 835e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100", 989e12),
  ("NVIDIA A100", 312e12), ("NVIDIA L4", 121e12),
)


def divide_cpu(count: int) -> bool:
  """Makes `count` devices of a CPU, unless the environment names a number; False if too late."""
  forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  if count == 1 or forced or "JAX_NUM_CPU_DEVICES" in os.environ:
    return True
  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:  # it has looked at its devices
    return jax.default_backend() != "cpu" or jax.local_device_count() == count
  return True


def peak_flops(kind: str) -> float | None:
  """FLOP/s that a kind of device is sold with, or None where that is not known (all CPUs)."""
  for name, chip in CHIPS.items():
    if kind in (chip.kind, f"TPU {name}"):
      return chip.flops / chip.devices
  return next((peak for name, peak in PEAK_FLOPS if kind.startswith(name)), None)


def peak_memory() -> float:
  """Bytes that the fullest device of this process has held at once; of a CPU, the process."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peak = max(float(found.get("peak_bytes_in_use", 0)) for found in stats)
  return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
