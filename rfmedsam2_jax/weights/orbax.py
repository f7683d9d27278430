"""Parameters on disk: an Orbax checkpoint that describes itself.

`<folder>/params` is the parameter tree, `<folder>/about` a JSON of what it is (config, source,
versions). Writing is atomic: a folder that exists is complete.
"""

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict

from rfmedsam2_jax.base import buckets
from rfmedsam2_jax.base.addresses import address_of, check_for_orbax
from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.nn.layers import Params

# What Orbax and TensorStore raise of files that are cut off, changed or gone.
_DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, RuntimeError,
           FileNotFoundError, NotADirectoryError, IsADirectoryError)
_COMPLETE = "commit_success.txt"  # beside a checkpoint in a bucket that is whole
# Beginnings of errors that are of these kinds too, but of disks, networks and memory.
_ELSEWHERE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED",
              "CANCELLED", "ABORTED")


@contextlib.contextmanager
def file_errors(folder: Path, damaged: str) -> Iterator[None]:
  """UserErrors for what goes wrong while a checkpoint is read.

  Damage is said as `damaged`, with the error in place of its {}. A disk, an access or a device's
  memory that fails is said as such, and all else (the host's memory, an interruption) stays what it
  is: none of that makes a checkpoint worth removing.
  """
  try:
    yield
  except Exception as error:
    elsewhere = str(error).startswith(_ELSEWHERE)
    if isinstance(error, _DAMAGE) and not elsewhere:
      raise UserError(f"{folder}: {damaged.format(first_line(error))}") from error
    if not elsewhere and not isinstance(error, OSError):
      raise
    what = getattr(error, "strerror", None) or first_line(error)
    raise UserError(f"{folder}: cannot be read at present ({what}); see to that, and do it again"
                    ) from error


def read_whole(folder: Path) -> None:
  """Reads all arrays of a saved tree, whatever they are for; raises where that fails."""
  handler = ocp.PyTreeCheckpointHandler()
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                          handler.metadata(folder).tree)
  handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def save_params(folder: str | Path, params: Params, about: dict[str, Any]) -> None:
  """Writes params, bfloat16 as float32, and a JSON-serialisable description over what was there."""
  # Weights that training held in bfloat16, so that every checkpoint is read alike.
  params = jax.tree.map(lambda x: x.astype("float32") if x.dtype == "bfloat16" else x, params)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    checkpointer.save(written_at(folder), force=True, args=ocp.args.Composite(
      params=ocp.args.StandardSave(params),
      about=ocp.args.JsonSave(about | {"checksum": checksum(params)})))


def written_at(folder: str | Path) -> Any:
  """Where Orbax writes a checkpoint: an absolute path, or the address that a copy stands for.

  UserError for an address to which Orbax cannot write.
  """
  check_for_orbax(folder)
  address = address_of(folder)
  return Path(folder).absolute() if address is None else epath.Path(address)


def is_saved(folder: Path) -> bool:
  """Whether a checkpoint is there, whole.

  On a disk it is there or not. In a bucket Orbax writes it where it stays, and a last file when it
  is complete.
  """
  return folder.is_dir() if address_of(folder) is None else buckets.exists(folder / _COMPLETE)


def checksum(params: Params) -> str:
  """CRC-32 of all parameters with their paths; what lies on disk has none of its own."""
  crc = 0
  for path, x in sorted(flatten_dict(params, sep="/").items()):
    crc = zlib.crc32(np.ascontiguousarray(x).data, zlib.crc32(path.encode(), crc))
  return f"{crc:08x}"


def load_params(folder: str | Path, like: Params) -> Params:
  """Parameters of the shapes and dtypes of `like` (arrays or jax.ShapeDtypeStruct).

  UserError for no checkpoint, a damaged one, one of another network, or one with NaN.
  """
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
  folder = buckets.staged(folder).absolute()
  if not folder.is_dir():
    raise UserError(f"{folder}: no such checkpoint; train the run to its end or check the path")
  damaged = ("cannot be read as a checkpoint of this network ({}); check that the run is complete "
             "and was made with this config")
  with file_errors(folder, damaged):
    found = _restore(folder, params=ocp.args.StandardRestore(abstract),
                     about=ocp.args.JsonRestore())
    for (path, x), wanted in zip(jax.tree_util.tree_leaves_with_path(found["params"]),
                                 jax.tree.leaves(abstract), strict=True):
      if x.shape != wanted.shape:
        raise ValueError(f"{_name(path)} has shape {x.shape}, the network {wanted.shape}")
    if found["about"].get("checksum", "") not in ("", checksum(found["params"])):
      raise ValueError("its parameters do not have their checksum")
  check_finite(folder, found["params"])
  return found["params"]


def check_finite(source: Path, params: Params) -> None:
  """UserError that names the first parameter with a value that is NaN or infinite."""
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if bad := not_finite(x):
      raise UserError(f"{source}: {_name(path)} has {bad} of {x.size} values that are NaN or "
                      "infinite; it is damaged or its training diverged, take another checkpoint")


def _name(path: Any) -> str:
  return "/".join(str(key.key) for key in path)


def not_finite(x: Any) -> int:
  """How many values of an array are NaN or infinite."""
  array = np.asarray(x)
  with np.errstate(all="ignore"):
    if np.isfinite(array.sum()):  # which is quicker; NaN and infinity stay in a sum
      return 0
  return array.size - int(np.isfinite(array).sum())


def read_about(folder: str | Path) -> dict[str, Any]:
  """What a checkpoint says of itself; UserError if it is damaged."""
  with file_errors(Path(folder), "is damaged ({}); copy or make it anew"):
    return _restore(buckets.staged(folder).absolute(), about=ocp.args.JsonRestore())["about"]


def _restore(folder: Path, **wanted: Any) -> Any:
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    return checkpointer.restore(folder, args=ocp.args.Composite(**wanted))
