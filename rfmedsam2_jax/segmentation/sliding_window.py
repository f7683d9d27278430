"""Sliding-window prediction that hands out the volume slab by slab, along D.

Nothing of the size (whole volume) x (classes) is ever held: a slab is given away as soon as no
later window can touch it, and at most one patch depth is in work.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Window = tuple[int, int, int]  # where it begins along D, H, W


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
  """Where windows begin along one axis: evenly spread, neighbours sharing at least `overlap`."""
  if size <= patch:
    return [0]
  count = math.ceil((size - patch) / (patch * (1 - overlap))) + 1
  return [round(i * (size - patch) / (count - 1)) for i in range(count)]


def importance(patch: int) -> np.ndarray:
  """Weight of the positions in a window along one axis: Gaussian, sigma = patch / 8 (nnU-Net)."""
  offset = np.arange(patch) - (patch - 1) / 2
  return np.exp(-0.5 * np.square(offset / (patch / 8))).astype(np.float32)


def _total_importance(size: int, patch: int, starts: Sequence[int]) -> np.ndarray:
  """Sum of the windows' weights at every position of one axis."""
  total = np.zeros(size, np.float32)
  for start in starts:
    total[start : start + patch] += importance(patch)
  return total


def predict_slabs(
  forward: Callable[[np.ndarray], jax.Array], image: np.ndarray, patch: tuple[int, int, int],
  overlap: float = 0.5, batch_size: int = 1, mirror_axes: Sequence[int] = (),
  reversed_axes: Sequence[int] = (),
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[slice, np.ndarray]]:
  """Logits of a volume of any size, in slabs along D.

  Args:
    forward: float32 [batch_size, *patch, C] to logits [batch_size, *patch, K]; always called with
      this one shape, so that it is compiled once.
    image: [C, D, H, W]; padded with zeros, the mean after normalisation, to the patch's size.
    overlap: least share of a window that its neighbour covers too, in [0, 1).
    mirror_axes: of D, H, W, along which mirrored windows are averaged in; each doubles the time.
    reversed_axes: axes along which windows and padding lie as they would in the mirrored volume;
      of odd sizes that is one voxel away.
    progress: called with (windows done, windows in all).

  Yields:
    (slice along D, float32 [d, H, W, K]), in order and without gaps. The array is the receiver's.
  """
  image, inside = _padded(image, patch, reversed_axes)
  shape = depth, height, width = image.shape[1:]
  starts = [window_starts(size, p, overlap) for size, p in zip(shape, patch, strict=True)]
  for axis in reversed_axes:
    starts[axis] = [shape[axis] - patch[axis] - s for s in reversed(starts[axis])]
  # Windows form a grid, so the sum of their weights is a product of sums along the axes.
  total_d, total_h, total_w = map(_total_importance, shape, patch, starts)
  total_hw = (total_h[:, None] * total_w)[..., None]
  weight_d, weight_h, weight_w = (importance(p) for p in patch)
  weight = (weight_d[:, None, None] * weight_h[:, None] * weight_w)[..., None]

  def finished(begin: int, rows: np.ndarray) -> tuple[slice, np.ndarray]:
    rows /= total_d[begin : begin + len(rows), None, None, None]
    rows /= total_hw
    # Only a volume of one row of windows is padded along D, so its slab is cut, never empty.
    rows = rows[inside[0]] if depth == patch[0] else rows
    return slice(begin, begin + len(rows)), rows[:, inside[1], inside[2]]

  sums, top = None, 0
  windows = list(itertools.product(starts[0], starts[1], starts[2]))
  progress(0, len(windows))
  found = _run(forward, image, windows, patch, batch_size, mirror_axes)
  for number, ((d, h, w), logits) in enumerate(found, 1):
    if sums is None:
      sums = np.zeros((patch[0], height, width, logits.shape[-1]), np.float32)
    if d > top:
      # The next row of windows begins at d, so nothing above it changes any more.
      rest = np.zeros_like(sums)
      rest[: max(patch[0] - (d - top), 0)] = sums[d - top :]
      done, sums = sums[: d - top], rest
      yield finished(top, done)
      top = d
    sums[:, h : h + patch[1], w : w + patch[2]] += logits * weight
    progress(number, len(windows))
  assert sums is not None
  yield finished(top, sums[: depth - top])


def _padded(
  image: np.ndarray, patch: Sequence[int], reversed_axes: Sequence[int]
) -> tuple[np.ndarray, list[slice]]:
  """An image of the patch's size at least, and where the given one lies in it."""
  shape = image.shape[1:]
  pads = [max(p - size, 0) for p, size in zip(patch, shape, strict=True)]
  margins = [(pad // 2, pad - pad // 2) for pad in pads]
  margins = [m[::-1] if axis in reversed_axes else m for axis, m in enumerate(margins)]
  inside = [slice(m[0], m[0] + size) for m, size in zip(margins, shape, strict=True)]
  return np.pad(image, [(0, 0), *margins]) if any(pads) else image, inside


def _run(
  forward: Callable[[np.ndarray], jax.Array], image: np.ndarray, windows: Sequence[Window],
  patch: tuple[int, int, int], batch_size: int, mirror_axes: Sequence[int],
) -> Iterator[tuple[Window, np.ndarray]]:
  """Logits [pd, ph, pw, K] of every window, in order; one batch is computed ahead."""
  flips = [tuple(axis + 1 for axis in axes) for n in range(1, len(mirror_axes) + 1)
           for axes in itertools.combinations(mirror_axes, n)]

  def predict(batch: Sequence[Window]) -> jax.Array:
    parts = [image[:, d : d + patch[0], h : h + patch[1], w : w + patch[2]] for d, h, w in batch]
    parts += [parts[-1]] * (batch_size - len(parts))
    patches = np.ascontiguousarray(np.stack(parts).transpose(0, 2, 3, 4, 1), np.float32)
    total = forward(patches)
    for axes in flips:
      total = total + jnp.flip(forward(np.ascontiguousarray(np.flip(patches, axes))), axes)
    return total / (len(flips) + 1)

  batches = [windows[begin : begin + batch_size] for begin in range(0, len(windows), batch_size)]
  started = predict(batches[0])
  for batch, following in zip(batches, [*batches[1:], None], strict=True):
    logits, started = started, predict(following) if following else started
    yield from zip(batch, np.asarray(logits, np.float32), strict=False)
