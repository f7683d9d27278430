"""The training loop of a phase: step n + 1 is dispatched before the metrics of step n are read."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rfmedsam2_jax.base.errors import Stopped, UserError
from rfmedsam2_jax.base.progress import PRINTED, Progress, Report, duration
from rfmedsam2_jax.config.training import LoopConfig, config_key
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.parallel import hosts
from rfmedsam2_jax.parallel.devices import flops_of
from rfmedsam2_jax.parallel.mesh import place_batch
from rfmedsam2_jax.training.checkpoints import Checkpoints
from rfmedsam2_jax.training.state import TrainState
from rfmedsam2_jax.training.stopping import listening
from rfmedsam2_jax.training.telemetry import Telemetry


def train_phase(
  phase: str,
  run: RunFolder,
  config: LoopConfig,
  state: TrainState,
  step_fn: Any,
  batches_from: Callable[[int], Any],
  mesh: Mesh,
  cases: Sequence[str],
  samples: dict[str, int],
  validate: Callable[[TrainState, int], tuple[dict[str, float], Path | None]] | None = None,
  report: Report = PRINTED,
  profile: bool = False,
) -> TrainState:
  """Trains until `config.steps`, from the newest checkpoint where there is one.

  Args:
    phase: as in training.phases.Phase; names the folder of checkpoints and the lines of the log.
    state: fresh, laid out on the mesh.
    step_fn: jitted (state, batch) -> (state, metrics), with the state donated.
    batches_from: gives the iterator of this process's rows of batch n and those after it. "case"
      of a batch, which stays on the host, numbers `cases`.
    samples: what one step goes through, by name, for the throughput.
    validate: (state, step) gives metrics for the log, of which the last one ranks checkpoints, and
      a picture; every `config.validate_every` steps.
    report: takes progress lines.
    profile: leave a trace of a few steps in `profile/`.

  Raises:
    UserError: the loss is not finite.
    Stopped: after SIGTERM, when everything is saved.
  """
  checkpoints = Checkpoints(run.checkpoints(phase), config.keep_checkpoints, config.keep_best)
  try:
    start = checkpoints.latest() or 0
    if start:
      state = checkpoints.restore(start, state)
      report(f"{phase}: resumed at step {start} of {config.steps}")
    run.forget_after(phase, start)
    batches = batches_from(start)
    watch = _Watch(phase, run, checkpoints, cases)
    with contextlib.ExitStack() as stack:
      stopping = stack.enter_context(listening())
      telemetry: Telemetry | None = None
      progress = Progress(f"{phase}: step", report)
      for step in range(start + 1, config.steps + 1):
        batch = dict(next(batches))
        drawn = batch.pop("case")
        placed = place_batch(batch, mesh)
        if telemetry is None:
          began = time.monotonic()
          report(f"{phase}: compiling the training step")
          compiled = step_fn.lower(state, placed).compile()
          report(f"{phase}: compiled in {time.monotonic() - began:.0f} s")
          telemetry = stack.enter_context(contextlib.closing(Telemetry(
            run.path, phase, run.writes, samples, flops_of(compiled), profile
          )))
          began = time.monotonic()
          progress(start, config.steps)
        telemetry.before(step - start - 1)
        state, metrics = compiled(state, placed)
        telemetry.after(step - start - 1, metrics)
        watch.add(step, metrics, drawn)
        # Waits for the step before, not for this one: the device always has work.
        watch.check(step - 1)
        progress(step, config.steps)
        if step % config.log_every == 0 or step == config.steps:
          watch.check(step)
          values = watch.means()
          rate = (step - start) / max(time.monotonic() - began, 1e-6)
          values |= {"steps_per_second": round(rate, 3)} | telemetry.measured(rate)
          run.log(phase, step, values)
          telemetry.scalars(step, values)
          report(
            f"{phase}: step {step}/{config.steps}  loss {values['loss']:.4f}  {rate:.2f} steps/s  "
            f"{duration((config.steps - step) / max(rate, 1e-6))} left"
          )
        score = None
        if validate and config.validate_every and step % config.validate_every == 0:
          watch.check(step)
          scores, picture = validate(state, step)
          score = list(scores.values())[-1]
          named = {f"validation/{name}": value for name, value in scores.items()}
          run.log(phase, step, named)
          telemetry.scalars(step, named)
          if picture is not None:
            telemetry.picture(step, "validation", picture)
          shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
          report(f"{phase}: validation at step {step}: {shown}")
        asked = stopping.asked(step)
        if asked or score is not None or step % config.checkpoint_every == 0 or (
          step == config.steps
        ):
          watch.check(step)
          checkpoints.save(step, state, score)
        if asked and step < config.steps:
          checkpoints.wait()
          raise Stopped(
            f"{run.path}: stopped by SIGTERM; the {phase} is saved at step {step} of "
            f"{config.steps}, go on with --resume"
          )
    return state
  finally:
    checkpoints.close()


class _Watch:
  """Metrics of the steps since the last line of the log, and what they were computed from."""

  def __init__(self, phase: str, run: RunFolder, checkpoints: Checkpoints, cases: Sequence[str]):
    self._phase, self._run, self._checkpoints, self._cases = phase, run, checkpoints, cases
    self._steps: list[tuple[int, dict[str, jax.Array], np.ndarray]] = []
    self._checked = 0

  def add(self, step: int, metrics: dict[str, jax.Array], drawn: np.ndarray) -> None:
    self._steps.append((step, metrics, drawn))

  def check(self, step: int) -> None:
    """Waits for the steps up to `step`.

    Raises:
      UserError: the loss of one of them is not finite; names its cases and the last checkpoint.
    """
    while self._checked < len(self._steps) and self._steps[self._checked][0] <= step:
      number, metrics, drawn = self._steps[self._checked]
      if not math.isfinite(float(metrics["loss"])):
        self._fail(number, drawn)
      self._checked += 1

  def means(self) -> dict[str, float]:
    """Means over the steps, all of them checked, which are then forgotten."""
    fetched = jax.device_get([metrics for _, metrics, _ in self._steps])
    self._steps, self._checked = [], 0
    return {name: float(np.mean([m[name] for m in fetched])) for name in fetched[-1]}

  def _fail(self, step: int, drawn: np.ndarray) -> None:
    mine = {self._cases[i] for i in drawn}
    # The loss is the same in every process, so that all of them come here.
    names = sorted({name for some in hosts.gather(mine) for name in some})
    last = self._checkpoints.latest()
    rate = f"{config_key(self._phase)}.optimizer.learning_rate"
    good = self._run.checkpoints(self._phase) / str(last) if last else "none"
    raise UserError(
      f"{self._run.path}: the {self._phase}'s loss is not finite at step {step} (cases "
      f"{', '.join(names)}); look at these cases or lower {rate}, "
      f"and go on with --resume (last good checkpoint: {good})"
    )
