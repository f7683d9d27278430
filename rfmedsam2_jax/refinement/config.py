"""What the refinement does: its stages, prompts and fusion."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rfmedsam2_jax.base.ranges import STRICT, Count, Share, Whole


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """One stage of refinement over the slices of a volume."""

  __pydantic_config__ = STRICT

  memory: Literal["neighbours", "stream", "none"] = "neighbours"
  # neighbours: slices around, as the previous stage saw them, all cells side by side;
  # stream: SAM 2's recurrence, slice after slice, out from the anchor; none: each slice for itself.
  reach: Annotated[int, Field(ge=0, le=6)] = 3
  # Neighbours on either side; more costs time and memory.
  anchors: Whole = 1  # slices per organ that every other slice attends to, best first; 0 for none
  box: bool = True  # prompt with the box of the previous stage
  mask: bool = True  # prompt with the mask of the previous stage
  pointers: bool = False  # attend to the previous stage's object pointers; the first stage has none
  residual: bool = False
  # Decode a correction: the previous stage's mask logits (within +-residual_limit) and its presence
  # (+4 or -2) are added to the decoded ones. Off, it is SAM 2 as it was published; on, a decoder
  # trained from scratch need not learn to pass a mask through first.
  residual_limit: Annotated[float, Field(gt=0, le=1024)] = 8.0
  # Lower: sure mistakes are easier to learn to correct, and to make.
  loss_weight: ClassVar[float] = 1.0  # in the training loss; all stages count alike


@dataclasses.dataclass(frozen=True)
class RefinementConfig:
  """Stages after the generator, and how their masks become one label map.

  What belongs together has a name, see `PRESETS`.
  """

  __pydantic_config__ = STRICT

  stages: tuple[StageConfig, ...] = (StageConfig(), StageConfig(pointers=True))
  zoom: Annotated[float, Field(ge=0, le=100)] = 0.0
  # Side of the square that stages see of the slices, one around each structure, in sides of what
  # the generator found of it (data.cuts); 0 shows whole slices. Small structures are seen at a
  # resolution of their own; a slice is encoded once for each of them, and a run of training shows
  # one. The built-in weights know cuts of 1.4 to 4 sides.
  live_margin: Whole = 3  # slices beyond a structure that are still run; more is slower
  cells_per_batch: Count = 32  # (organ, slice) cells per call and device; memory grows with it
  fusion: Literal["masks", "changes"] = "masks"
  # masks: the last stage's masks, resized to the volume's grid. changes: the generator's own logits
  # plus what the stages changed of them, so that its detail between the pixels of the mask grid is
  # kept; for stages that are `residual`.
  background: Literal["threshold", "rest"] = "threshold"
  # threshold: a voxel with no organ above `threshold` is background. rest: where structures do not
  # overlap, background has what they leave of 1 and must win like any of them, as in a softmax; two
  # neighbours that are unsure where they meet leave no gap between them.
  generator_weight: Share = 0.0  # share of the generator's vote in the fused probability

  threshold: ClassVar[float] = 0.5  # foreground probability above which a voxel is an organ's
  box_margin: ClassVar[float] = 2.0  # added to boxes on every side, in pixels of the SAM image
  slices_per_batch: ClassVar[int] = 8  # of the image encoder's calls, per device

  def __post_init__(self):
    if 0 < self.zoom < 1:
      raise ValueError(f"zoom is {self.zoom:g}, less than the structure; give 1 or more, or 0 for "
                       "whole slices")
    if self.stages and self.stages[0].pointers:
      raise ValueError("stages[0].pointers is true, but no stage before it makes object pointers")


# What `refinement.preset` names: what stages are meant to do, and the fusion that fits it.
PRESETS: dict[str, RefinementConfig] = {
  # Stages make masks anew, as SAM 2 does; its official weights are made for this.
  "masks": RefinementConfig(),
  # Stages correct the generator's masks, which a decoder from scratch learns in little time.
  "corrections": RefinementConfig(
    stages=(StageConfig(residual=True, residual_limit=3.0),
            StageConfig(residual=True, residual_limit=3.0, pointers=True)),
    fusion="changes", background="rest", generator_weight=0.5),
}
