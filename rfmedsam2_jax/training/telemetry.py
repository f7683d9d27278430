"""What a person watches while a phase trains: TensorBoard, throughput, arithmetic, a profile."""

import math
from pathlib import Path
from typing import Any

import jax
import matplotlib.image
from tensorboardX import SummaryWriter

from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.parallel.devices import peak_flops, peak_memory

# Steps that a profile covers, counted from the first of this process; compilation is behind them.
PROFILED = range(4, 7)


class Telemetry:
  """Numbers of a phase, in `tensorboard/PHASE` of the run, and a trace in `profile/PHASE` if asked.

  samples: see training.phases.Phase. flops: of a step, on one device.
  """

  def __init__(
    self, run: RunFolder, phase: str, samples: dict[str, int], flops: float, profile: bool
  ):
    self._writer = SummaryWriter(str(run / "tensorboard" / phase)) if run.writes else None
    self._samples, self._flops = samples, flops
    self._profile = run / "profile" / phase if profile else None
    self._tracing = False

  def measured(self, steps_per_second: float) -> dict[str, float]:
    """Throughput, share of the devices' arithmetic (where their peak is known) and memory."""
    found = {f"{name}_per_second": n * steps_per_second for name, n in self._samples.items()}
    if self._flops:
      found["tflops_per_device"] = self._flops * steps_per_second / 1e12
      if peak := peak_flops(jax.local_devices()[0].device_kind):
        found["mfu"] = self._flops * steps_per_second / peak
    found["peak_gib"] = peak_memory() / 2**30
    return {name: float(f"{value:.4g}") for name, value in found.items()}

  def scalars(self, step: int, values: dict[str, float]) -> None:
    if self._writer:
      for name, value in values.items():
        if math.isfinite(value):
          self._writer.add_scalar(name, value, step)
      self._writer.flush()

  def picture(self, step: int, name: str, path: Path) -> None:
    """A PNG."""
    if self._writer:
      self._writer.add_image(name, matplotlib.image.imread(path)[..., :3], step, dataformats="HWC")
      self._writer.flush()

  def before(self, done: int) -> None:
    """To be called before each step, with the number of those that this process has done."""
    if self._profile and done == PROFILED.start:
      jax.profiler.start_trace(str(self._profile))
      self._tracing = True

  def after(self, done: int, outputs: Any) -> None:
    """To be called after each step, with what it gave."""
    if self._tracing and done + 1 == PROFILED.stop:
      jax.block_until_ready(outputs)
      self._close_profile()

  def _close_profile(self) -> None:
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False

  def close(self) -> None:
    self._close_profile()
    if self._writer:
      self._writer.close()
