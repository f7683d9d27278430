"""Checkpoints by name: fetched weights, and the tracker of an installed model. Needs no JAX."""

from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.kept import is_name, kept, names, nearest
from rfmedsam2_jax.base.places import BUILTIN
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.weights.published import PUBLISHED


def checkpoint_at(source: str | Path) -> Path:
  """Where a checkpoint lies that is not the package's own; a path that leads nowhere for none."""
  found = kept(source, "weights")
  if isinstance(source, str) and not found.exists():
    tracker = RunFolder(kept(source, "models")).params("tracker")
    return tracker if tracker.exists() else found
  return found


def no_checkpoint(source: str | Path) -> UserError:
  """The error about what is neither a checkpoint's place nor its name."""
  if is_name(source) and source in PUBLISHED:
    return UserError(f"{source}: is not on this machine; get it with rfmedsam2 fetch {source}")
  if is_name(source) and source in names("models"):
    return UserError(f"{source}: is an installed model without a tracker; give it to predict, or "
                     "here a checkpoint")
  near = nearest(source, [*names("weights"), *names("models"), *PUBLISHED, BUILTIN])
  return UserError(f"{source}: no such checkpoint; check the path or make one, docs/convert.md"
                   f"{near}")
