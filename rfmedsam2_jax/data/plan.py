"""The plan: spacing, slice axis, intensity rules, patch and U-Net shape, by nnU-Net's rules.

All of its tuples of three are in prepared order: the slice axis first, then the other two in the
order of canonical (z, y, x).
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.ranges import STRICT
from rfmedsam2_jax.data.datasets import Labels
from rfmedsam2_jax.data.files import load_json, save_json
from rfmedsam2_jax.data.fingerprint import Fingerprint

SliceAxis = Literal[0, 1, 2]  # canonical z, y, x
PLANES: dict[str, SliceAxis] = {"axial": 0, "coronal": 1, "sagittal": 2}

ANISOTROPY = 3.0    # a ratio of spacings (or sizes) above which axes are treated apart (nnU-Net)
_TIED = 1.1         # spacings within this ratio count as equal when the slice axis is chosen
_SMALLEST_MAP = 4   # an axis is not pooled below this many voxels (nnU-Net)
_LARGEST_PATCH = 256**3
_FINEST, _COARSEST = 1e-3, 1e4  # mm, of a plan's voxels
_WIDEST = 31        # voxels of a kernel

Triple = tuple[int, int, int]
_Size = Annotated[float, Field(ge=_FINEST, le=_COARSEST)]
_Side = Annotated[int, Field(ge=1, le=2**12)]


@dataclasses.dataclass(frozen=True)
class ChannelRule:
  """How one channel's intensities are normalised.

  "ct" clips to [lower, upper] and standardises by mean and std, all over the data set's foreground;
  "zscore" standardises every case by its own.
  """

  __pydantic_config__ = STRICT
  name: str  #: of the channel in dataset.json
  kind: Literal["ct", "zscore"]
  lower: float = 0.0
  upper: float = 0.0
  mean: float = 0.0
  std: float = 1.0
  #: Of "zscore": only voxels inside the object are standardised, the rest stays 0 (nnU-Net does so
  #: where much of the volume is 0, as after skull stripping).
  masked: bool = False


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """What of the plan is fixed by hand; None leaves it to the rules."""

  __pydantic_config__ = STRICT

  plane: Literal["axial", "coronal", "sagittal"] | None = None  # of the slices; None: across the
                                                                # coarsest axis, axial if tied
  spacing: tuple[_Size, _Size, _Size] | None = None  # mm, slice axis first; None: the median
  generator_spacing: tuple[_Size, _Size, _Size] | None = None
  # mm of the voxels that the generator sees, slice axis first; None: as the slices. A coarser
  # generator sees more of the volume at once and is faster; the stages bring the detail.
  patch_size: tuple[_Side, _Side, _Side] | None = None  # the generator's voxels, slice axis
                                                        # first; rounded up to what pooling divides
  voxel_budget: ClassVar[int] = 128**3  # of a patch that is not given, nnU-Net's
  poolings: Annotated[int, Field(ge=0, le=16)] | None = None
  # At most so many halvings per axis; fewer see less context.
  intensity: tuple[Literal["ct", "zscore"], ...] | None = None  # per channel; None: by its name
  channels: tuple[ChannelRule, ...] | None = None  # whole rules, as another data set gave them
  strides: tuple[Triple, ...] | None = None  # of each U-Net stage, together with kernels
  kernels: tuple[Triple, ...] | None = None  # what rfmedsam2 convert nnunet takes over


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything that later steps need to know of the data set."""

  __pydantic_config__ = STRICT
  name: str
  slice_axis: SliceAxis  #: canonical axis (0 z, 1 y, 2 x) that becomes the first
  spacing: tuple[float, float, float]  #: mm of the prepared volumes, which the stages see
  median_shape: Triple  #: voxels of the median case at that spacing
  channels: tuple[ChannelRule, ...]
  patch_size: Triple  #: voxels of the generator's patches
  strides: tuple[Triple, ...]  #: of each U-Net stage; the first is 1, 1, 1
  kernels: tuple[Triple, ...]  #: of each U-Net stage
  labels: Labels
  #: mm of the volumes that the generator sees; None: those of the slices
  generator_spacing: tuple[float, float, float] | None = None

  def __post_init__(self):
    for name in ("spacing", "generator_spacing"):
      if not all(_FINEST <= size <= _COARSEST for size in getattr(self, name) or ()):
        raise ValueError(
          f"{name} is {getattr(self, name)}; it must be {_FINEST:g} to {_COARSEST:g} mm")
    if len(self.strides) != len(self.kernels) or not self.strides:
      raise ValueError("strides and kernels need one entry for each stage")
    sizes = (*self.patch_size, *self.median_shape, *(n for s in self.strides for n in s))
    if min(sizes) < 1 or any(n < 1 or n % 2 == 0 or n > _WIDEST for k in self.kernels for n in k):
      raise ValueError("sizes and strides must be 1 or more, kernels odd")
    if math.prod(self.patch_size) > _LARGEST_PATCH or max(self.patch_size) > 2**12 or any(
        n % d for n, d in zip(self.patch_size, _divisor(self.strides), strict=True)):
      raise ValueError(f"patch_size is {self.patch_size}, which is too large or not divisible by "
                       "the strides")
    if not self.channels or not self.labels.structures:
      raise ValueError("there are no channels or no structures")
    for rule in self.channels:
      numbers = (rule.lower, rule.upper, rule.mean, rule.std)
      if not all(math.isfinite(n) for n in numbers) or rule.std <= 0 or rule.lower > rule.upper:
        raise ValueError(f"the intensities of {rule.name} have no range")

  @property
  def order(self) -> Triple:
    """The canonical axis along each prepared axis."""
    first, second = (axis for axis in range(3) if axis != self.slice_axis)
    return self.slice_axis, first, second

  @property
  def of_generator(self) -> "Plan":
    """The plan by which volumes are prepared for the generator."""
    spacing = self.generator_spacing or self.spacing
    return dataclasses.replace(self, spacing=spacing, generator_spacing=None)

  @property
  def crops_to_nonzero(self) -> bool:
    """Whether volumes are cropped to their nonzero box; air in CT is a value like any other."""
    return all(rule.kind != "ct" for rule in self.channels)


def make_plan(fingerprint: Fingerprint, config: PlanConfig | None = None) -> Plan:
  """The plan of a data set; UserError for options that contradict it."""
  config = config or PlanConfig()
  channels = _channel_rules(fingerprint, config)
  cropped = all(rule.kind != "ct" for rule in channels)
  spacings = np.array([case.spacing for case in fingerprint.cases])
  shapes = np.array([case.nonzero_shape if cropped else case.shape for case in fingerprint.cases])

  slice_axis = (choose_slice_axis(np.median(spacings, axis=0)) if config.plane is None
                else PLANES[config.plane])
  order = [slice_axis, *(axis for axis in range(3) if axis != slice_axis)]
  spacings, shapes = spacings[:, order], shapes[:, order]
  for key in ("spacing", "generator_spacing"):
    if (given := getattr(config, key)) and not min(given) > 0:
      raise UserError(f"plan.{key}: is {given}; give three sizes in mm above 0")
  spacing = np.array(config.spacing or choose_spacing(spacings, shapes), float)
  seen = spacing if config.generator_spacing is None else np.array(config.generator_spacing)
  # By the slices' grid and by the generator's, whose patch is cut to it.
  median_shape, most = (np.median(np.maximum(np.rint(shapes * spacings / size), 1), axis=0)
                        for size in (spacing, seen))
  if config.patch_size and not min(config.patch_size) > 0:
    raise UserError(f"plan.patch_size: is {config.patch_size}; give three sizes above 0")
  patch = np.array(config.patch_size or choose_patch(
    seen, most, config.voxel_budget, config.poolings))
  if config.strides is None and config.kernels is None:
    strides, kernels, patch = pooling(seen, patch, config.poolings)
  else:
    strides, kernels = _given_stages(config, patch)
  return Plan(fingerprint.name, slice_axis, _floats(spacing), _ints(median_shape), channels,
              _ints(patch), strides, kernels, fingerprint.labels,
              None if _floats(seen) == _floats(spacing) else _floats(seen))


def save_plan(path: str | Path, plan: Plan) -> None:
  """Writes plan.json."""
  save_json(path, plan)


def load_plan(path: str | Path) -> Plan:
  """Reads plan.json."""
  return load_json(path, Plan)


def choose_slice_axis(spacing: np.ndarray) -> SliceAxis:
  """The coarsest axis of canonical (z, y, x); z (axial) if it is tied with another."""
  return 0 if spacing[0] * _TIED >= spacing.max() else 1 if spacing[1] >= spacing[2] else 2


def choose_spacing(spacings: np.ndarray, shapes: np.ndarray) -> np.ndarray:
  """nnU-Net's target of mm, voxels [cases, 3]: median, 10th percentile of a far coarser axis."""
  target, size = np.median(spacings, axis=0), np.median(shapes, axis=0)
  worst = int(np.argmax(target))
  others = [axis for axis in range(3) if axis != worst]
  if (target[worst] > ANISOTROPY * target[others].max()
      and size[worst] * ANISOTROPY < size[others].min()):
    target[worst] = max(np.percentile(spacings[:, worst], 10), target[others].max() + 1e-5)
  return target


def choose_patch(spacing: np.ndarray, median_shape: np.ndarray, voxel_budget: int,
                 poolings: int | None) -> np.ndarray:
  """nnU-Net's patch: a cube in mm, cut to the median shape, then shrunk to the budget of voxels."""
  cube = 1 / spacing
  cube *= (_LARGEST_PATCH / cube.prod()) ** (1 / 3)
  _, _, patch = pooling(spacing, np.minimum(np.rint(cube), median_shape), poolings)
  while patch.prod() > voxel_budget:
    axis = int(np.argsort(patch / median_shape, kind="stable")[-1])
    smaller = patch.copy()
    smaller[axis] = max(smaller[axis] - _divisor(pooling(spacing, patch, poolings)[0])[axis], 1)
    # A smaller patch may have one pooling less, and then needs a smaller step.
    step = _divisor(pooling(spacing, smaller, poolings)[0])[axis]
    if patch[axis] - step < _SMALLEST_MAP:
      break  # nothing left to take; the budget is smaller than any useful patch
    patch[axis] -= step
    _, _, patch = pooling(spacing, patch, poolings)
  return patch


def pooling(spacing: np.ndarray, patch: np.ndarray, poolings: int | None = None
            ) -> tuple[tuple[Triple, ...], tuple[Triple, ...], np.ndarray]:
  """nnU-Net's topology: an axis is halved while it is fine enough and has voxels enough.

  Strides and kernels of every stage, and the patch rounded up to what they divide, from the spacing
  in mm and the patch in voxels; at most `poolings` halvings per axis.
  """
  current, size = np.array(spacing, float), np.array(patch, float)
  halvings, kernel = np.zeros(3, int), np.ones(3, int)
  strides, kernels = [(1, 1, 1)], []
  while (large := size >= 2 * _SMALLEST_MAP).any():
    chosen = large & (current < 2 * current[large].min())
    if poolings is not None:
      chosen &= halvings < poolings
    if not chosen.any() or (chosen.sum() == 1 and size[chosen][0] < 3 * _SMALLEST_MAP):
      break
    kernel = np.where(current < 2 * current.min(), 3, kernel)
    kernels.append(_ints(kernel))
    strides.append(_ints(np.where(chosen, 2, 1)))
    halvings += chosen
    current = np.where(chosen, 2 * current, current)
    size = np.where(chosen, np.ceil(size / 2), size)
  kernels.append((3, 3, 3))
  divisor = 2**halvings
  return tuple(strides), tuple(kernels), (np.ceil(patch / divisor) * divisor).astype(int)


def _divisor(strides: tuple[Triple, ...]) -> np.ndarray:
  return np.prod(np.array(strides), axis=0)


def _channel_rules(fingerprint: Fingerprint, config: PlanConfig) -> tuple[ChannelRule, ...]:
  if config.channels is not None:
    names = tuple(rule.name for rule in config.channels)
    if names != fingerprint.channels:
      raise UserError(f"plan.channels: is of {', '.join(names)}, the data set has "
                      f"{', '.join(fingerprint.channels)}; give one rule for each, by its name")
    return config.channels
  kinds: tuple[Literal["ct", "zscore"], ...] = config.intensity or tuple(
    "ct" if name.casefold() == "ct" else "zscore" for name in fingerprint.channels)
  if len(kinds) != len(fingerprint.channels):
    raise UserError(f"plan.intensity: has {len(kinds)} rules for the {len(fingerprint.channels)} "
                    f"channels {', '.join(fingerprint.channels)}; give one for each")
  kept = np.median([math.prod(case.nonzero_shape) / math.prod(case.shape)
                    for case in fingerprint.cases])
  rules = []
  for index, (name, kind) in enumerate(zip(fingerprint.channels, kinds, strict=True)):
    if kind == "zscore":
      rules.append(ChannelRule(name, kind, masked=bool(kept < 0.75)))
      continue
    if fingerprint.intensities is None:
      raise UserError(f"{fingerprint.name}: no case has a voxel of any structure, by which CT is "
                      f"normalised; check the labels")
    found = fingerprint.intensities[index]
    rules.append(ChannelRule(name, kind, found.percentile_00_5, found.percentile_99_5, found.mean,
                             max(found.std, 1e-8)))
  return tuple(rules)


def _given_stages(config: PlanConfig, patch: np.ndarray
                  ) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
  strides, kernels = config.strides or (), config.kernels or ()
  if len(strides) != len(kernels) or len(strides) < 2 or strides[0] != (1, 1, 1):
    raise UserError("plan.strides: needs as many entries as plan.kernels, two at least, and the "
                    "first one is [1, 1, 1]")
  if min(map(min, strides)) < 1 or any(n < 1 or n % 2 == 0 for k in kernels for n in k):
    raise UserError("plan.strides: must be 1 or more, and plan.kernels odd")
  if config.patch_size is None or (patch % _divisor(strides)).any():
    raise UserError(f"plan.patch_size: is {config.patch_size}; with plan.strides it must be given "
                    f"and divisible by {_ints(_divisor(strides))}")
  return strides, kernels


def _ints(values: np.ndarray) -> Triple:
  a, b, c = (int(round(float(value))) for value in values)
  return a, b, c


def _floats(values: np.ndarray) -> tuple[float, float, float]:
  a, b, c = (float(f"{value:.6g}") for value in values)
  return a, b, c
