"""The training loop of a phase: step n + 1 is dispatched before the metrics of step n are read."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rfmedsam2_jax.errors import UserError
from rfmedsam2_jax.progress import duration
from rfmedsam2_jax.training import sharding
from rfmedsam2_jax.training.checkpoints import Checkpoints
from rfmedsam2_jax.training.config import LoopConfig
from rfmedsam2_jax.training.folder import RunFolder
from rfmedsam2_jax.training.state import TrainState

Report = Callable[[str], None]


def train_phase(
  phase: str,
  run: RunFolder,
  config: LoopConfig,
  state: TrainState,
  step_fn: Callable[..., Any],
  batches: Any,
  batch_size: int,
  validate: Callable[[TrainState], dict[str, float]] | None = None,
  report: Report = print,
) -> TrainState:
  """Trains until `config.steps`, from the newest checkpoint where there is one.

  Args:
    phase: "generator" or "refiner"; names the folder of checkpoints and the lines of the log.
    state: fresh.
    step_fn: compiled (state, batch) -> (state, metrics), with the state donated.
    batches: grain iterator.
    validate: gives metrics for the log every `config.validate_every` steps.
    report: takes progress lines.

  Raises:
    UserError: the loss is not finite.
  """
  mesh = sharding.data_mesh(batch_size)
  state = sharding.replicate(state, mesh)
  checkpoints = Checkpoints(run.checkpoints(phase), config.keep_checkpoints)
  try:
    start = checkpoints.latest() or 0
    if start:
      state = checkpoints.restore(start, state, batches)
      report(f"{phase}: resumed at step {start} of {config.steps}")
    run.forget_after(phase, start)
    began = time.monotonic()
    pending: list[dict[str, jax.Array]] = []
    for step in range(start + 1, config.steps + 1):
      batch = sharding.spread(next(batches), mesh)
      state, metrics = step_fn(state, batch)
      pending.append(metrics)
      if len(pending) > 1:
        # Wait for the step before, not for this one: the device always has work.
        jax.block_until_ready(pending[-2]["loss"])
      if step == start + 1:
        jax.block_until_ready(metrics["loss"])
        report(f"{phase}: first step, with compilation, {time.monotonic() - began:.0f} s")
        compiled = time.monotonic()
      if step % config.log_every == 0 or step == config.steps:
        values = _means(pending)
        pending = []
        if not math.isfinite(values["loss"]):
          last = checkpoints.latest()
          raise UserError(
            f"{run.path}: the {phase}'s loss is not finite at step {step}; lower "
            f"{phase}.optimizer.learning_rate or check the data "
            f"(last good checkpoint: {last if last else 'none'})"
          )
        rate = (step - start - 1) / max(time.monotonic() - compiled, 1e-6)
        left = (config.steps - step) / max(rate, 1e-6)
        run.log(phase, step, values | {"steps_per_second": round(rate, 3)})
        if step > start + 1:
          report(
            f"{phase}: step {step}/{config.steps}  loss {values['loss']:.4f}  "
            f"{rate:.2f} steps/s  {duration(left)} left"
          )
      if validate and config.validate_every and step % config.validate_every == 0:
        scores = validate(state)
        run.log(phase, step, {f"validation/{name}": value for name, value in scores.items()})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        report(f"{phase}: validation at step {step}: {shown}")
      if step % config.checkpoint_every == 0 or step == config.steps:
        checkpoints.save(step, state, batches)
    return state
  finally:
    checkpoints.close()


def _means(pending: list[dict[str, jax.Array]]) -> dict[str, float]:
  fetched = jax.device_get(pending)
  return {name: float(np.mean([m[name] for m in fetched])) for name in fetched[-1]}
