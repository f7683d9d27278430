"""Checkpoints of a phase: training state and data position together, asynchronous and atomic."""

from pathlib import Path
from typing import Any

import grain.checkpoint
import jax
import orbax.checkpoint as ocp

from rfmedsam2_jax.errors import UserError
from rfmedsam2_jax.training.state import TrainState


class Checkpoints:
  """The checkpoints of one phase, newest last."""

  def __init__(self, folder: Path, keep: int):
    self._folder = folder
    self._manager = ocp.CheckpointManager(
      folder.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        # Folders that a killed process left unfinished.
        cleanup_tmp_directories=True,
      ),
    )

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, iterator: Any) -> None:
    """Starts to save; the next save or `close` waits for it."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(_plain(state)),
        data=grain.checkpoint.CheckpointSave(iterator),
      ),
    )

  def restore(self, step: int, state: TrainState, iterator: Any) -> TrainState:
    """The state at a step, laid out as `state` is; `iterator` is moved to where it was."""
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(
            jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(state))
          ),
          data=grain.checkpoint.CheckpointRestore(iterator),
        ),
      )
    except Exception as error:  # Orbax raises many kinds
      reason = str(error).strip().split("\n")[0][:200]
      raise UserError(
        f"{self._folder / str(step)}: cannot be restored ({reason}); remove this checkpoint to go "
        "on from the one before"
      ) from error
    key = jax.random.wrap_key_data(restored["state"]["key"])
    return TrainState(**(restored["state"] | {"key": key}))

  def close(self) -> None:
    self._manager.wait_until_finished()
    self._manager.close()


def has_checkpoint(folder: Path) -> bool:
  """Whether a phase has come as far as its first checkpoint; a folder alone does not say so."""
  return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())


def _plain(state: TrainState) -> dict[str, Any]:
  """The state as a dict of plain arrays; typed random keys become their data."""
  values = {name: getattr(state, name) for name in TrainState.__dataclass_fields__}
  return values | {"key": jax.random.key_data(state.key)}
