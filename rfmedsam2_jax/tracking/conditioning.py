"""Conditioning cells of a tracked volume: what a person prompted, decoded and remembered.

In: `SlicePrompt`s, and for corrections the `Tracks` so far. Out: `Prompted` cells.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.nn import SAM2, MemorySlots, apply
from rfmedsam2_jax.nn import memory_bank as memory
from rfmedsam2_jax.nn.layers import Array, Params
from rfmedsam2_jax.tracking import recurrence
from rfmedsam2_jax.tracking.features import FeatureStore
from rfmedsam2_jax.tracking.prompts import SlicePrompt, point_prompts
from rfmedsam2_jax.tracking.tracks import AllPrompted, Prompted, TrackingConfig, Tracks, cells_at


def _with_map(model, params, features, cells):
  remembered = features.embedding, cells.logits, cells.presence
  return cells, recurrence.remember_cells(model, params, *remembered, binarize=True)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _decode_prompted(model, params, features, prompts, slots, how):
  method, read = ("condition", [slots]) if slots else ("unconditioned", [])
  conditioned = apply(model, params, features.embedding, *read, method=method)
  cells = recurrence.decode_cells(model, params, conditioned, features.high_res, prompts, how)
  return _with_map(model, params, features, cells)


@functools.partial(jax.jit, static_argnums=0)
def _take_masks(model, params, features, masks):
  cells = recurrence.cells_of_masks(model, params, features, masks)
  return _with_map(model, params, features, cells)


_remember_followed = jax.jit(recurrence.remember_cells, static_argnums=0)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptDecoder:
  """Decodes the prompted cells of a volume of `depth` slices."""

  model: SAM2
  params: Params
  config: TrackingConfig
  features: FeatureStore
  depth: int

  def __call__(self, prompts: Sequence[SlicePrompt], tracks: Tracks | None = None) -> AllPrompted:
    """Prompted cells, of `tracks` that are corrected on slices that were followed, with memories
    and the mask found there; else of tracks that begin, without memory."""
    # Corrections one at a time: a batch that is filled up would read memories for nothing.
    size = 1 if tracks else self.config.slices_per_batch
    how = self.config.decoding(self.model.config.drawn_prompts)
    found: AllPrompted = {}
    for kind, group in itertools.groupby(sorted(prompts, key=self._kind), self._kind):
      members = list(group)
      for first in range(0, len(members), size):
        some = members[first : first + size]
        batch = some + [some[-1]] * (size - len(some))
        held = self.features.get([p.slice for p in batch], keep=True)
        features = jax.tree.map(lambda x: x[:size], held)
        if kind == "mask":
          masks = np.stack([np.asarray(p.mask, np.float32) for p in batch])
          out = _take_masks(self.model, self.params, features, masks)
        else:
          *mask, slots = self._before(tracks, batch[0]) if tracks else (None, None, None)
          out = _decode_prompted(
            self.model, self.params, features, point_prompts(batch, *mask), slots,
            how._replace(multimask=kind == "multimask"),
          )
        cells, maps = jax.tree.map(np.asarray, out)
        for row, prompt in enumerate(some):
          kept = maps[row].astype(self.config.map_dtype)
          found[prompt.track, prompt.slice] = Prompted(cells_at(cells, row), kept)
    return found

  def _kind(self, prompt: SlicePrompt) -> str:
    if prompt.mask is not None:
      return "mask"
    # SAM 2 answers a single point with the best of three masks (sam2_base._use_multimask).
    ambiguous = prompt.box is None and len(prompt.labels) == 1
    return "multimask" if ambiguous and self.config.multimask else "single"

  def _before(
    self, tracks: Tracks, prompt: SlicePrompt
  ) -> tuple[Array, np.ndarray, MemorySlots]:
    """What SAM 2 has at a slice that is corrected: the mask, that it exists, and memories."""
    track, at = prompt.track, prompt.slice
    found = cells_at(tracks.cells, slice(track, track + 1), at)
    mask = recurrence.mask_to_correct(found.logits.astype(np.float32), found.presence)
    sign = -1 if tracks.reverse[at] else 1  # of "behind", in the direction that it was followed in
    known = sorted((z, cell) for (other, z), cell in tracks.prompted.items() if other == track)
    # The slice itself, too, if it was prompted before.
    maps = [(cell.maps, memory.CONDITIONING_ROW) for _, cell in known]
    behind = [(cell.cells.pointer, (at - z) * sign) for z, cell in known]
    pointers = [(pointer, offset) for pointer, offset in behind if offset >= 0]
    for distance in range(1, memory.POINTER_SLOTS + 1):
      z = at - sign * distance
      if not 0 <= z < self.depth or (track, z) in tracks.prompted:
        continue
      cells = cells_at(tracks.cells, track, slice(z, z + 1))
      pointers.append((cells.pointer[0], distance))
      if distance <= memory.RECENT_SLOTS:
        remembered = _remember_followed(
          self.model, self.params, self.features.get([z]).embedding[:1],
          cells.logits.astype(np.float32), cells.presence,
        )
        maps.append((np.asarray(remembered[0]).astype(self.config.map_dtype), distance - 1))

    def padded(x: np.ndarray, recent: int) -> Array:
      # As wide as the bank of a sweep, so that few widths are compiled.
      missing = power_of_two(len(known)) + recent - len(x)
      return jnp.asarray(np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))[None])

    values, rows = zip(*maps, strict=True)
    heard, offsets = zip(*pointers, strict=True)
    positions = np.asarray(memory.pointer_positions(jnp.array(offsets), self.depth))
    of_maps = np.stack(values), np.array(rows, np.int32), np.ones(len(maps), bool)
    of_pointers = np.stack(heard), positions, np.ones(len(pointers), bool)
    return mask, np.ones(1, bool), MemorySlots(
      *(padded(x, memory.RECENT_SLOTS) for x in of_maps),
      *(padded(x, memory.POINTER_SLOTS) for x in of_pointers),
    )


def power_of_two(number: int) -> int:
  """The smallest one that is not smaller."""
  return 1 << (number - 1).bit_length()
