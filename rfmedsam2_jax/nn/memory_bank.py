"""The memory bank: which remembered slices a cell attends to, two ways of filling `MemorySlots`.

Refinement: every cell reads the slices around it, as the previous stage saw them
(`neighbour_slots`); no recurrence, so all cells of a stage can run side by side. Tracking: SAM 2's
own recurrence (`MemoryBank`): what was segmented is remembered and read at the next slices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rfmedsam2_jax.nn import ABSENT_LOGIT, MemorySlots
from rfmedsam2_jax.nn.layers import Array

# SAM 2's maskmem_tpos_enc has one row per distance and a last one for conditioning slices.
CONDITIONING_ROW = 6
RECENT_SLOTS = 6
MAX_POINTER_DISTANCE = 16  # SAM 2: max_obj_ptrs_in_encoder
POINTER_SLOTS = MAX_POINTER_DISTANCE - 1
MASK_SLOTS = 1


def pointer_positions(offsets: Array, depth: Array | int) -> Array:
  """Temporal positions of object pointers (sam2_base.py:582, 591-629 of sam2 1.1.0): float32 [...],
  offset / (min(depth, 16) - 1). Offsets are int [...], slice of the cell minus that of the pointer;
  depth is the true number of slices of the volume, without padding, and broadcasts against them."""
  span = jnp.maximum(jnp.minimum(depth, MAX_POINTER_DISTANCE) - 1, 1)
  return offsets.astype(jnp.float32) / span


class SlotTable(NamedTuple):
  """For every cell of a grid of tracks and slices, the slices that it remembers; all [T, Z, M].

  `slices`: int32, clipped into the volume where not valid. `rows`: int32, of the temporal table.
  `offsets`: int32, own slice minus remembered slice. `valid`: bool.
  """

  slices: Array
  rows: Array
  offsets: Array
  valid: Array


def anchor_slices(
  score: Array, live: Array, given: Array, anchors: int, max_given: int = 0
) -> tuple[Array, Array]:
  """The slices of each track that take the conditioning row: int32 [T, anchors + max_given], given
  ones first, then best first; and whether they are valid, bool, alike.

  Args:
    score: float32 [T, Z], presence times mean foreground probability of the previous stage.
    live, given: bool [T, Z]; given are slices with a person's prompt, anchors in any case.
    anchors: further anchors per track, the live slices with the highest score; 0 for none.
    max_given: the largest number of given slices of a track.
  """
  ranking = jnp.where(live, score, -1.0) + jnp.where(given, 4.0, 0.0)
  count = min(anchors + max_given, live.shape[1])
  slices = jnp.argsort(-ranking, axis=1, stable=True)[:, :count].astype(jnp.int32)
  wanted = jnp.arange(count)[None] < jnp.sum(given, axis=1, keepdims=True) + anchors
  return slices, wanted & jnp.take_along_axis(live | given, slices, axis=1)


def neighbour_slots(
  live: Array, reach: int, anchors: Array, anchors_valid: Array, inside: Array | None = None
) -> SlotTable:
  """M = 2 * reach + anchors slots: at offsets +-1 to +-reach, the own slice excluded, in row
  |offset| - 1 on both sides, and the anchors of the track.

  A slice is read once, as a selected conditioning frame is in SAM 2 (sam2_base.py:565): an anchor
  within reach leaves the neighbour's slot empty.

  Args:
    live: bool [T, Z]; only live cells are remembered.
    reach: slices on either side; at most 6, the rows of the temporal table, or ValueError.
    anchors, anchors_valid: from `anchor_slices`.
    inside: bool [Z] or [T, Z], slices that belong to the volume (the others are padding).
  """
  if not 0 <= reach <= RECENT_SLOTS:
    raise ValueError(f"reach is {reach}; the temporal table has rows for 0 to {RECENT_SLOTS}")
  tracks, depth = live.shape
  steps = [step for distance in range(1, reach + 1) for step in (-distance, distance)]
  own = jnp.arange(depth, dtype=jnp.int32)[:, None]
  near = own + jnp.array(steps, jnp.int32).reshape(1, -1)  # [Z, 2 reach]
  near = jnp.broadcast_to(near, (tracks, *near.shape))
  far = jnp.broadcast_to(anchors[:, None, :], (tracks, depth, anchors.shape[1]))
  slices = jnp.concatenate([near, far], axis=2)
  clipped = jnp.clip(slices, 0, depth - 1)
  remembered = live if inside is None else live & inside
  valid = (slices == clipped) & jax.vmap(jnp.take, (0, 0))(remembered, clipped)
  is_anchor = jnp.arange(slices.shape[2]) >= len(steps)
  far_valid = anchors_valid[:, None, :] & (far != own)
  is_far = (near[..., None] == far[:, :, None]) & anchors_valid[:, None, None]
  valid &= jnp.concatenate([~jnp.any(is_far, axis=3), far_valid], axis=2)
  offsets = own - slices
  rows = jnp.where(is_anchor, CONDITIONING_ROW, jnp.abs(offsets) - 1).astype(jnp.int32)
  return SlotTable(clipped, rows, offsets.astype(jnp.int32), valid)


class Ring(NamedTuple):
  """Values [N, A + 2 R, ...] by slice, int32, in A conditioning slots and two halves of R slots,
  one per direction; which of them are valid, bool."""

  values: Array
  slices: Array
  valid: Array


class MemoryBank(NamedTuple):
  """What N tracks remember while slices stream by; no shape depends on the depth of the volume:
  maps [G, G, mem_dim] of the last 6 slices in each direction, and pointers [C], gated by presence,
  of the last 15. Of networks whose prompts are drawn also `masks`, mask logits [4G, 4G] of the last
  slice in each direction."""

  maps: Ring
  pointers: Ring
  masks: Ring | None = None


def empty_bank(
  tracks: int, conditioning: int, grid: int, mem_dim: int, d_model: int, dtype=jnp.float32,
  map_dtype=None, masks: bool = False,
) -> MemoryBank:
  """A bank that remembers nothing, with room for `conditioning` conditioning slices per track;
  `dtype` is of the pointers, and of the maps unless `map_dtype` says otherwise; `masks`: whether
  masks are remembered, too."""

  def ring(reach: int, dtype, *shape: int) -> Ring:
    slots = tracks, conditioning + 2 * reach
    return Ring(jnp.zeros((*slots, *shape), dtype), jnp.zeros(slots, jnp.int32),
                jnp.zeros(slots, bool))

  maps = ring(RECENT_SLOTS, map_dtype or dtype, grid, grid, mem_dim)
  kept = ring(MASK_SLOTS, jnp.float32, 4 * grid, 4 * grid) if masks else None
  return MemoryBank(maps, ring(POINTER_SLOTS, dtype, d_model), kept)


def _put(ring: Ring, slot: Array, where: Array, values: Array, slices: Array) -> Ring:
  here = (jnp.arange(ring.slices.shape[1])[None] == slot[:, None]) & where[:, None]
  mask = here.reshape(here.shape + (1,) * (ring.values.ndim - 2))
  return Ring(
    jnp.where(mask, values[:, None].astype(ring.values.dtype), ring.values),
    jnp.where(here, slices[:, None], ring.slices), ring.valid | here
  )


def add_conditioning(
  bank: MemoryBank, slot: Array, where: Array, maps: Array, pointers: Array, slices: Array,
  masks: Array | None = None,
) -> MemoryBank:
  """Remembers one conditioning slice per track: maps [N, G, G, mem_dim], pointers [N, C], slices
  int32 [N]; in conditioning slots int32 [N]. `where`: bool [N], tracks that remember at all.
  `masks`: of a bank that has them, [N, 4G, 4G], see `add_recent`."""
  kept = MemoryBank(_put(bank.maps, slot, where, maps, slices),
                    _put(bank.pointers, slot, where, pointers, slices))
  if bank.masks is None:
    return kept
  assert masks is not None
  return kept._replace(masks=_put(bank.masks, slot, where & seen(masks), masks, slices))


def seen(masks_Nhh: Array) -> Array:
  """Which of gated mask logits are of objects that are there, bool [N]."""
  return jnp.any(masks_Nhh > ABSENT_LOGIT, axis=(1, 2))


def add_recent(
  bank: MemoryBank, where: Array, maps: Array, pointers: Array, slices: Array, start: Array,
  reverse: Array | bool, masks: Array | None = None,
) -> MemoryBank:
  """Remembers one tracked slice per track, forgetting the oldest of its direction.

  The reverse pass starts with the forward pass's memories right behind it, because the official
  predictor keeps both directions in one dictionary; so the forward pass leaves its first slices
  from `start` (int32 [N]) on in the reverse half as well. Should the reverse pass run `start`
  again, it needs one slice more than fits beside `start` itself: the later one takes its place.
  `reverse`, the direction of travel, may be traced. `masks`: of a bank that has them, logits
  [N, 4G, 4G] gated by presence; those of absent objects are not remembered.
  """
  backward = jnp.asarray(reverse, jnp.int32)

  def add(ring: Ring, reach: int, values: Array, where: Array = where) -> Ring:
    slot = ring.slices.shape[1] - 2 * reach + slices % reach
    ring = _put(ring, slot + reach * backward, where, values, slices)
    early = where & (slices - start <= reach) & (backward == 0)
    return _put(ring, slot + reach, early, values, slices)

  kept = MemoryBank(add(bank.maps, RECENT_SLOTS, maps), add(bank.pointers, POINTER_SLOTS, pointers))
  if bank.masks is None:
    return kept
  assert masks is not None
  return kept._replace(masks=add(bank.masks, MASK_SLOTS, masks, where & seen(masks)))


def _behind(ring: Ring, reach: int, slices: Array, reverse: Array | bool
            ) -> tuple[Array, Array, Array]:
  """Values of the conditioning slots and of this direction's half, how far behind their slices lie,
  and which are valid. Attention to the other half, none of it valid, would cost as much."""
  backward = jnp.asarray(reverse, jnp.int32)
  conditioning = ring.slices.shape[1] - 2 * reach

  def mine(x: Array) -> Array:
    recent = jax.lax.dynamic_slice_in_dim(x, conditioning + reach * backward, reach, axis=1)
    return jnp.concatenate([x[:, :conditioning], recent], axis=1)

  values, at, valid = (mine(x) for x in ring)
  return values, (at - slices[:, None]) * (2 * backward - 1), valid


def mask_before(bank: MemoryBank, slices: Array, reverse: Array | bool) -> tuple[Array, Array]:
  """Mask logits [N, 4G, 4G] of the slice just behind that at hand, and bool [N], whether the object
  was seen there. `slices`, `reverse`: as in `read`."""
  assert bank.masks is not None
  values, behind, valid = _behind(bank.masks, MASK_SLOTS, slices, reverse)
  here = valid & (behind == 1)
  chosen = jnp.take_along_axis(values, jnp.argmax(here, axis=1)[:, None, None, None], axis=1)
  return chosen[:, 0], jnp.any(here, axis=1)


def read(
  bank: MemoryBank, slices: Array, depth: Array | int, reverse: Array | bool,
  pointers_ahead: bool = False,
) -> MemorySlots:
  """What the tracks read at a slice: conditioning slices anywhere, recent ones behind them.

  A + 6 maps and A + 15 pointers. Pointers of conditioning slices that lie ahead are left out
  (sam2_base.py:595, only_obj_ptrs_in_the_past_for_eval) but in training, `pointers_ahead`.
  `slices`: int32 [N], the slice at hand. `depth`: true depth of the volume. `reverse`: direction of
  travel, may be traced; "behind" means larger slice numbers when it is set.
  """

  def look(ring: Ring, reach: int) -> tuple[Array, Array, Array, Array]:
    values, behind, valid = _behind(ring, reach, slices, reverse)
    is_conditioning = jnp.arange(valid.shape[1])[None] < valid.shape[1] - reach
    recent = (behind >= 1) & (behind <= reach)
    return values, behind, is_conditioning, valid & jnp.where(is_conditioning, behind != 0, recent)

  maps, behind, is_conditioning, valid = look(bank.maps, RECENT_SLOTS)
  rows = jnp.where(is_conditioning, CONDITIONING_ROW, jnp.clip(behind - 1, 0, RECENT_SLOTS - 1))
  pointers, pointer_behind, _, pointer_valid = look(bank.pointers, POINTER_SLOTS)
  return MemorySlots(
    maps, rows.astype(jnp.int32), valid, pointers, pointer_positions(pointer_behind, depth),
    pointer_valid if pointers_ahead else pointer_valid & (pointer_behind >= 0)
  )
