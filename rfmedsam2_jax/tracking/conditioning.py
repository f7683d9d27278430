"""Conditioning cells of a tracked volume: what a person prompted, decoded and remembered.

In: `SlicePrompt`s, and for corrections the `Tracks` so far. Out: `Prompted` cells, from which
tracking.tracker follows.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.base.constants import LOGIT_LIMIT
from rfmedsam2_jax.nn import SAM2, MemorySlots, apply
from rfmedsam2_jax.nn import memory_bank as memory
from rfmedsam2_jax.nn.layers import Array, Params
from rfmedsam2_jax.tracking import recurrence
from rfmedsam2_jax.tracking.features import FeatureStore
from rfmedsam2_jax.tracking.prompts import SlicePrompt, point_prompts
from rfmedsam2_jax.tracking.tracks import AllPrompted, Prompted, TrackingConfig, Tracks, cells_at


def _remember(model, params, embedding, cells, binarize):
  return recurrence.remember_cells(
    model, params, embedding, cells.logits, cells.presence, binarize=binarize
  )


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _decode_prompted(model, params, features, prompts, slots, multimask, dynamic):
  if slots is None:
    conditioned = apply(model.config, params, features.embedding, method="unconditioned")
  else:
    conditioned = apply(model.config, params, features.embedding, slots, method="condition")
  cells = recurrence.decode_cells(
    model, params, conditioned, features.high_res, prompts, multimask, dynamic
  )
  return cells, _remember(model, params, features.embedding, cells, binarize=True)


@functools.partial(jax.jit, static_argnums=0)
def _take_masks(model, params, features, masks):
  cells = recurrence.cells_of_masks(model, params, features, masks)
  return cells, _remember(model, params, features.embedding, cells, binarize=True)


_remember_followed = jax.jit(functools.partial(_remember, binarize=False), static_argnums=0)


class PromptDecoder:
  """Decodes the prompted cells of a volume of `depth` slices."""

  def __init__(
    self, model: SAM2, params: Params, config: TrackingConfig, features: FeatureStore, depth: int
  ):
    self._model, self._params, self._config = model, params, config
    self._features, self._depth = features, depth

  def __call__(self, prompts: Sequence[SlicePrompt], tracks: Tracks | None = None) -> AllPrompted:
    """Prompted cells, in batches of one kind each.

    Args:
      tracks: that are corrected, on slices that were followed: with memories and the mask found
        there. None: of tracks that begin, without memory.
    """
    # Corrections one at a time: a batch that is filled up would read memories for nothing.
    size = 1 if tracks else self._config.slices_per_batch
    found: AllPrompted = {}
    kinds: dict[str, list[SlicePrompt]] = {"mask": [], "multimask": [], "single": []}
    for prompt in prompts:
      ambiguous = prompt.is_ambiguous and self._config.multimask
      kind = "mask" if prompt.mask is not None else "multimask" if ambiguous else "single"
      kinds[kind].append(prompt)
    for kind, members in kinds.items():
      for first in range(0, len(members), size):
        some = members[first : first + size]
        batch = some + [some[-1]] * (size - len(some))
        at = np.array([p.slice for p in batch])
        features = jax.tree.map(lambda x: x[:size], self._features.get(at, keep=True))
        if kind == "mask":
          masks = np.stack([np.asarray(p.mask, np.float32) for p in batch])
          out = _take_masks(self._model, self._params, features, masks)
        else:
          mask = _mask_of(tracks, batch[0]) if tracks else (None, None)
          slots = self._slots(tracks, batch[0]) if tracks else None
          out = _decode_prompted(
            self._model, self._params, features, point_prompts(batch, *mask), slots,
            kind == "multimask", self._config.dynamic_multimask,
          )
        cells, maps = jax.tree.map(np.asarray, out)
        for row, prompt in enumerate(some):
          kept = maps[row].astype(self._config.map_dtype)
          found[prompt.track, prompt.slice] = Prompted(cells_at(cells, row), kept)
    return found

  def _slots(self, tracks: Tracks, prompt: SlicePrompt) -> MemorySlots:
    """What SAM 2 reads at a slice that is corrected."""
    track, at = prompt.track, prompt.slice
    sign = -1 if tracks.reverse[at] else 1  # of "behind", in the direction that it was followed in
    maps, rows, pointers, offsets = [], [], [], []
    for (other, z), known in sorted(tracks.prompted.items(), key=lambda item: item[0]):
      if other == track:  # the slice itself, too, if it was prompted before
        maps.append(known.maps)
        rows.append(memory.CONDITIONING_ROW)
        if (at - z) * sign >= 0:
          pointers.append(known.cells.pointer)
          offsets.append((at - z) * sign)
    for distance in range(1, memory.POINTER_SLOTS + 1):
      z = at - sign * distance
      if not 0 <= z < self._depth or (track, z) in tracks.prompted:
        continue
      cells = cells_at(tracks.cells, track, slice(z, z + 1))
      pointers.append(cells.pointer[0])
      offsets.append(distance)
      if distance <= memory.RECENT_SLOTS:
        embedding = self._features.get([z]).embedding[:1]
        cells = cells._replace(logits=cells.logits.astype(np.float32))
        remembered = _remember_followed(self._model, self._params, embedding, cells)
        maps.append(np.asarray(remembered[0]).astype(self._config.map_dtype))
        rows.append(distance - 1)
    positions = np.asarray(memory.pointer_positions(jnp.array(offsets), self._depth))
    # As wide as the bank of a sweep, so that few widths are compiled.
    room = power_of_two(sum(other == track for other, _ in tracks.prompted))

    def padded(x: np.ndarray, recent: int) -> Array:
      return jnp.asarray(np.pad(x, [(0, room + recent - len(x))] + [(0, 0)] * (x.ndim - 1))[None])

    of_maps = np.stack(maps), np.array(rows, np.int32), np.ones(len(maps), bool)
    of_pointers = np.stack(pointers), positions, np.ones(len(pointers), bool)
    return MemorySlots(
      *(padded(x, memory.RECENT_SLOTS) for x in of_maps),
      *(padded(x, memory.POINTER_SLOTS) for x in of_pointers),
    )


def _mask_of(tracks: Tracks, prompt: SlicePrompt) -> tuple[np.ndarray, np.ndarray]:
  """The mask found before as a mask prompt, and that it exists.

  SAM 2 limits it (sam2_video_predictor.py:280).
  """
  found = cells_at(tracks.cells, slice(prompt.track, prompt.track + 1), prompt.slice)
  mask = np.where(found.presence[:, None, None] > 0, found.logits.astype(np.float32), -LOGIT_LIMIT)
  return np.clip(mask, -LOGIT_LIMIT, LOGIT_LIMIT).astype(np.float32), np.ones(1, bool)


def power_of_two(number: int) -> int:
  """The smallest one that is not smaller."""
  return 1 << (number - 1).bit_length()
