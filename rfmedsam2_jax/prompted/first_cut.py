"""The first cut of a structure: around its boxes and masks, or around what its points find."""

from collections.abc import Callable, Sequence

import numpy as np

from rfmedsam2_jax.data.cuts import Cut, around, around_points, bounds, whole
from rfmedsam2_jax.prompted.slice_frame import SliceFrame, VoxelPrompt

# Points say nothing of a structure's size: they are looked at in squares of these sides, in shorter
# sides of the slice. What is found in one alone is most likely the structure around or within.
_SHARES = 0.5, 0.35, 0.25, 0.18
_LOOKS = 2  # in each, the second around what the first finds

Look = Callable[[Cut], np.ndarray]


def first_cut(prompts: Sequence[VoxelPrompt], frame: SliceFrame, zoom: float, look: Look) -> Cut:
  """A cut for the first prompts of a structure, or of several.

  Args:
    zoom: its side, in sides of what is in it; 0 for whole slices.
    look: the masks of the prompted slices in a cut, bool [n, height, width].
  """
  if not zoom:
    return whole(frame.shape)
  low, high = frame.bounds(prompts)
  if any(p.box is not None or p.mask is not None for p in prompts):
    return around(low, high, zoom, frame.spacing, frame.shape)
  starts = dict.fromkeys(around_points(share, low, high, frame.spacing, frame.shape)
                         for share in _SHARES)
  found = [_found(start, low, high, frame, zoom, look) for start in starts]
  cuts, masks = zip(*found, strict=True)
  return cuts[_most_alike(masks)]


def _found(
  cut: Cut, low: np.ndarray, high: np.ndarray, frame: SliceFrame, zoom: float, look: Look
) -> tuple[Cut, np.ndarray]:
  """The cut around what is found from a first one, and what that is: bool [n, H, W]."""
  for _ in range(_LOOKS):
    seen = look(cut)
    masks = np.zeros((len(seen), *frame.shape), bool)
    cut.put(masks, seen)
    if (ends := bounds(list(masks))) is None:
      break
    cut = around(np.minimum(low, ends[0]), np.maximum(high, ends[1]), zoom, frame.spacing,
                 frame.shape)
  return cut, masks


def _most_alike(found: Sequence[np.ndarray]) -> int:
  """Which of several masks is most like all the others, by Dice; the first of equals."""
  sizes = [int(mask.sum()) for mask in found]
  likeness = [
    sum(2 * int((mask & other).sum()) / max(size + of_other, 1)
        for other, of_other in zip(found, sizes, strict=True))
    for mask, size in zip(found, sizes, strict=True)]
  return int(np.argmax(likeness))
