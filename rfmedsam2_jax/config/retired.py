"""Options that there are no more, and the constants that took their places.

Config files and runs made with them are read: a value that equals the constant is passed over, any
other is refused by name.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

import pydantic

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.config.training import (
  GeneratorConfig,
  MaskAdapterConfig,
  MaskAdapterLoopConfig,
  MaskAdapterOptimizerConfig,
  RefinerConfig,
  RefinerOptimizerConfig,
)
from rfmedsam2_jax.data.augmentation import AugmentationConfig
from rfmedsam2_jax.data.loader import LoaderConfig
from rfmedsam2_jax.data.plan import PlanConfig
from rfmedsam2_jax.data.prompt_mistakes import PromptCorruptionConfig
from rfmedsam2_jax.data.splits import SplitConfig
from rfmedsam2_jax.nn.losses import RefinerLossConfig
from rfmedsam2_jax.refinement.config import RefinementConfig, StageConfig
from rfmedsam2_jax.segmentation.config import InferenceConfig

# Where the options were, `*` for every stage; the class that has the constants; their names.
_WHERE: tuple[tuple[str, Any, str], ...] = (
  ("data.loader", LoaderConfig, "threads"),
  ("data.split", SplitConfig, "folds"),
  ("plan", PlanConfig, "voxel_budget"),
  *((f"{phase}.augmentation", AugmentationConfig,
     "rotation rotation_probability scaling scaling_probability noise noise_probability blur "
     "blur_probability brightness brightness_probability contrast contrast_probability gamma "
     "gamma_probability gamma_inverted_probability")
    for phase in ("generator", "refiner")),
  ("generator.loss", GeneratorConfig.loss, "dice cross_entropy batch_dice"),
  ("refiner", RefinerConfig, "box_jitter oversample_foreground"),
  ("refiner.loss", RefinerLossConfig, "dice"),
  ("refiner.optimizer", RefinerOptimizerConfig, "schedule"),
  ("refiner.corruption", PromptCorruptionConfig, "island_radius"),
  ("refiner.mask_adapter", MaskAdapterConfig, "microbatches"),
  ("refiner.mask_adapter.loop", MaskAdapterLoopConfig,
   "keep_checkpoints keep_best validate_every validation_cases"),
  ("refiner.mask_adapter.optimizer", MaskAdapterOptimizerConfig,
   "name schedule weight_decay ema_decay"),
  ("refinement", RefinementConfig, "threshold box_margin slices_per_batch"),
  ("refinement.stages.*", StageConfig, "loss_weight"),
  ("inference", InferenceConfig, "batch_size"),
  ("inference.warnings", InferenceConfig.warnings,
   "stage_dice spacing_factor extent_factor intensity_factor intensity_distance"),
)
RETIRED: dict[str, Any] = {
  f"{path}.{name}": getattr(owner, name) for path, owner, names in _WHERE for name in names.split()}
RETIRED |= {f"{phase}.augmentation.intensity": 1.0 for phase in ("generator", "refiner")}

# What only training reads: of no consequence for networks that are trained.
_OF_TRAINING = ("data.", "plan.", "generator.", "refiner.")
_OF_NO_CONSEQUENCE = {"data.loader.prefetch": None}  # for what is computed


def without_retired(tree: Any, source: str, trained: bool = False) -> Any:
  """The tree of a config without the options that there are no more.

  Args:
    trained: of a run that is done: what it was trained with is taken as it is.

  Raises:
    UserError: one of them is not what is now fixed.
  """
  for path, constant in (RETIRED | _OF_NO_CONSEQUENCE).items():
    passed_over = constant is None or (trained and path.startswith(_OF_TRAINING))
    tree = _without(tree, path.split("."), constant, source, "", passed_over)
  return tree


def _without(
  node: Any, path: list[str], constant: Any, source: str, where: str, passed_over: bool
) -> Any:
  key, *rest = path
  if key == "*" and isinstance(node, list | tuple):
    return [_without(item, rest, constant, source, f"{where}{index}.", passed_over)
            for index, item in enumerate(node)]
  if not isinstance(node, Mapping) or key not in node:
    return node
  others = {name: value for name, value in node.items() if name != key}
  if rest:
    inner = _without(node[key], rest, constant, source, f"{where}{key}.", passed_over)
    # A part of which nothing is left may be none that there still is.
    return others if isinstance(inner, Mapping) and not inner else others | {key: inner}
  if not (passed_over or _equal(node[key], constant)):
    fixed = list(constant) if isinstance(constant, tuple) else constant
    raise UserError(f"{source}: {where}{key}: is {reprlib.repr(node[key])}, but is no option any "
                    f"more and always {fixed}; leave it out")
  return others


def _equal(value: Any, constant: Any) -> bool:
  try:  # numbers that YAML takes for text, lists that are tuples
    return bool(pydantic.TypeAdapter(type(constant)).validate_python(value) == constant)
  except pydantic.ValidationError:
    return False
