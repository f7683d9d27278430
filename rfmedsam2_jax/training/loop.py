"""The training loop of a phase: step n + 1 is dispatched before the metrics of step n are read."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rfmedsam2_jax.base import command
from rfmedsam2_jax.base.errors import Stopped, UserError
from rfmedsam2_jax.base.progress import Progress, Report, duration
from rfmedsam2_jax.data.datasets import Case
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.parallel import hosts
from rfmedsam2_jax.parallel.mesh import batch_shapes, local_rows, place_batch
from rfmedsam2_jax.report.contact_sheet import save_contact_sheet
from rfmedsam2_jax.segmentation.segmenter import Segmenter
from rfmedsam2_jax.training.checkpoints import Checkpoints, latest_checkpoint
from rfmedsam2_jax.training.compiled import products_of
from rfmedsam2_jax.training.phases import Phase
from rfmedsam2_jax.training.state import TrainState
from rfmedsam2_jax.training.telemetry import Telemetry
from rfmedsam2_jax.training.time_spent import TimeSpent
from rfmedsam2_jax.training.validation import RANKED_BY, Ranking, score_stages


class Training(NamedTuple):
  """What the phases of a run have in common."""

  run: RunFolder
  mesh: Mesh
  seed: int
  held_out: Sequence[Case]  # that are validated on
  about: dict[str, Any]  # what every checkpoint says of the run
  report: Report
  profile: bool  # leave a trace of a few steps of each phase in `profile/`


def train_phase(
  training: Training, phase: Phase, segmenter: Segmenter | None, cases: Sequence[str],
  state: TrainState,
) -> TrainState:
  """Trains until the phase has had its steps, from its newest checkpoint where there is one.

  segmenter: with what is trained already, for validation; None for none. cases: that batches are
  made of. state: before the first step, laid out on the mesh.

  Raises:
    UserError: the loss is not finite.
    Stopped: after SIGTERM, when everything is saved.
  """
  entered = time.monotonic()
  run, loop, name = training.run, phase.settings.loop, phase.name
  checkpoints = Checkpoints(run.checkpoints(name), loop.keep_checkpoints, loop.keep_best)
  with contextlib.closing(checkpoints):
    start = checkpoints.latest() or 0
    if start:
      state = checkpoints.restore(start, state)
      training.report(f"{name}: resumed at step {start} of {loop.steps}")
    run.forget_after(name, start)
    ranking = Ranking(run, name, start)
    checkpoints.scores |= ranking.known
    if start == loop.steps:
      return state
    with _listening() as stop_after, contextlib.ExitStack() as stack:
      compiled = _compiled(training, phase, state)
      spent = TimeSpent(entered, time.monotonic())
      log = _Log(training, phase, start, products_of(compiled), ranking, spent)
      stack.callback(log.telemetry.close)
      steps = log.steps(state, compiled, cases)
      for step, state in steps:
        score, every = None, loop.validate_every
        validates = bool(training.held_out and every) and step % every == 0
        if validates and segmenter is not None:
          log.check(step)
          with spent.on("validation"):
            networks: Any = {phase.network: phase.final(state, training.mesh)}
            score = log.validation(step, dataclasses.replace(segmenter, **networks))
        asked, last = stop_after(step), step == loop.steps
        if asked or last or validates or step % loop.checkpoint_every == 0:
          log.check(step)
          with spent.on("saving"):
            run.sync()  # first: a resumed phase drops what is behind its checkpoint
            checkpoints.save(step, state, score)
        if asked and not last:
          checkpoints.wait()
          raise Stopped(f"{run.path}: stopped by SIGTERM; the {name} is saved at step {step} of "
                        f"{loop.steps}, resume it")
  return state


@contextlib.contextmanager
def _listening() -> Iterator[Callable[[int], bool]]:
  """Listens to SIGTERM; gives a function that says whether to stop after a step.

  Preempted machines get it. The answer is the same, at the same step, in every process.
  """
  if jax.process_count() > 1:  # they agree through JAX's own listener
    yield multihost_utils.reached_preemption_sync_point
    return
  asked: list[int] = []
  # Signals come to main threads, and other programs than a command keep their handler.
  if not command.running() or threading.current_thread() is not threading.main_thread():
    yield lambda step: False
    return
  before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
  try:
    yield lambda step: bool(asked)
  finally:
    signal.signal(signal.SIGTERM, before)


def _compiled(training: Training, phase: Phase, state: TrainState) -> Any:
  began = time.monotonic()
  training.report(f"{phase.name}: compiling the training step")
  step = phase.step(state, training.mesh)
  compiled = step.lower(state, batch_shapes(phase.batch, training.mesh)).compile()
  training.report(f"{phase.name}: compiled in {time.monotonic() - began:.0f} s")
  return compiled


class _Log:
  """What is told of the steps of a phase: in log.jsonl, in TensorBoard and on the way."""

  def __init__(
    self, training: Training, phase: Phase, start: int, flops: float, ranking: Ranking,
    spent: TimeSpent,
  ):
    self.start, self.stop = start, phase.settings.loop.steps
    self.telemetry = Telemetry(training.run, phase.name, phase.samples, flops, training.profile)
    self._training, self._phase, self._ranking = training, phase, ranking
    self._spent = spent
    self._progress = Progress(f"{phase.name}: step", training.report)
    self._progress(start, self.stop)
    self._kept: list[dict[str, jax.Array]] = []  # metrics, from one line of the log to the next
    # Steps whose loss may not be finite: number, metrics, the cases that they come from.
    self._unchecked: list[tuple[int, dict[str, jax.Array], list[str]]] = []

  def steps(
    self, state: TrainState, compiled: Any, cases: Sequence[str]
  ) -> Iterator[tuple[int, TrainState]]:
    """The steps, each with the state behind it; lines are written where they are due."""
    mesh, settings = self._training.mesh, self._phase.settings
    rows = local_rows(mesh, settings.batch_size)
    batches = self._phase.batches(self._training.run.path, cases, rows, self.start)
    for done, step in enumerate(range(self.start + 1, self.stop + 1)):
      with self._spent.on("waiting"):
        batch = dict(next(batches))
      drawn = [cases[i] for i in batch.pop("case")]
      self.telemetry.before(done)
      state, metrics = compiled(state, place_batch(batch, mesh))
      self.telemetry.after(done, metrics)
      self._kept.append(metrics)
      self._unchecked.append((step, metrics, drawn))
      # Waits for the step before, not for this one: the device always has work.
      self.check(step - 1)
      self._progress(step, self.stop)
      if step % settings.loop.log_every == 0 or step == self.stop:
        self._line(step)
      yield step, state

  def _line(self, step: int) -> None:
    """Tells the means over the steps since the last line."""
    self.check(step)
    done, now = step - self.start, time.monotonic()
    rate = done / self._spent.stepping(now)
    fetched, self._kept = jax.device_get(self._kept), []
    means = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[-1]}
    values = means | {"steps_per_second": round(rate, 3)} | self.telemetry.measured(rate)
    values |= self._spent.shares(now)
    self._write(step, values)
    # With as much validation as so far.
    left = duration((self.stop - step) * (now - self._spent.began) / done)
    self._training.report(f"{self._phase.name}: step {step}/{self.stop}  loss "
                          f"{values['loss']:.4f}  {rate:.2f} steps/s  {left} left")

  def check(self, step: int) -> None:
    """Waits for the steps up to `step`; UserError where the loss of one is not finite."""
    while self._unchecked and self._unchecked[0][0] <= step:
      number, metrics, drawn = self._unchecked.pop(0)
      if math.isfinite(float(metrics["loss"])):
        continue
      # The loss is the same in every process, so that all of them come here.
      names = sorted({name for some in hosts.gather(set(drawn)) for name in some})
      run, name = self._training.run, self._phase.name
      last = latest_checkpoint(run.checkpoints(name))
      raise UserError(
        f"{run.path}: the {name}'s loss is not finite at step {number} (cases {', '.join(names)}); "
        f"look at these cases or lower {self._phase.key}.optimizer.learning_rate, and resume it "
        f"(last good checkpoint: {last or 'none'})")

  def validation(self, step: int, segmenter: Segmenter) -> float | None:
    """Tells the mean Dice of every stage, and which of them ranks checkpoints; returns that one.

    As in `evaluate` there is none where no case and no prediction has a structure.
    """
    run, some = self._training.run, self._phase.settings.loop.validation_cases
    stages, shown = score_stages(segmenter, self._training.held_out[:some], self._training.report)
    dice = {f"stage{n} Dice": self._ranking.dice(scores) for n, scores in enumerate(stages)}
    *_, ranks = dice
    self._write(step, {f"validation/{name}": x for name, x in dice.items()},
                self._ranking.note | {RANKED_BY: f"validation/{ranks}"})
    if run.writes and shown is not None:
      path = run / "pictures" / f"{self._phase.name}-{step:06d}.png"
      save_contact_sheet(path, [shown], segmenter.plan.labels.structures)
      self.telemetry.picture(step, "validation", path)
    told = "  ".join(f"{name} {'-' if x is None else f'{x:.4f}'}" for name, x in dice.items())
    self._training.report(
      f"{self._phase.name}: validation at step {step}: {told}; {ranks} ranks checkpoints")
    return dice[ranks]

  def _write(
    self, step: int, values: Mapping[str, float | None], note: Mapping[str, str] = {}
  ) -> None:
    self._training.run.log(self._phase.name, step, {**values, **note})
    self.telemetry.scalars(step, {name: x for name, x in values.items() if x is not None})
