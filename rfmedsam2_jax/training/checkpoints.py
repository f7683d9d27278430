"""Checkpoints of a phase: asynchronous, atomic, and laid out anew for whatever mesh restores them.

Sample n of the data is a function of the seed and n, so the number of steps is the data's position.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from rfmedsam2_jax.base.buckets import names
from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.training.state import TrainState
from rfmedsam2_jax.weights.orbax import file_errors, is_saved, read_whole, written_at


class _Best(NamedTuple):
  """Keeps the `n` checkpoints with the highest scores; Orbax's own policy forgets when resumed."""

  n: int
  scores: Mapping[int, float]

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    steps = sorted(c.step for c in checkpoints if c.step in self.scores)
    best = sorted(steps, key=self.scores.__getitem__)[-self.n :]
    return [c.step in best for c in checkpoints]


class Checkpoints:
  """The checkpoints of one phase, newest last; every process takes part in all of its methods.

  keep: number of newest ones that are kept. keep_best: of further ones, those with the highest of
  `scores`, by step of those that were validated; a resumed run puts in what it knows.
  """

  def __init__(self, folder: Path, keep: int, keep_best: int = 0):
    self._folder = written_at(folder)
    self.scores: dict[int, float] = {}
    best: list[Any] = [_Best(keep_best, self.scores)] if keep_best else []
    self._manager = ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(
        [checkpoint_managers.LatestN(keep), *best]),
      cleanup_tmp_directories=True,  # that a killed process left unfinished
    ))

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, score: float | None = None) -> None:
    """Starts to save; the next save or `close` waits for it. score: mean validation Dice."""
    if score is not None:
      self.scores[step] = score
    self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(_plain(state))))

  def restore(self, step: int, state: TrainState) -> TrainState:
    """The state at a step, laid out as `state` is.

    Raises:
      UserError: it is damaged, it cannot be read at present, or it is of another training.
    """
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(state))
    path = self._folder / str(step)
    damaged = "is damaged ({}); remove this checkpoint to go on from the one before"
    try:
      restored = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))
    except Exception as error:
      with file_errors(path, damaged):
        # By these kinds what was asked of it may be wrong instead, if its files can be read.
        if type(error) not in (ValueError, TypeError, AttributeError):
          raise
        read_whole(path / "state")
      if type(error) is not ValueError:
        raise
      raise UserError(
        f"{path}: is not of this training ({first_line(error)}); resume it with the config and the "
        "version that it was made with") from error
    key = jax.random.wrap_key_data(restored["state"]["key"])
    return TrainState(**restored["state"] | {"key": key})

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def close(self) -> None:
    self.wait()
    self._manager.close()


def latest_checkpoint(folder: Path) -> Path | None:
  """The newest checkpoint of a phase, if it has come so far; a folder alone does not say so."""
  steps = sorted((int(name) for name in names(folder) if name.isdigit()), reverse=True)
  return next((folder / str(step) for step in steps if is_saved(folder / str(step))), None)


def _plain(state: TrainState) -> dict[str, Any]:
  """The state as a dict of plain arrays; typed random keys become their data."""
  values = {name: getattr(state, name) for name in TrainState.__dataclass_fields__}
  return values | {"key": jax.random.key_data(state.key)}
