"""Where the first prompts come from: the generator, the truth (the paper's upper limit), a person.

All on the host, on the prepared grid. In: the generator's log-odds. Out: `VolumePrompts`.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from rfmedsam2_jax.base.constants import LOGIT_LIMIT
from rfmedsam2_jax.refinement.prompts import scaled_boxes
from rfmedsam2_jax.refinement.refine import VolumePrompts


def generated(
  logits: np.ndarray, boxes: np.ndarray, present: np.ndarray
) -> VolumePrompts:
  """Stage-0 prompts of the generator.

  Args:
    logits: float16 [K, D, 4G, 4G]. boxes: float32 [K, D, 4] in pixels of the S x S image, of the
      arg-max masks. present: bool [K, D].
  """
  cells = present.shape
  return VolumePrompts(
    logits=logits,
    presence=present.astype(np.float32),
    boxes=boxes.astype(np.float32),
    has_box=present.copy(),
    has_mask=present.copy(),
    points=np.zeros((*cells, 0, 2), np.float32),
    point_labels=np.zeros((*cells, 0), np.int32),
    given=np.zeros(cells, bool),
    fixed_boxes=np.zeros(cells, bool),
  )


def with_oracle(
  prompts: VolumePrompts, truth_boxes: np.ndarray, truth_present: np.ndarray, side: int
) -> VolumePrompts:
  """Presence and boxes from the truth in every stage; masks stay the generator's, inside the box.

  No mask of the truth is shown to the network, so what it segments is its own. Where the generator
  found nothing inside a true box, the first prompt is the box alone.

  Args:
    truth_boxes: float32 [K, D, 4] in pixels of the S x S image. truth_present: bool [K, D].
  """
  logits = _inside_boxes(prompts.logits, truth_boxes, side)
  return prompts._replace(
    logits=logits,
    presence=truth_present.astype(np.float32),
    boxes=truth_boxes.astype(np.float32),
    has_box=truth_present.copy(),
    has_mask=truth_present & (logits > 0).any(axis=(2, 3)),
    fixed_boxes=np.ones_like(truth_present),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class GivenPrompt:
  """One prompt of a person, on the prepared grid.

  organ: index of the structure. slice: index along D.
  box: x0 y0 x1 y1 in pixels of the S x S image, or None.
  points: ((x, y, is_inside), ...) in pixels of the S x S image.
  mask: bool [H, W] of the slice, or None.
  """

  organ: int
  slice: int
  box: Sequence[float] | np.ndarray | None = None
  points: tuple[tuple[float, float, bool], ...] = ()
  mask: np.ndarray | None = None


def with_given(
  prompts: VolumePrompts, given: list[GivenPrompt], side: int, mask_side: int, resize
) -> VolumePrompts:
  """The generator's prompts, corrected on some cells by a person; these also become anchors.

  Args:
    mask_side: 4G. resize: antialiased linear resize of [n, H, W] to [n, 4G, 4G].
  """
  per_cell: collections.Counter[tuple[int, int]] = collections.Counter()
  for prompt in given:
    per_cell[prompt.organ, prompt.slice] += len(prompt.points)
  clicks = max(per_cell.values(), default=0)
  cells = prompts.presence.shape
  points = np.zeros((*cells, clicks, 2), np.float32)
  labels = np.full((*cells, clicks), -2, np.int32)
  copies = {
    name: getattr(prompts, name).copy()
    for name in ("logits", "presence", "boxes", "has_box", "has_mask", "given", "fixed_boxes")
  }
  for prompt in given:
    cell = prompt.organ, prompt.slice
    copies["given"][cell] = True
    copies["presence"][cell] = 1.0
    box = prompt.box
    if prompt.mask is not None:
      share = resize(prompt.mask[None].astype(np.float32), mask_side)[0]
      # A person's mask is certain; a soft edge keeps what lies between pixels.
      copies["logits"][cell] = np.clip((share - 0.5) * 2 * LOGIT_LIMIT, -LOGIT_LIMIT, LOGIT_LIMIT)
      boxes, found = scaled_boxes(prompt.mask[None], side, 0.0)
      box = boxes[0] if found[0] else None
    if box is not None:
      copies["boxes"][cell] = box
      copies["has_box"][cell] = copies["fixed_boxes"][cell] = True
      if prompt.mask is None:
        here = np.asarray(box, np.float32)[None, None]
        copies["logits"][cell] = _inside_boxes(copies["logits"][cell][None, None], here, side)[0, 0]
    first = int((labels[cell] >= 0).sum())
    for number, (x, y, inside) in enumerate(prompt.points, first):
      points[cell][number] = x, y
      labels[cell][number] = int(inside)
    copies["has_mask"][cell] = bool((copies["logits"][cell] > 0).any())
  return prompts._replace(points=points, point_labels=labels, **copies)


def _inside_boxes(logits: np.ndarray, boxes: np.ndarray, side: int) -> np.ndarray:
  """float16 [K, D, 4G, 4G], -32 outside of each cell's box [K, D, 4]."""
  mask_side = logits.shape[-1]
  size = side / mask_side
  start = np.arange(mask_side) * size
  x0, y0, x1, y1 = (boxes[..., i, None] for i in range(4))
  # Pixels that the box touches stay: its far edge is the index where the last pixel begins.
  columns = (start + size > x0) & (start < x1 + 1)
  rows = (start + size > y0) & (start < y1 + 1)
  inside = rows[..., :, None] & columns[..., None, :]
  return np.where(inside, logits, np.float16(-LOGIT_LIMIT))
