"""Boxes between a grid and the S x S image that it is squashed to, both as inclusive indices.

For boxes of masks, boxes that people give as voxels, and boxes that are told in voxels again.
Points are scaled alone.
"""

from typing import Any

import numpy as np

from rfmedsam2_jax.nn.layers import A

_MOST_MOVED = 20 / 1024  # of the image's side: noise_bound of SAM 2, whose side is 1024


def boxes_to_square(boxes: A, height: int, width: int, side: int) -> A:
  """Boxes on a grid of `height` x `width`, in pixels of the S x S image.

  Columns i0 to i1 are s = S / W pixels wide each and cover the image from i0 s to (i1 + 1) s. So
  x0 = i0 s, and x1 = (i1 + 1) s - 1, or x0 where all of them are narrower than a pixel; rows
  likewise. For s = 1 these are the indices themselves, as in SAM 2 (sam2_utils.py: mask_to_box).

  Args:
    boxes: real [..., 4], x0 y0 x1 y1. side: S.
  """
  scale = _scale(boxes, height, width, side)
  xp: Any = boxes.__array_namespace__()
  first = boxes[..., :2] * scale
  return xp.concatenate([first, xp.maximum(first, (boxes[..., 2:] + 1) * scale - 1)], axis=-1)


def boxes_from_square(boxes: A, height: int, width: int, side: int) -> A:
  """The inverse: real indices, x0 / s - 0.5 and (x1 + 1) / s - 0.5 being the box's outer edges.

  A box that was narrower than a pixel comes back as wide as a pixel, from its own first index on.
  """
  scale = _scale(boxes, height, width, side)
  xp: Any = boxes.__array_namespace__()
  return xp.concatenate([boxes[..., :2] / scale, (boxes[..., 2:] + 1) / scale - 1], axis=-1)


def jittered(boxes: A, drawn: A, share: float, side: int) -> A:
  """Boxes [..., 4] with their edges moved, inside the S x S image, as sam2_utils.sample_box_points
  does it: by 20 pixels of its 1024 at most, which are as many parts of any other side.

  Args:
    drawn: in [-1, 1], [..., 4]: by which part of `share` of the box's size each edge is moved.
  """
  xp: Any = boxes.__array_namespace__()
  most = xp.minimum((boxes[..., 2:] - boxes[..., :2]) * share, _MOST_MOVED * side)
  return xp.clip(boxes + drawn * xp.concatenate([most, most], axis=-1), 0.0, side - 1.0)


def _scale(boxes: A, height: int, width: int, side: int) -> np.ndarray:
  return np.array([side / width, side / height], boxes.dtype)
