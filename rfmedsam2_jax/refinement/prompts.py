"""Prompts from masks: presence, box and mask prompt of each cell, from the logits before a stage.

A cell is one (organ, slice) pair; arrays over cells lead with [K, D] or, gathered, with [N].
What is also used on the host (boxes, live cells) takes numpy arrays as well as JAX ones.
"""

from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.base.constants import LOGIT_LIMIT
from rfmedsam2_jax.nn.adapters import MASK_LIMIT
from rfmedsam2_jax.nn.boxes import boxes_to_square
from rfmedsam2_jax.nn.layers import A, Array


class CellPrompts(NamedTuple, Generic[A]):
  """What is known of N cells before a stage runs.

  logits: float32 [N, 4G, 4G], mask logits of the previous stage, clamped to +-32.
  presence: float32 [N], probability that the organ is in the slice.
  boxes: float32 [N, 4], x0 y0 x1 y1 in pixels of the S x S image, inclusive.
  has_box, has_mask: bool [N].
  points: float32 [N, Q, 2]; point_labels: int32 [N, Q]. A person's clicks, -2 where is none.
  nearby: float32 [N, R, 4G, 4G], see `nearby_logits`; None where no MaskAdapter asks for it.
  """

  logits: A
  presence: A
  boxes: A
  has_box: A
  has_mask: A
  points: A
  point_labels: A
  nearby: A | None = None


class VolumePrompts(NamedTuple):
  """Stage-0 prompts of all cells of a volume, as numpy arrays on the host; see CellPrompts.

  logits: float16 [K, D, 4G, 4G]. presence: float32 [K, D]. boxes: float32 [K, D, 4].
  has_box, has_mask: bool [K, D]. points: float32 [K, D, Q, 2]; point_labels: int32 [K, D, Q].
  given: bool [K, D], cells with a prompt that a person gave; further anchors.
  fixed_boxes: bool [K, D], cells whose box and presence hold through all stages (oracle, given).
  """

  logits: np.ndarray
  presence: np.ndarray
  boxes: np.ndarray
  has_box: np.ndarray
  has_mask: np.ndarray
  points: np.ndarray
  point_labels: np.ndarray
  given: np.ndarray
  fixed_boxes: np.ndarray


def stage0_logits(logits: Array, regions: bool) -> Array:
  """Log-odds of organs by the generator, float [..., K]: logit_k - logsumexp(others) within +-32.

  Args:
    logits: float [..., K + 1] with background first, or [..., K] where structures are `regions`,
      which may overlap.
  """
  if regions:
    return jnp.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT)
  # The others' sum is the sum of all less one's own share; that cancels for the largest only.
  largest = jnp.argmax(logits, axis=-1, keepdims=True) == jnp.arange(logits.shape[-1])
  peak = jnp.max(logits, axis=-1, keepdims=True)
  shares = jnp.exp(logits - peak)
  others = peak + jnp.log(jnp.sum(shares, axis=-1, keepdims=True) - jnp.where(largest, 0, shares))
  rest = jax.nn.logsumexp(jnp.where(largest, -jnp.inf, logits), axis=-1, keepdims=True)
  log_odds = logits - jnp.where(largest, rest, others)
  return jnp.clip(log_odds, -LOGIT_LIMIT, LOGIT_LIMIT)[..., 1:]


def scaled_boxes(masks: A, side: int, margin: float) -> tuple[A, A]:
  """Tight boxes of binary masks of any size, in pixels of the S x S image that the masks cover.

  Args:
    masks: bool [..., H, W]. side: S.
    margin: added on every side, in pixels of the S x S image, to which the result is clipped.

  Returns:
    boxes: float32 [..., 4], x0 y0 x1 y1 as inclusive pixel indices; zeros where a mask is empty.
    present: bool [...].
  """
  xp: Any = masks.__array_namespace__()
  height, width = masks.shape[-2:]
  rows, columns = xp.any(masks, axis=-1), xp.any(masks, axis=-2)
  present = xp.any(rows, axis=-1)
  x0, y0 = xp.argmax(columns, axis=-1), xp.argmax(rows, axis=-1)
  x1 = width - 1 - xp.argmax(columns[..., ::-1], axis=-1)
  y1 = height - 1 - xp.argmax(rows[..., ::-1], axis=-1)
  boxes = xp.stack([x0, y0, x1, y1], axis=-1).astype(xp.float32)
  boxes = boxes_to_square(boxes, height, width, side)
  boxes = boxes + margin * xp.asarray([-1.0, -1.0, 1.0, 1.0], dtype=xp.float32)
  return xp.where(present[..., None], xp.clip(boxes, 0.0, side - 1.0), 0.0), present


def live_cells(present: A, margin: int) -> A:
  """Cells [..., D] that a stage runs: those with the organ, and `margin` slices on both sides."""
  xp: Any = present.__array_namespace__()
  depth = present.shape[-1]
  padded = xp.pad(present, [(0, 0)] * (present.ndim - 1) + [(margin, margin)])
  shifts = [padded[..., step : step + depth] for step in range(2 * margin + 1)]
  return xp.any(xp.stack(shifts), axis=0)


def nearby_logits(logits: A, presence: A, inside: A) -> A:
  """Mask logits around a cell for a MaskAdapter: within +-8, -8 where absent, 0 without a slice.

  Args:
    logits: float32 [..., R, 4G, 4G], of the cell and the slices on either side, as the result is.
    presence: float32 [..., R]. inside: bool [..., R], False for slices that are not there.
  """
  xp: Any = logits.__array_namespace__()
  limited = xp.clip(logits, -MASK_LIMIT, MASK_LIMIT)
  limited = xp.where((presence > 0)[..., None, None], limited, -MASK_LIMIT)
  return xp.where(inside[..., None, None], limited, 0.0)


def anchor_score(presence: Array, logits: Array) -> Array:
  """Presence times mean foreground probability, float32 [...], of logits [..., h, w]."""
  probability, inside = jax.nn.sigmoid(logits), logits > 0
  mean = jnp.sum(probability * inside, (-2, -1)) / jnp.maximum(jnp.sum(inside, (-2, -1)), 1)
  return presence * mean


def stage0_prompts(logits: A, side: int, margin: float) -> CellPrompts[A]:
  """Prompts for the first stage, in training and at prediction: the organ is where its mask is.

  Presence and box are those of the pixels above 0 on the mask grid, as later stages have them. The
  generator's arg-max on its own grid would be finer, but training cannot have it: there a mask is
  turned and has mistakes put in before its box is taken.

  Args:
    logits: real [..., 4G, 4G], mask logits of stage 0 within +-32.
  """
  xp: Any = logits.__array_namespace__()
  boxes, present = scaled_boxes(logits > 0, side, margin)
  return CellPrompts(
    logits, present.astype(xp.float32), boxes, has_box=present, has_mask=present,
    points=xp.zeros((*logits.shape[:-2], 0, 2), xp.float32),
    point_labels=xp.zeros((*logits.shape[:-2], 0), xp.int32),
  )


def next_prompts(logits: Array, presence: Array, side: int, margin: float) -> CellPrompts[Array]:
  """Prompts for the next stage from the outputs of this one; no gradient flows through them.

  `logits` are float32 [N, 4G, 4G], ungated, `presence` logits float32 [N].
  """
  logits, presence = jax.lax.stop_gradient((logits, presence))
  cells = stage0_prompts(jnp.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT), side, margin)
  present = cells.has_mask & (presence > 0)
  return cells._replace(
    presence=jnp.where(present, jax.nn.sigmoid(presence), 0.0), has_box=present, has_mask=present)
