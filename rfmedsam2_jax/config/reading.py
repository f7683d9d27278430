"""Configs from YAML and back: overrides, presets, and what is said of a wrong value.

An unknown key is an error that names the nearest known one. Every value can be overridden on the
command line by its path, `generator.loop.steps=500`.
"""

import dataclasses
import difflib
import json
import reprlib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from rfmedsam2_jax.base.buckets import fetched
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.places import BUILTIN
from rfmedsam2_jax.config.experiment import Config
from rfmedsam2_jax.config.retired import without_retired
from rfmedsam2_jax.nn.presets import PRESETS
from rfmedsam2_jax.nn.sam2 import SAM2Config
from rfmedsam2_jax.refinement.config import PRESETS as REFINEMENTS

T = TypeVar("T")

_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")  # pydantic's names of an unknown key


def load_config(path: str | Path, overrides: Sequence[str] = (), trained: bool = False) -> Config:
  """Reads a YAML file and applies overrides `key.path=value` (values are YAML).

  trained: it is of a run whose networks are trained, see config.retired.

  Raises:
    UserError: no such file, not YAML, an unknown key, a value of the wrong kind or out of range.
  """
  try:
    text = fetched(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or "is not text"
    raise UserError(
      f"{path}: {reason}; give a config file such as configs/quickstart.yaml") from None
  try:
    tree = yaml.safe_load(text) or {}
  except yaml.YAMLError as error:
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or "cannot be parsed"
    raise UserError(f"{path}: is not YAML{where} ({problem}); correct the file") from None
  except (ValueError, RecursionError, TypeError) as error:  # numbers and nesting without end
    reason = " ".join(str(error).split())[:120]
    raise UserError(f"{path}: is not YAML of a config ({reason}); correct the file") from None
  if not isinstance(tree, dict):
    raise UserError(f"{path}: holds no keys; see configs/quickstart.yaml for what it should hold")
  for override in overrides:
    _set(tree, override)
  return parse_config(tree, str(path), trained)


def parse_config(tree: Mapping[str, Any], source: str = "config", trained: bool = False) -> Config:
  """A Config from nested mappings; `source` is named in errors, `trained` as in `load_config`."""
  tree = dict(without_retired(tree, source, trained))
  for part, read in (("sam2", _sam2), ("refinement", _refinement)):
    if isinstance(tree.get(part), Mapping):  # pydantic says what is wrong with anything else
      tree[part] = read(dict(tree[part]), source)
  return _validated(Config, tree, source)


def config_tree(config: Config) -> dict[str, Any]:
  """All values as nested dictionaries with the keys of files."""
  return dataclasses.asdict(config)


def config_yaml(config: Config) -> str:
  """All values, as YAML that `load_config` reads again."""
  if config.sam2.adapters.own:
    raise ValueError(
      f"sam2.adapters is a {type(config.sam2.adapters).__name__}, a class of your own, which YAML "
      "cannot describe; train with the parts of rfmedsam2_jax.training")
  return yaml.safe_dump(json.loads(json.dumps(config_tree(config))), sort_keys=False)


def _sam2(changes: dict[str, Any], source: str) -> SAM2Config:
  """The network of a preset and of what stands beside it."""
  name = _preset(changes, (*PRESETS, BUILTIN), source, "sam2")
  if name is not None:
    preset = _builtin() if name == BUILTIN else PRESETS[name]
    changes = _merged(dataclasses.asdict(preset), changes)
  return _validated(SAM2Config, changes, source, "sam2.")


def _builtin() -> SAM2Config:
  """The network of the weights in the package."""
  from rfmedsam2_jax.weights.checkpoint import read_config  # only here: it brings Orbax
  return read_config(BUILTIN)[0]


def _refinement(changes: dict[str, Any], source: str) -> dict[str, Any]:
  """A preset's values where `changes` has none; those of its stages, in every stage."""
  name = _preset(changes, tuple(REFINEMENTS), source, "refinement")
  if name is None:
    return changes
  preset = REFINEMENTS[name]
  stage = preset.stages[0]
  common = {"residual": stage.residual, "residual_limit": stage.residual_limit}
  stages = changes.get("stages")
  if isinstance(stages, list | tuple):
    changes["stages"] = [common | dict(s) if isinstance(s, Mapping) else s for s in stages]
  return dataclasses.asdict(preset) | changes


def _preset(
  changes: dict[str, Any], presets: Sequence[str], source: str, part: str
) -> str | None:
  """What `preset` names, which is taken out of `changes`; None if it is not given."""
  name = changes.pop("preset", None)
  if name is not None and (not isinstance(name, str) or name not in presets):
    raise UserError(f"{source}: {part}.preset: {reprlib.repr(name)} is not one of "
                    f"{', '.join(presets)}")
  return name


def _validated(kind: type[T], tree: Mapping[str, Any], source: str, prefix: str = "") -> T:
  """The dataclass that a tree describes, or an error that names the first thing wrong with it."""
  try:
    return pydantic.TypeAdapter(kind).validate_python(tree)
  except pydantic.ValidationError as error:
    found = error.errors(include_url=False)
    # One unknown key explains what else is wrong, such as a value that is missing.
    first = next((e for e in found if e["type"] in _UNKNOWN), found[0])
    where = prefix + ".".join(str(part) for part in first["loc"])
    if first["type"] in _UNKNOWN:
      *parents, key = first["loc"]
      names = [field.name for field in dataclasses.fields(_part(kind, parents))]
      near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
      raise UserError(f"{source}: unknown key {where}; the nearest known one is "
                      f"{where.removesuffix(str(key))}{near}") from None
    reason = first["msg"].removeprefix("Value error, ")
    if not isinstance(first["input"], Mapping | list | tuple) and first["type"] != "value_error":
      reason = f"is {reprlib.repr(first['input'])}; {reason[0].lower()}{reason[1:]}"
    raise UserError(f"{source}: {where.removesuffix('.') or 'config'}: {reason}; correct the value"
                    ) from None


def _part(kind: Any, path: Sequence[str | int]) -> Any:
  """The dataclass at a path within another."""
  for key in path:
    if isinstance(key, str):
      kind = typing.get_type_hints(kind)[key]
    while not dataclasses.is_dataclass(kind):  # tuples and optional values
      kind = next(inner for inner in typing.get_args(kind) if inner is not type(None))
  return kind


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
  return base | {
    key: _merged(base[key], value)
    if isinstance(value, Mapping) and isinstance(base.get(key), dict) else value
    for key, value in changes.items()}


def _set(tree: dict[str, Any], override: str) -> None:
  path, separator, text = override.partition("=")
  if not separator or not path:
    raise UserError(f"{override}: is no override; write it as key.path=value")
  try:
    value = yaml.safe_load(text)
  except (yaml.YAMLError, ValueError, RecursionError, TypeError):
    raise UserError(f"{override}: the value is not YAML; quote it") from None
  node: Any = tree
  *parents, last = path.split(".")
  for key in parents:
    if isinstance(node, list):
      node = node[int(key)] if key.isdigit() and int(key) < len(node) else None
    else:
      node = node.setdefault(key, {})
    if not isinstance(node, dict | list):
      raise UserError(f"{override}: {key} has no keys of its own; correct the path")
  if isinstance(node, list) and not (last.isdigit() and int(last) < len(node)):
    raise UserError(f"{override}: {last} is no place in a list of {len(node)}; correct the path")
  node[int(last) if isinstance(node, list) else last] = value
