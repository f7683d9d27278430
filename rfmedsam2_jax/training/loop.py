"""The training loop of a phase: step n + 1 is dispatched before the metrics of step n are read."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rfmedsam2_jax.errors import Stopped, UserError
from rfmedsam2_jax.parallel import hosts
from rfmedsam2_jax.parallel.mesh import place_batch
from rfmedsam2_jax.progress import duration
from rfmedsam2_jax.training.checkpoints import Checkpoints
from rfmedsam2_jax.training.config import LoopConfig
from rfmedsam2_jax.training.folder import RunFolder
from rfmedsam2_jax.training.state import TrainState
from rfmedsam2_jax.training.stopping import listening

Report = Callable[[str], None]


def train_phase(
  phase: str,
  run: RunFolder,
  config: LoopConfig,
  state: TrainState,
  step_fn: Callable[..., Any],
  batches_from: Callable[[int], Any],
  mesh: Mesh,
  cases: Sequence[str],
  validate: Callable[[TrainState], dict[str, float]] | None = None,
  report: Report = print,
) -> TrainState:
  """Trains until `config.steps`, from the newest checkpoint where there is one.

  Args:
    phase: "generator" or "refiner"; names the folder of checkpoints and the lines of the log.
    state: fresh, laid out on the mesh.
    step_fn: compiled (state, batch) -> (state, metrics), with the state donated.
    batches_from: gives the iterator of this process's rows of batch n and those after it. "case"
      of a batch, which stays on the host, numbers `cases`.
    validate: gives metrics for the log every `config.validate_every` steps; the last one ranks
      checkpoints.
    report: takes progress lines.

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
    began = time.monotonic()
    with listening() as stopping, stopping.deferred():
      for step in range(start + 1, config.steps + 1):
        batch = dict(next(batches))
        drawn = batch.pop("case")
        state, metrics = step_fn(state, place_batch(batch, mesh))
        watch.add(step, metrics, drawn)
        # Waits for the step before, not for this one: the device always has work.
        watch.check(step - 1)
        if step == start + 1:
          watch.check(step)
          report(f"{phase}: first step, with compilation, {time.monotonic() - began:.0f} s")
          compiled = time.monotonic()
        if step % config.log_every == 0 or step == config.steps:
          watch.check(step)
          values = watch.means()
          rate = (step - start - 1) / max(time.monotonic() - compiled, 1e-6)
          left = (config.steps - step) / max(rate, 1e-6)
          run.log(phase, step, values | {"steps_per_second": round(rate, 3)})
          if step > start + 1:
            report(
              f"{phase}: step {step}/{config.steps}  loss {values['loss']:.4f}  "
              f"{rate:.2f} steps/s  {duration(left)} left"
            )
        score = None
        if validate and config.validate_every and step % config.validate_every == 0:
          watch.check(step)
          scores = validate(state)
          score = list(scores.values())[-1]
          run.log(phase, step, {f"validation/{name}": value for name, value in scores.items()})
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
    self._pending: list[dict[str, jax.Array]] = []
    self._drawn: dict[int, np.ndarray] = {}
    self._steps: list[int] = []

  def add(self, step: int, metrics: dict[str, jax.Array], drawn: np.ndarray) -> None:
    self._pending.append(metrics)
    self._steps.append(step)
    self._drawn[step] = drawn

  def check(self, step: int) -> None:
    """Waits for the steps up to `step`.

    Raises:
      UserError: the loss of one of them is not finite; names its cases and the last checkpoint.
    """
    for done in sorted(number for number in self._drawn if number <= step):
      loss = float(self._pending[self._steps.index(done)]["loss"])
      if not math.isfinite(loss):
        self._fail(done)
      del self._drawn[done]

  def means(self) -> dict[str, float]:
    fetched = jax.device_get(self._pending)
    self._pending, self._steps = [], []
    return {name: float(np.mean([m[name] for m in fetched])) for name in fetched[-1]}

  def _fail(self, step: int) -> None:
    names = sorted({self._cases[i] for i in self._drawn[step].ravel()})
    # The loss is the same in every process, so that all of them come here.
    names = sorted({name for some in hosts.gather(names) for name in some})
    last = self._checkpoints.latest()
    good = self._run.checkpoints(self._phase) / str(last) if last else "none"
    raise UserError(
      f"{self._run.path}: the {self._phase}'s loss is not finite at step {step} (cases "
      f"{', '.join(names)}); look at these cases or lower {self._phase}.optimizer.learning_rate, "
      f"and go on with --resume (last good checkpoint: {good})"
    )
