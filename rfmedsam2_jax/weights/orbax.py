"""Parameters on disk: an Orbax checkpoint that describes itself.

`<folder>/params` is the parameter tree, `<folder>/about` a JSON of what it is (config, source,
versions). Writing is atomic: a folder that exists is complete.
"""

import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.base.places import check_place
from rfmedsam2_jax.nn.layers import Params


def save_params(folder: str | Path, params: Params, about: dict[str, Any]) -> None:
  """Writes params, bfloat16 as float32, and a JSON-serialisable description over what was there."""
  check_place(folder)
  # Weights that training held in bfloat16, so that every checkpoint is read alike.
  params = jax.tree.map(lambda x: x.astype("float32") if x.dtype == "bfloat16" else x, params)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    checkpointer.save(Path(folder).absolute(), force=True, args=ocp.args.Composite(
      params=ocp.args.StandardSave(params),
      about=ocp.args.JsonSave(about | {"checksum": checksum(params)})))


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
  folder = Path(folder).absolute()
  if not folder.is_dir():
    raise UserError(f"{folder}: no such checkpoint; train the run to its end or check the path")
  try:
    found = _restore(folder, params=ocp.args.StandardRestore(abstract),
                     about=ocp.args.JsonRestore())
    for (path, x), wanted in zip(jax.tree_util.tree_leaves_with_path(found["params"]),
                                 jax.tree.leaves(abstract), strict=True):
      if x.shape != wanted.shape:
        raise ValueError(f"{_name(path)} has shape {x.shape}, the network {wanted.shape}")
    if found["about"].get("checksum", "") not in ("", checksum(found["params"])):
      raise ValueError("its parameters do not have their checksum")
  # Orbax raises many kinds for a damaged folder (ValueError, FileNotFoundError, its own, ...).
  except Exception as error:
    raise UserError(
      f"{folder}: cannot be read as a checkpoint of this network ({first_line(error)}); "
      "check that the run is complete and was made with this config") from error
  for path, x in jax.tree_util.tree_leaves_with_path(found["params"]):
    if bad := not_finite(x):
      raise UserError(f"{folder}: {_name(path)} has {bad} of {x.size} values that are NaN or "
                      "infinite; it is damaged or its training diverged, take another checkpoint")
  return found["params"]


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
  try:
    return _restore(Path(folder).absolute(), about=ocp.args.JsonRestore())["about"]
  except Exception as error:  # as above
    raise UserError(f"{folder}: is damaged ({first_line(error)}); copy or make it anew") from error


def _restore(folder: Path, **wanted: Any) -> Any:
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    return checkpointer.restore(folder, args=ocp.args.Composite(**wanted))
