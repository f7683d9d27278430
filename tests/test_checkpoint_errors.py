"""What cannot be read is said as what it is: only damage makes a checkpoint worth removing."""

import contextlib
import errno

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.training.checkpoints import Checkpoints
from rfmedsam2_jax.training.state import init_state
from rfmedsam2_jax.weights.orbax import load_params, save_params

PARAMS = {f"layer_{i}": {"kernel": jnp.full((4, 4), i, jnp.float32)} for i in range(2)}


def state_of(params):
  return init_state(params, ("*",), optax.sgd(0.1), jax.random.key(0))


@pytest.fixture
def folder(tmp_path):
  with contextlib.closing(Checkpoints(tmp_path / "checkpoints", keep=1)) as checkpoints:
    checkpoints.save(3, state_of(PARAMS))
  return tmp_path / "checkpoints"


def restore(folder, params=PARAMS):
  with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
    return checkpoints.restore(3, state_of(params))


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_a_file_that_is_cut_off_is_damage(folder, name):
  path = folder / "3" / "state" / name
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(UserError, match=r"3: is damaged \(.*remove this checkpoint"):
    restore(folder)


@pytest.mark.parametrize("params", [
  PARAMS | {"layer_0": {"kernel": jnp.ones((5, 4))}}, PARAMS | {"layer_2": {"kernel": jnp.ones(3)}},
])
def test_a_state_of_another_network_is_not_damage(folder, params):
  with pytest.raises(UserError, match="3: is not of this training .* resume it with the config"):
    restore(folder, params)
  assert jax.tree.all(jax.tree.map(jnp.array_equal, restore(folder).trained, PARAMS))


@pytest.mark.parametrize("error, says", [
  (PermissionError(errno.EACCES, "Permission denied"), "present .Permission denied.; see to that"),
  (OSError(errno.EIO, "Input/output error"), "present .Input/output error.; see to that"),
  (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "present .RESOURCE_EXHAUSTED: Out of memory"),
  (MemoryError(), None),
  (KeyboardInterrupt(), None),
  (TypeError("a mistake of ours"), None),
])
def test_what_is_not_the_checkpoints_fault_never_asks_to_remove_it(
  folder, tmp_path, monkeypatch, error, says
):
  save_params(tmp_path / "params", PARAMS, {})

  def fails(*_, **__):
    raise error

  readers = {"restored": lambda: restore(folder)}
  monkeypatch.setattr(ocp.CheckpointManager, "restore", fails)
  if not isinstance(error, TypeError):  # there is no advice to remove parameters
    readers["loaded"] = lambda: load_params(tmp_path / "params", PARAMS)
    monkeypatch.setattr(ocp.Checkpointer, "restore", fails)
  for read in readers.values():
    with pytest.raises(UserError if says else type(error), match=says) as found:
      read()
    assert "remove" not in str(found.value)
