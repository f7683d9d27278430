"""One config for everything: composed of the rooms' own dataclasses."""

import dataclasses
from typing import Annotated

from pydantic import Field

from rfmedsam2_jax.base.ranges import STRICT, Place
from rfmedsam2_jax.config.tracker import TrackerConfig
from rfmedsam2_jax.config.training import GeneratorConfig, RefinerConfig
from rfmedsam2_jax.data.loader import LoaderConfig
from rfmedsam2_jax.data.plan import PlanConfig
from rfmedsam2_jax.data.splits import SplitConfig
from rfmedsam2_jax.nn.presets import PRESETS
from rfmedsam2_jax.nn.sam2 import SAM2Config
from rfmedsam2_jax.parallel.mesh import MeshConfig
from rfmedsam2_jax.refinement.config import RefinementConfig
from rfmedsam2_jax.segmentation.config import InferenceConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is trained on."""

  __pydantic_config__ = STRICT

  dataset: Place = ""  # folder in Decathlon or nnU-Net v2 layout, relative to the working directory
  structures: tuple[str, ...] | None = None  # names to segment, others are background; None: all
  sam_channels: tuple[Annotated[int, Field(ge=0, le=2**10)], ...] = (0,)
  # The image channel that SAM 2 sees, or three of them.
  sam_context: bool = False
  # Instead of one slice in three equal colours SAM 2 sees the slices before, at and behind it.
  # Official weights know equal colours only.
  split: SplitConfig = SplitConfig()
  loader: LoaderConfig = LoaderConfig()


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole experiment.

  In files `sam2` and `refinement` take `preset: NAME` and what differs from it; `sam2` also
  `preset: builtin`, the network of the weights in the package.
  """

  __pydantic_config__ = STRICT

  data: DataConfig = DataConfig()
  plan: PlanConfig = PlanConfig()
  generator: GeneratorConfig = GeneratorConfig()
  sam2: SAM2Config = PRESETS["nano"]
  tracker: TrackerConfig = TrackerConfig()
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
    if self.refinement.zoom and self.refiner.structures != 1:
      raise ValueError(f"refiner.structures is {self.refiner.structures}, but refinement.zoom is "
                       f"{self.refinement.zoom:g}, and a cut shows one structure; set it to 1")
    generator = self.generator
    if generator.members > 1 and generator.loop.steps:
      raise ValueError(f"generator.members is {generator.members}, but generator.loop.steps is "
                       f"{generator.loop.steps}: an ensemble is used as it is; set steps to 0, or "
                       "convert one fold and train that on")
    if self.tracker.parts and self.refiner.init_from:
      raise ValueError("refiner.init_from is given, but the refiner starts from the tracker, which "
                       "has steps; give tracker.init_from instead")
    if self.refiner.mask_adapter.loop.steps:
      given = "refiner.mask_adapter.loop.steps is given, but"
      if not self.sam2.adapters.mask:
        raise ValueError(f"{given} sam2.adapters.mask is false")
      if not all(stage.residual for stage in self.refinement.stages):
        raise ValueError(f"{given} a stage is not residual: without the mask before it there is "
                         "nothing to correct; make all residual")

  @property
  def tracker_alone(self) -> bool:
    """Whether SAM 2 is trained as a tracker and nothing else: no generator, and no refiner."""
    others = self.generator.loop.steps or self.generator.init_from or self.refiner.loop.steps
    return bool(self.tracker.parts and not others)

  @property
  def needs_dataset(self) -> bool:
    """Whether `data.dataset` is read at all."""
    of_tracker = self.tracker.data if self.tracker.parts else ()
    return not self.tracker_alone or any(source.source == "own" for source in of_tracker)
