"""SAM 2 on disk, parameters and config, and what it takes to train on from it.

A checkpoint is a folder (weights.orbax), a file (weights.single_file), the word `builtin`, or a
name (weights.named).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
from flax.traverse_util import flatten_dict, unflatten_dict

from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.base.places import BUILTIN
from rfmedsam2_jax.nn.initialisation import init_params, param_shapes
from rfmedsam2_jax.nn.layers import Array, Params
from rfmedsam2_jax.nn.sam2 import FIXED, SAM2Config
from rfmedsam2_jax.weights.named import no_checkpoint
from rfmedsam2_jax.weights.orbax import load_params, read_about, save_params
from rfmedsam2_jax.weights.published import PUBLISHED
from rfmedsam2_jax.weights.single_file import (
  is_single,
  load_single,
  located,
  read_single,
  save_single,
)


class Checkpoint(NamedTuple):
  """config: of the network. params: float32. about: JSON of where it came from."""
  config: SAM2Config
  params: Params
  about: dict[str, Any]


def save_checkpoint(path: str | Path, config: SAM2Config, params: Params,
                    about: dict[str, Any]) -> None:
  """Writes what `load_checkpoint` reads without being told a config.

  That is a folder, or one file of float16 where the name ends in .safetensors.
  """
  save = save_single if is_single(Path(path)) else save_params
  save(path, params, about | {"sam2": config_json(config)})


def config_json(config: SAM2Config) -> dict[str, Any]:
  """What a checkpoint says of its network, under "sam2"."""
  if config.adapters.own:
    raise ValueError(
      f"{type(config.adapters).__name__} is a class of your own, which no file can describe; keep "
      "parameters with weights.orbax.save_params and load_params")
  tree = json.loads(json.dumps(dataclasses.asdict(config)))
  del tree["remat"]  # how a gradient was once computed says nothing of the network
  return tree


def load_checkpoint(source: str | Path) -> Checkpoint:
  """Reads a checkpoint of SAM 2; UserError for none, a damaged one, or one of something else.

  source: folder or .safetensors file of this program, or a text: `builtin`, the name of fetched
  weights or of an installed model with a tracker (./builtin and a `Path` are never words).
  """
  path = located(source)
  config, about = read_config(source)
  try:
    shapes = param_shapes(config)
  except Exception as error:  # Flax raises many kinds for sizes that do not fit together
    raise UserError(
      f"{path}: its config describes no network ({first_line(error)}); make it anew") from None
  load = load_single if is_single(path) else load_params
  return Checkpoint(config, load(path, shapes), about)


def read_config(source: str | Path) -> tuple[SAM2Config, dict[str, Any]]:
  """The config of a checkpoint and all that it says of itself, without its parameters."""
  path = located(source)
  if not path.exists():
    raise no_checkpoint(source)
  if not is_single(path) and not (path / "about").is_dir():
    raise UserError(
      f"{path}: is no checkpoint of this program; make one from it with rfmedsam2 convert")
  about = read_single(path) if is_single(path) else read_about(path)
  if not isinstance(about, dict) or not isinstance(about.get("sam2"), dict):
    raise UserError(f"{path}: is a checkpoint, but not of SAM 2; give one of SAM 2")
  try:
    known = {field.name for field in dataclasses.fields(SAM2Config)} | set(FIXED)
    if unknown := sorted(about["sam2"].keys() - known):
      raise ValueError(f"sam2.{unknown[0]} is unknown")
    return pydantic.TypeAdapter(SAM2Config).validate_python(about["sam2"]), about
  except ValueError as error:  # pydantic's is one
    raise UserError(f"{path}: was made by another version ({first_line(error)} in its config); "
                    "make it anew") from None


def with_adapters(params: Params, config: SAM2Config, key: Array) -> Params:
  """Parameters with all adapters of `config`: fresh where there were none, kept where there were.

  Fresh adapters are the identity: the network computes the same bits with them as without.
  ValueError if `params` is of another network, or has adapters that `config` has not.
  """
  given, shapes = flatten_dict(params, sep="/"), flatten_dict(param_shapes(config), sep="/")
  if given.keys() == shapes.keys():  # none is asked for, and fresh ones are slow to make
    fresh = shapes
  else:
    fresh = flatten_dict(init_params(config, key), sep="/")
  for path, x in given.items():
    if path not in fresh or fresh[path].shape != x.shape:
      raise ValueError(f"{path} {x.shape} is not in the network that the config describes")
  if missing := sorted(p for p in fresh.keys() - given.keys() if "/adapter/" not in p):
    raise ValueError(f"{missing[0]} is missing")
  return unflatten_dict(fresh | given, sep="/")


def first_difference(ours: SAM2Config, theirs: SAM2Config) -> str | None:
  """The first field by which two configs have other parameters, adapters apart; None if none."""
  # But for fields that change what is computed, and not which parameters there are.
  free = ("image_size", "dtype", "remat", "adapters")
  names = (field.name for field in dataclasses.fields(SAM2Config) if field.name not in free)
  return next((name for name in names if getattr(ours, name) != getattr(theirs, name)), None)


def check_starting_point(source: str | Path, config: SAM2Config) -> None:
  """UserError for no checkpoint, or one of another network than `config`; reads no parameters."""
  found, _ = read_config(source)
  if name := first_difference(config, found):
    preset = BUILTIN if source == BUILTIN else ""
    if source in PUBLISHED:
      preset = PUBLISHED[str(source)].preset
    right = f"{{preset: {preset}}}" if preset else "the network of the checkpoint"
    raise UserError(
      f"{source}: its network has {name}={short(getattr(found, name))}, the config has sam2."
      f"{name}={short(getattr(config, name))}; set sam2 to {right}")
  theirs, ours = found.adapters, config.adapters
  sizes = {"dwconv": ["width"], "cnn": ["width"], "mask": ["mask_width"]}
  for kind, fields in sizes.items():
    alike = all(getattr(theirs, field) == getattr(ours, field) for field in fields)
    if getattr(theirs, kind) and not (getattr(ours, kind) and alike):
      wanted = [f"sam2.adapters.{field}={getattr(theirs, field)}" for field in fields]
      settings = " and ".join([f"sam2.adapters.{kind}=true", *wanted])
      raise UserError(f"{source}: has {kind} adapters; set {settings}")


def starting_params(source: str | Path, config: SAM2Config, key: Array) -> Params:
  """The parameters of a checkpoint for training `config`, with fresh adapters where it has none."""
  # The image sides may differ: whatever depends on them is computed and not learned.
  check_starting_point(source, config)
  return with_adapters(load_checkpoint(source).params, config, key)


def short(value: Any) -> str:
  """A value of a config as a message shows it."""
  return str(value).replace(" ", "")
