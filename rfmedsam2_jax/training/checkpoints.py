"""Checkpoints of a phase: asynchronous, atomic, and laid out anew for whatever mesh restores them.

Sample n of the data is a function of the seed and n, so the number of steps is the data's position.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.training.state import TrainState


class Checkpoints:
  """The checkpoints of one phase, newest last; every process takes part in all of its methods.

  Args:
    keep: number of newest ones that are kept.
    keep_best: number of further ones that are kept, those with the highest score.
  """

  def __init__(self, folder: Path, keep: int, keep_best: int = 0):
    self._folder = folder
    policies: list[Any] = [checkpoint_managers.LatestN(keep)]
    if keep_best:
      policies.append(
        checkpoint_managers.BestN(
          get_metric_fn=lambda metrics: metrics["score"],
          n=keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._manager = ocp.CheckpointManager(
      folder.absolute(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        # Folders that a killed process left unfinished.
        cleanup_tmp_directories=True,
      ),
    )

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, score: float | None = None) -> None:
    """Starts to save; the next save or `close` waits for it.

    Args:
      score: mean validation Dice at this step, if there was a validation.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardSave(_plain(state))),
      metrics=None if score is None else {"score": score},
    )

  def restore(self, step: int, state: TrainState) -> TrainState:
    """The state at a step, laid out as `state` is."""
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(state))
    try:
      restored = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
      )
    except Exception as error:  # Orbax raises many kinds
      raise UserError(
        f"{self._folder / str(step)}: cannot be restored ({first_line(error)}); remove "
        "this checkpoint to go on from the one before"
      ) from error
    key = jax.random.wrap_key_data(restored["state"]["key"])
    return TrainState(**(restored["state"] | {"key": key}))

  def wait(self) -> None:
    """Until what was started to be saved is there."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self.wait()
    self._manager.close()


def has_checkpoint(folder: Path) -> bool:
  """Whether a phase has come as far as its first checkpoint; a folder alone does not say so."""
  return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())


def _plain(state: TrainState) -> dict[str, Any]:
  """The state as a dict of plain arrays; typed random keys become their data."""
  values = {name: getattr(state, name) for name in TrainState.__dataclass_fields__}
  return values | {"key": jax.random.key_data(state.key)}
