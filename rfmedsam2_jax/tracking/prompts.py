"""A person's prompts: clicks, boxes and masks on slices, as the arrays that the decoder takes.

Coordinates are pixels of the S x S image that the network sees; who knows the volume scales them.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.nn import Prompts
from rfmedsam2_jax.nn.prompt_encoder import ABSENT, BOX_END, BOX_START, NOT_A_POINT


@dataclasses.dataclass(frozen=True, eq=False)
class SlicePrompt:
  """What a person says of one object on one slice: points and a box, or a mask.

  Attributes:
    track, slice: numbers of the object and of the slice.
    points: float32 [P, 2], x and y. labels: int [P], 1 for the object, 0 for what it is not.
    box: x0, y0, x1, y1, inclusive, or None.
    mask: bool [S, S], or None; excludes points and a box.
  """

  track: int
  slice: int
  points: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.float32))
  labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
  box: tuple[float, float, float, float] | None = None
  mask: np.ndarray | None = None

  def __post_init__(self):
    if self.points.shape != (len(self.labels), 2):
      raise ValueError(f"points {self.points.shape} and {len(self.labels)} labels do not agree")
    if (len(self.labels) > 0 or self.box is not None) == (self.mask is not None):
      raise ValueError("a prompt has points or a box, or else a mask")


def point_prompts(
  prompts: Sequence[SlicePrompt], masks: np.ndarray | None = None,
  has_mask: np.ndarray | None = None,
) -> Prompts:
  """Points and boxes as tokens: corners first, points, then SAM 2's own not-a-point token.

  Packed to the left, row by row: a click alone then costs two tokens, where
  `nn.prompt_encoder.pack_prompts`, which compiled programs need, has a place for all that may be.

  Args:
    masks: float32 [N, 4G, 4G], mask prompts besides (a previous result), with bool [N] `has_mask`.
  """
  # An even number, so that prompts of many lengths share a compilation.
  width = max((2 * (p.box is not None) + len(p.labels)) // 2 * 2 + 2 for p in prompts)
  points = np.zeros((len(prompts), width, 2), np.float32)
  labels = np.full((len(prompts), width), ABSENT, np.int32)
  for number, prompt in enumerate(prompts):
    where, row = prompt.points, [*prompt.labels, NOT_A_POINT]
    if prompt.box is not None:
      where = np.concatenate([np.reshape(prompt.box, (2, 2)), where])
      row = [BOX_START, BOX_END, *row]
    points[number, : len(where)], labels[number, : len(row)] = where, row
  return Prompts(*jax.tree.map(jnp.asarray, (points, labels, masks, has_mask)))
