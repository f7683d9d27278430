"""Options of prompted tracking; the defaults are those of the official video predictor."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
  """How objects are followed through a volume.

  `multimask` and `dynamic_multimask` are what `build_sam2_video_predictor` sets; a network that
  was trained with mask token 0 alone (as `nano` is) wants both off.
  """

  multimask: bool = True          # best of three masks on tracked slices and for one single point
  dynamic_multimask: bool = True  # for a box or several points: best of three where one is unstable
  memory_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of memories; SAM 2 keeps bfloat16
  slices_per_batch: int = 4       # encoded and swept in one call; device memory grows with it
  objects_per_batch: int = 8      # objects that step together; device memory grows with it
  cache: Literal["bfloat16", "float32", "none"] = "bfloat16"  # features kept on the host, so that
                                                             # corrections need not encode again

  def __post_init__(self):
    for name in ("slices_per_batch", "objects_per_batch"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
