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
from rfmedsam2_jax.nn.layers import Params


def save_params(folder: str | Path, params: Params, about: dict[str, Any]) -> None:
  """Writes params, bfloat16 as float32, and a JSON-serialisable description over what was there."""
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

  UserError for no checkpoint, a damaged one, or one of another network.
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
        name = "/".join(str(key.key) for key in path)
        raise ValueError(f"{name} has shape {x.shape}, the network {wanted.shape}")
    if found["about"].get("checksum", "") not in ("", checksum(found["params"])):
      raise ValueError("its parameters do not have their checksum")
    return found["params"]
  # Orbax raises many kinds for a damaged folder (ValueError, FileNotFoundError, its own, ...).
  except Exception as error:
    raise UserError(
      f"{folder}: cannot be read as a checkpoint of this network ({first_line(error)}); "
      "check that the run is complete and was made with this config") from error


def read_about(folder: str | Path) -> dict[str, Any]:
  """What a checkpoint says of itself; UserError if it is damaged."""
  try:
    return _restore(Path(folder).absolute(), about=ocp.args.JsonRestore())["about"]
  except Exception as error:  # as above
    raise UserError(f"{folder}: is damaged ({first_line(error)}); copy or make it anew") from error


def _restore(folder: Path, **wanted: Any) -> Any:
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    return checkpointer.restore(folder, args=ocp.args.Composite(**wanted))
