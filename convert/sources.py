"""Reading other people's checkpoint files: which tensors they hold, by their names in the file.

Out: `Source`, whose tensors convert.recognise and convert.report judge.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.data.files import sha256_of
from rfmedsam2_jax.weights.orbax import not_finite

from .torch_files import StoredTensor, read_torch

# The one tensor by which the network is found inside a file: theirs and Hugging Face's name.
OFFICIAL_ANCHOR = "image_encoder.trunk.patch_embed.proj.weight"
HUGGING_FACE_ANCHOR = "vision_encoder.backbone.patch_embed.projection.weight"


class Source(NamedTuple):
  """The network in a file.

  Attributes:
    path: file or folder, as given.
    tensors: by name, without prefixes of training; as stored.
    hugging_face: whether names are those of `transformers`.
    place: where in the file the network lay, "" for the top.
    files: SHA-256 of every file that was read, by name.
    image_size: side of the image, where the source says it.
  """

  path: Path
  tensors: dict[str, np.ndarray]
  hugging_face: bool
  place: str
  files: dict[str, str]
  image_size: int | None


def read_source(path: Path) -> Source:
  """Reads a .pt or .safetensors file, or a folder that `transformers` saved.

  Raises:
    UserError: no such file, no checkpoint, a damaged one, one that would run code, one without
      SAM 2 in it.
  """
  if not path.exists():
    raise UserError(f"{path}: no such file; give a checkpoint (.pt, .safetensors or a folder)")
  files = _files(path)
  tree: dict[Any, Any] = {}
  for file in files:
    is_safetensors = file.suffix == ".safetensors"
    tree |= _read_safetensors(file) if is_safetensors else read_torch(file)
  try:
    place, hugging_face, tensors = _find_network(tree, path)
  except RecursionError:
    raise UserError(f"{path}: holds dicts within dicts without an end; check the file") from None
  return Source(
    path=path,
    tensors={name: as_float32(x, name, path) for name, x in tensors.items()},
    hugging_face=hugging_face,
    place=place,
    files={file.name: sha256_of(file) for file in files},
    image_size=_image_size(path, files[0].parent),
  )


def _files(path: Path) -> list[Path]:
  """The files with tensors: the one given, or those of a folder."""
  if path.is_file():
    return [path]
  index = path / "model.safetensors.index.json"
  if index.is_file():
    try:
      names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
      raise UserError(f"{index}: is no index of safetensors; download it again") from None
    if gone := [name for name in names if not (path / name).is_file()]:
      raise UserError(f"{path / gone[0]}: is missing; download the folder again")
    return [path / name for name in names]
  file = path / "model.safetensors"
  if not file.is_file():
    raise UserError(
      f"{path}: has no model.safetensors; give a checkpoint file or a folder of save_pretrained"
    )
  return [file]


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
  try:
    return load_file(file)
  except Exception as error:  # its own kind of error, and others for types that numpy lacks
    raise UserError(
      f"{file}: cannot be read as safetensors ({first_line(error, 160)}); download it again"
    ) from None


def _find_network(tree: Mapping[Any, Any], path: Path) -> tuple[str, bool, dict[str, Any]]:
  """Where SAM 2 lies in nested dicts, whether its names are Hugging Face's, and its tensors.

  Checkpoints of training hold more than the network (optimizer, epoch), put it under "model" or
  "state_dict", and its names behind "module.", "model." or "sam2.". The anchor's place tells.
  """
  found = []
  for where, state in _dicts(tree, ""):
    names = {name.replace("_orig_mod.", ""): name for name in state if isinstance(name, str)}
    for anchor in (OFFICIAL_ANCHOR, HUGGING_FACE_ANCHOR):
      for name in names:
        prefix = name.removesuffix(anchor)
        if name != prefix and (not prefix or prefix.endswith(".")):
          inside = {
            new.removeprefix(prefix): state[old] for new, old in names.items()
            if hasattr(state[old], "shape")
          }
          found.append((where + prefix, anchor == HUGGING_FACE_ANCHOR, inside))
  if not found:
    count = sum(hasattr(x, "shape") for _, state in _dicts(tree, "") for x in state.values())
    raise UserError(
      f"{path}: is no checkpoint of SAM 2 (none of its {count} tensors is {OFFICIAL_ANCHOR}); "
      "check the file"
    )
  if len(found) > 1:
    places = " and ".join(repr(where) for where, _, _ in found)
    raise UserError(f"{path}: holds SAM 2 more than once, at {places}; save one of them alone")
  return found[0]


def _dicts(tree: Mapping[Any, Any], where: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
  """A nested dict and all dicts in it, with their place."""
  yield where, tree
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _dicts(value, f"{where}{key}.")


def as_float32(x: Any, name: str, source: str | Path) -> np.ndarray:
  """A tensor as float32, a view where it is float32 already; UserError for what is none."""
  if not isinstance(x, np.ndarray | StoredTensor) or x.dtype.kind == "c":
    raise UserError(f"{source}: {name} is no tensor of real numbers; check the file")
  return x.array(np.float32) if isinstance(x, StoredTensor) else x.astype(np.float32, copy=False)


def check_finite(tensors: Mapping[str, np.ndarray], source: str | Path) -> None:
  """UserError that names the first tensor with a value that is NaN or infinite."""
  for name, x in tensors.items():
    if bad := not_finite(x):
      raise UserError(f"{source}: tensor {name} has {bad} of {x.size} values that are NaN or "
                      "infinite; it is damaged or its training diverged, take another checkpoint")


def _image_size(path: Path, folder: Path) -> int | None:
  """The side that config.json beside safetensors says, or 512 where the name says MedSAM2."""
  config = folder / "config.json"
  if config.is_file():
    try:
      tree = json.loads(config.read_text(encoding="utf-8"))
      size = tree["prompt_encoder_config"]["image_size"]
    except (ValueError, KeyError, TypeError):
      return None  # of something else
    return size if isinstance(size, int) else size[0]
  return 512 if "medsam2" in path.name.lower() else None
