"""What tracking works with: how objects are followed, and what is known of them so far."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.tracking.recurrence import Cells, Decoding

HostCells = Cells[np.ndarray]


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
  """How objects are followed through a volume.

  `multimask` and `dynamic_multimask` are what `build_sam2_video_predictor` sets. They suit official
  weights and whatever was trained on prompts, whose ambiguous ones have three masks (the built-in
  weights, runs with `tracker` steps). A refiner trained from scratch knows mask token 0 alone and
  wants both off.
  """

  multimask: bool = True          # best of three masks on tracked slices and for one single point
  dynamic_multimask: bool = True  # for a box or several points: best of three where one is unstable
  looks: int | None = None        # times that a mask is decoded, each but the first with the mask
                                  # before as a prompt; None: 3 where prompts are drawn, else 1
  between: bool = False           # an object ends at its first and its last prompted slice
  memory_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of memories; SAM 2 keeps bfloat16
  slices_per_batch: int = 4       # encoded and swept in one call; device memory grows with it
  objects_per_batch: int = 8      # objects that step together; device memory grows with it
  cache: Literal["bfloat16", "float32", "none"] = "bfloat16"  # features kept on the host, so that
                                                             # corrections need not encode again

  def __post_init__(self):
    for name in ("slices_per_batch", "objects_per_batch", "looks"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")

  def decoding(self, drawn_prompts: bool) -> Decoding:
    """How cells of a network are decoded whose prompts are drawn or not."""
    looks = (3 if drawn_prompts else 1) if self.looks is None else self.looks
    return Decoding(self.multimask, self.dynamic_multimask, looks)

  @property
  def map_dtype(self) -> np.dtype:
    return jnp.dtype(self.memory_dtype)


class Prompted(NamedTuple):
  """A conditioning cell: Cells without leading axes, and its memory map [G, G, mem_dim]."""

  cells: HostCells
  maps: np.ndarray


AllPrompted = dict[tuple[int, int], Prompted]  # by track and slice


@dataclasses.dataclass(frozen=True, eq=False)
class Tracks:
  """N objects followed through D slices, numpy arrays on the host.

  Attributes:
    cells: Cells [N, D]; logits float16, float32 if features are cached so.
    prompted: (track, slice) pairs that a person prompted, and what came of them.
    reverse: bool [D], slices that were last run backward.
  """

  cells: HostCells
  prompted: AllPrompted
  reverse: np.ndarray


def cells_at(cells: HostCells, *where: Any) -> HostCells:
  """Cells at some index of their leading axes."""
  return Cells(*(x[where] for x in cells))


def put_cells(whole: HostCells, where: Any, cells: HostCells) -> None:
  """Writes cells into numpy arrays of cells, at an index of their leading axes."""
  for old, new in zip(whole, cells, strict=True):
    old[where] = new
