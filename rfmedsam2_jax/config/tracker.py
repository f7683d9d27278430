"""How SAM 2 is trained on prompts: to segment what a person points at, and to follow it."""

import dataclasses
from typing import Annotated, ClassVar

from pydantic import Field

from rfmedsam2_jax.base.ranges import STRICT, Count, Share, Weight
from rfmedsam2_jax.config.training import RefinerOptimizerConfig, UnvalidatedLoopConfig
from rfmedsam2_jax.data.augmentation import AugmentationConfig
from rfmedsam2_jax.nn.losses import RefinerLossConfig


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
class TrackerConfig:
  """Training of SAM 2 as a tracker: class-agnostic, on runs of slices, prompts drawn as in SAM 2.

  Comes before the refiner's, which then starts from it. With loop.steps=0 there is none.
  """

  __pydantic_config__ = STRICT

  init_from: str = ""  # checkpoint folder of SAM 2 weights to start from; "" starts from scratch
  # As refiner.init_from.
  trainable: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
  # Patterns (fnmatch) of parameter paths, as refiner.trainable; ("*adapter*",) for adapters alone.
  data: Annotated[tuple[SourceConfig, ...], Field(min_length=1)] = (SourceConfig(),)
  batch_size: Count = 1  # runs
  microbatches: Count = 1  # parts of a batch, one after the other; memory falls, time rises
  slices: Annotated[int, Field(ge=2, le=2**10)] = 8  # consecutive slices of a run
  objects: Count = 3  # of a run, at most
  promptings: Count = 1
  # Times that every object of a run is prompted and followed, each time otherwise. The slices are
  # encoded once, which is what costs.
  corrections: Annotated[int, Field(ge=0, le=100)] = 7  # clicks on a slice that is corrected
  box: Share = 0.5  # share of objects whose first prompt is a box
  point: Share = 0.25  # share of those whose first prompt is a point; the others have a mask
  every: Share = 0.0
  # Share of objects that are prompted on every slice, by boxes or points: those train on images, as
  # SAM 2 does before it follows anything, and from scratch that comes first.
  loop: UnvalidatedLoopConfig = UnvalidatedLoopConfig(steps=0)
  optimizer: RefinerOptimizerConfig = RefinerOptimizerConfig(clip_norm=1.0)
  loss: RefinerLossConfig = RefinerLossConfig()
  augmentation: AugmentationConfig = AugmentationConfig()
  oversample_foreground: ClassVar[float] = 1.0  # a run without an object teaches nothing

  def __post_init__(self):
    if self.box + self.point > 1:
      raise ValueError(f"box {self.box} and point {self.point} are more than 1 together; lower one")
    if self.every and not self.box + self.point:
      raise ValueError("every is given, but box and point are 0; give one of them a share")
    if not any(source.weight for source in self.data):
      raise ValueError("data: all weights are 0; give one source a weight")
