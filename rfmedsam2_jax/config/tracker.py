"""How SAM 2 is trained on prompts: to segment what a person points at, and to follow it."""

import dataclasses
from typing import Annotated, ClassVar

from pydantic import Field

from rfmedsam2_jax.base.ranges import STRICT, Count, Place, Share, Weight
from rfmedsam2_jax.config.training import RefinerOptimizerConfig, UnvalidatedLoopConfig
from rfmedsam2_jax.data.augmentation import AugmentationConfig
from rfmedsam2_jax.nn.losses import RefinerLossConfig

_Slices = Annotated[int, Field(ge=1, le=2**10)]
_Corrections = Annotated[int, Field(ge=0, le=100)]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """Where runs of slices come from."""

  __pydantic_config__ = STRICT

  source: Annotated[str, Field(min_length=1)] = "synthetic"
  # synthetic: made as they are needed, of a seed, without an end. own: the training cases of
  # data.dataset. Else the folder of a data set in Decathlon or nnU-Net v2 layout, relative to the
  # working directory, all of whose labelled cases are trained on.
  weight: Weight = 1.0  # share of the runs, relative to that of the other sources


@dataclasses.dataclass(frozen=True)
class LegConfig:
  """A part of the training, with an optimizer and a warm-up of its own.

  It sets out from the averaged weights of the leg before. What is None is as in TrackerConfig.
  """

  __pydantic_config__ = STRICT

  steps: Count
  learning_rate: Weight | None = None
  batch_size: Count | None = None
  slices: _Slices | None = None
  promptings: Count | None = None
  corrections: _Corrections | None = None
  box: Share | None = None
  point: Share | None = None
  every: Share | None = None
  plain: Share | None = None


@dataclasses.dataclass(frozen=True)
class TrackerConfig:
  """Training of SAM 2 as a tracker: class-agnostic, on runs of slices, prompts drawn as in SAM 2.

  Comes before the refiner's, which then starts from it. With loop.steps=0 and no legs there is
  none.
  """

  __pydantic_config__ = STRICT

  init_from: Place = ""  # as refiner.init_from
  trainable: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
  # Patterns (fnmatch) of parameter paths, as refiner.trainable; ("*adapter*",) for adapters alone.
  data: Annotated[tuple[SourceConfig, ...], Field(min_length=1)] = (SourceConfig(),)
  batch_size: Count = 1  # runs
  microbatches: Count = 1  # parts of a batch, one after the other; memory falls, time rises
  slices: _Slices = 8  # consecutive slices of a run; 1 trains on images
  objects: Count = 3  # of a run, at most
  promptings: Count = 1
  # Times that every object of a run is prompted and followed, each time otherwise. The slices are
  # encoded once, which is what costs.
  corrections: _Corrections = 7  # clicks on a slice that is corrected
  box: Share = 0.5  # share of objects whose first prompt is a box
  point: Share = 0.25  # share of those whose first prompt is a point; the others have a mask
  every: Share = 0.0  # share of objects that are prompted on every slice, by boxes or points
  plain: Share = 0.0  # share of the synthetic runs whose tissues are plain and differ clearly
  legs: tuple[LegConfig, ...] = ()
  # One after the other, instead of loop.steps: from scratch images come first, as in SAM 2.
  loop: UnvalidatedLoopConfig = UnvalidatedLoopConfig(steps=0)
  optimizer: RefinerOptimizerConfig = RefinerOptimizerConfig(clip_norm=1.0)
  loss: RefinerLossConfig = RefinerLossConfig()
  augmentation: AugmentationConfig = AugmentationConfig()
  oversample_foreground: ClassVar[float] = 1.0  # a run without an object teaches nothing

  def __post_init__(self):
    if not any(source.weight for source in self.data):
      raise ValueError("data: all weights are 0; give one source a weight")
    if self.legs and self.loop.steps:
      raise ValueError("legs and loop.steps are given; say the steps of the legs alone")
    for leg in self.parts if self.legs else (self,):
      if leg.box + leg.point > 1:
        raise ValueError(f"box {leg.box} and point {leg.point} are more than 1 together; lower one")
      if leg.every and not leg.box + leg.point:
        raise ValueError("every is given, but box and point are 0; give one of them a share")

  @property
  def parts(self) -> "tuple[TrackerConfig, ...]":
    """The legs as configs of their own; without legs the config itself if it has steps."""
    if not self.legs:
      return (self,) if self.loop.steps else ()
    return tuple(self._part(leg) for leg in self.legs)

  def _part(self, leg: LegConfig) -> "TrackerConfig":
    given = {name: x for name, x in vars(leg).items() if x is not None}
    loop = dataclasses.replace(self.loop, steps=given.pop("steps"))
    rate = given.pop("learning_rate", self.optimizer.learning_rate)
    optimizer = dataclasses.replace(self.optimizer, learning_rate=rate)
    return dataclasses.replace(self, legs=(), loop=loop, optimizer=optimizer, **given)
