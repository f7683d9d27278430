"""One config for everything: composed of the rooms' own dataclasses, read strictly from YAML.

An unknown key is an error that names the nearest known one. Every value can be overridden on the
command line by its path, `generator.loop.steps=500`.
"""

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.config.training import GeneratorConfig, RefinerConfig
from rfmedsam2_jax.data.pipeline import LoaderConfig
from rfmedsam2_jax.data.plan import PlanConfig
from rfmedsam2_jax.data.splits import SplitConfig
from rfmedsam2_jax.nn.presets import PRESETS
from rfmedsam2_jax.nn.sam2 import SAM2Config
from rfmedsam2_jax.parallel.mesh import MeshConfig
from rfmedsam2_jax.refinement.config import RefinementConfig
from rfmedsam2_jax.segmentation.config import InferenceConfig

# The least and the largest value of numbers by the names of their fields, in whatever part.
_COUNT, _SHARE = (1, 2**20), (0.0, 1.0)
_RANGES: dict[str, tuple[float, float]] = {
  **dict.fromkeys((
    "log_every", "checkpoint_every", "keep_checkpoints", "convs_per_stage", "decoder_convs",
    "features", "batch_size", "microbatches", "slices", "structures", "cells_per_batch",
    "slices_per_batch", "width", "mask_width", "threads", "prefetch",
  ), _COUNT),
  **dict.fromkeys((
    "steps", "warmup_steps", "keep_best", "validate_every", "validation_cases", "live_margin",
    "learning_rate", "weight_decay", "box_margin", "workers", "voxel_budget",
  ), (0, 2**40)),
  **dict.fromkeys((
    "ema_decay", "box_jitter", "oversample_foreground", "threshold", "held_back",
  ), _SHARE),
  "poolings": (0, 16), "clip_norm": (1e-12, 1e12), "spacing": (1e-3, 1e4), "patch_size": (1, 2**12),
  "mask_reach": (0, 16), "mirrored": (0, 2), "mirror_axes": (0, 2), "sam_channels": (0, 2**10),
  "fraction": (0.0, 1.0), "cpu_devices": (1, 2**10),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is trained on."""

  dataset: str = ""  # folder in Decathlon or nnU-Net v2 layout, relative to the working directory
  structures: tuple[str, ...] | None = None  # names to segment, others are background; None: all
  sam_channels: tuple[int, ...] = (0,)  # the image channel that SAM 2 sees, or three of them
  sam_context: bool = False
  # Instead of one slice in three equal colours SAM 2 sees the slices before, at and behind it.
  # Official weights know equal colours only.
  split: SplitConfig = SplitConfig()
  loader: LoaderConfig = LoaderConfig()


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole experiment. `sam2` takes `preset: NAME` and overrides of its values."""

  data: DataConfig = DataConfig()
  plan: PlanConfig = PlanConfig()
  generator: GeneratorConfig = GeneratorConfig()
  sam2: SAM2Config = PRESETS["nano"]
  refinement: RefinementConfig = RefinementConfig()
  refiner: RefinerConfig = RefinerConfig()
  inference: InferenceConfig = InferenceConfig()
  mesh: MeshConfig = MeshConfig()
  seed: int = 0  # of initial weights, batches and augmentation

  def __post_init__(self):
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"seed is {self.seed}; give 0 to {2**32 - 1}")
    if len(self.data.sam_channels) not in (1, 3):
      raise ValueError(f"data.sam_channels is {self.data.sam_channels}; name one channel or three")
    if self.data.sam_context and len(self.data.sam_channels) == 3:
      raise ValueError("data.sam_context is true, but data.sam_channels names three; name one")
    if self.refiner.mask_adapter.loop.steps:
      given = "refiner.mask_adapter.loop.steps is given, but"
      if not self.sam2.adapters.mask:
        raise ValueError(f"{given} sam2.adapters.mask is false")
      if not all(stage.residual for stage in self.refinement.stages):
        raise ValueError(f"{given} a stage is not residual: without the mask before it there is "
                         "nothing to correct; make all residual")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
  """Reads a YAML file and applies overrides `key.path=value` (values are YAML).

  Raises:
    UserError: no such file, not YAML, an unknown key, a value of the wrong kind.
  """
  try:
    text = Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or "is not text"
    raise UserError(
      f"{path}: {reason}; give a config file such as configs/quickstart.yaml"
    ) from None
  try:
    tree = yaml.safe_load(text) or {}
  except yaml.YAMLError as error:
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or "cannot be parsed"
    raise UserError(f"{path}: is not YAML{where} ({problem}); correct the file") from None
  except (ValueError, RecursionError, TypeError) as error:  # numbers and nesting without end
    raise UserError(f"{path}: is not YAML of a config ({first_line(error, 120)}); correct the file"
                    ) from None
  if not isinstance(tree, dict):
    raise UserError(f"{path}: holds no keys; see configs/quickstart.yaml for what it should hold")
  for override in overrides:
    _set(tree, override)
  return parse_config(tree, str(path))


def parse_config(tree: Mapping[str, Any], source: str = "config") -> Config:
  """A Config from nested mappings; `source` is named in errors."""
  tree = dict(tree)
  sam2 = tree.get("sam2")
  sam2 = dict(sam2) if isinstance(sam2, Mapping) else {}  # pydantic says what else is wrong
  preset = sam2.pop("preset", None)
  if preset is not None:
    if preset not in PRESETS:
      raise UserError(f"{source}: sam2.preset: {preset!r} is not one of {', '.join(PRESETS)}")
    tree["sam2"] = _merged(dataclasses.asdict(PRESETS[preset]), sam2)
  _check_keys(Config, tree, source, "")
  try:
    config = pydantic.TypeAdapter(Config).validate_python(tree)
    _check_ranges(config, source, "")
    return config
  except pydantic.ValidationError as error:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    raise UserError(f"{source}: {where or 'config'}: {reason}; correct the value") from None


def config_yaml(config: Config) -> str:
  """All values, as YAML that `load_config` reads again."""
  if config.sam2.adapters.own:
    raise ValueError(
      f"sam2.adapters is a {type(config.sam2.adapters).__name__}, a class of your own, which YAML "
      "cannot describe; train with the parts of rfmedsam2_jax.training")
  return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


def _check_ranges(value: Any, source: str, where: str, name: str = "") -> None:
  """Every number is finite, and within its field's range if that has one."""
  if dataclasses.is_dataclass(value):
    for field in dataclasses.fields(value):
      _check_ranges(getattr(value, field.name), source, f"{where}{field.name}.", field.name)
  elif isinstance(value, tuple):
    for index, item in enumerate(value):
      _check_ranges(item, source, f"{where}{index}." if dataclasses.is_dataclass(item) else where,
                    name)
  elif isinstance(value, int | float):
    low, high = _RANGES.get(name, (-math.inf, math.inf))
    if not (math.isfinite(value) and low <= value <= high):
      expected = f"{low:g} to {high:g}" if name in _RANGES else "a finite number"
      raise UserError(f"{source}: {where[:-1]}: is {value}; give {expected}")


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
  result = dict(base)
  for key, value in changes.items():
    nested = isinstance(value, Mapping) and isinstance(result.get(key), dict)
    result[key] = _merged(result[key], value) if nested else value
  return result


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
  if isinstance(node, list):
    if not last.isdigit() or int(last) >= len(node):
      raise UserError(f"{override}: {last} is no place in a list of {len(node)}; correct the path")
    node[int(last)] = value
  else:
    node[last] = value


def _check_keys(kind: Any, value: Any, source: str, where: str) -> None:
  """Every key of nested mappings is a field of the dataclass that it fills."""
  if dataclasses.is_dataclass(kind):
    if value is None or not isinstance(value, Mapping):
      return  # pydantic says what is wrong with it
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for key, item in value.items():
      if key not in names:
        near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
        raise UserError(
          f"{source}: unknown key {where}{key}; the nearest known one is {where}{near[0]}"
        )
      _check_keys(hints[key], item, source, f"{where}{key}.")
    return
  for inner in typing.get_args(kind):
    if dataclasses.is_dataclass(inner):
      for index, item in enumerate(value if isinstance(value, list | tuple) else [value]):
        _check_keys(inner, item, source, f"{where}{index}.")
