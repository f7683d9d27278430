"""A checkpoint of SAM 2 as one file: float16 tensors in safetensors, and a text that tells of them.

Tensors are called by the paths of their parameters, joined by "/". "about" in the metadata is the
JSON that a checkpoint's folder has. `builtin.safetensors` beside this module comes with the
package; the word `builtin` means it. Installed models keep their networks so, in float32.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.places import BUILTIN
from rfmedsam2_jax.data.files import replacing, sha256_of
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.weights.named import checkpoint_at
from rfmedsam2_jax.weights.orbax import check_finite, checksum, file_errors, not_finite

ENDING = ".safetensors"
BUILTIN_FILE = Path(__file__).with_name(f"builtin{ENDING}")


def located(source: str | Path) -> Path:
  """Where a checkpoint lies: the package's file for the word `builtin`, else see checkpoint_at."""
  return BUILTIN_FILE if source == BUILTIN else checkpoint_at(source)


def is_single(path: Path) -> bool:
  """Whether a checkpoint of this name is one file, and not a folder."""
  return path.suffix == ENDING and not path.is_dir()


def save_single(path: str | Path, params: Params, about: dict[str, Any]) -> None:
  """Writes params, rounded to float16, and a JSON-serialisable description into a new file.

  The description gets `parameters`, how many values there are, and `checksum`.

  Raises:
    UserError: a value that float16 does not hold.
  """
  with replacing(path) as temporary:
    temporary.write_bytes(single_bytes(params, about, np.float16, path))


def single_bytes(params: Params, about: dict[str, Any], dtype: Any, path: str | Path) -> bytes:
  """The content of such a file with values of `dtype`; see save_single."""
  with np.errstate(over="ignore"):
    tensors = {name: np.asarray(x, np.float32).astype(dtype)
               for name, x in flatten_dict(params, sep="/").items()}
  for name, x in tensors.items():
    if not_finite(x):
      raise UserError(f"{path}: {name} has values beyond 65504, which float16 does not hold; keep "
                      "this checkpoint as a folder")
  count = sum(x.size for x in tensors.values())
  about = about | {"parameters": count, "checksum": checksum(unflatten_dict(tensors, sep="/"))}
  return save(tensors, {"about": json.dumps(about)})


def load_single(path: Path, like: Params) -> Params:
  """Parameters as float32, of the shapes of `like` (arrays or jax.ShapeDtypeStruct).

  UserError for a damaged file, one of another network, or one with NaN.
  """
  wanted = flatten_dict(like, sep="/")
  with _opened(path) as file:
    known = _about(file, path).get("checksum", "")
    found = {name: file.get_tensor(name) for name in file.keys()}
    if others := sorted(found.keys() ^ wanted.keys()):
      raise ValueError(f"{others[0]} is " + ("missing" if others[0] in wanted else "not of the "
                                             "network that it describes"))
    for name, x in found.items():
      if x.shape != wanted[name].shape:
        raise ValueError(f"{name} has shape {x.shape}, the network {wanted[name].shape}")
    params = unflatten_dict(found, sep="/")
    if known not in ("", checksum(params)):
      raise ValueError("its parameters do not have their checksum")
  check_finite(path, params)
  return unflatten_dict({name: jnp.asarray(x, jnp.float32) for name, x in found.items()}, sep="/")


def read_single(path: Path) -> dict[str, Any]:
  """What a file says of itself, and its `sha256`; UserError for one that says nothing."""
  with _opened(path) as file:
    return _about(file, path) | {"sha256": sha256_of(path)}


def builtin_words() -> str:
  """What the built-in network is, for a line."""
  about = read_single(BUILTIN_FILE)
  return (f"the built-in network: {about['parameters'] / 1e6:.1f} M parameters, trained on "
          f"{about['trained_on']}")


def _about(file: Any, path: Path) -> dict[str, Any]:
  text = (file.metadata() or {}).get("about")
  if text is None:
    raise UserError(f"{path}: is no checkpoint of this program, it does not say of which network; "
                    "make one from it with rfmedsam2 convert")
  about = json.loads(text)
  if not isinstance(about, dict):
    raise ValueError("its description is no object of JSON")
  return about


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
  """A file of safetensors; what goes wrong with it is said as in `file_errors`."""
  with file_errors(path, "is damaged ({}); copy or make it anew"):
    try:
      with safe_open(path, "numpy") as file:
        yield file
    except SafetensorError as error:
      raise ValueError(str(error)) from None
