"""Tracking through a volume: slices pass through the accelerator, the rest stays on the host.

The accelerator holds a batch of slices and a memory bank of fixed shape, however deep the volume
is. Features stay on the host where corrections are to come.

In: slices and `SlicePrompt`s. Out: `Tracks`, or batches of them as they are made.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rfmedsam2_jax.nn import SAM2, MemorySlots, apply
from rfmedsam2_jax.nn import memory_bank as memory
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.tracking import recurrence
from rfmedsam2_jax.tracking.features import FeatureStore, TrackingConfig
from rfmedsam2_jax.tracking.prompts import SlicePrompt, point_prompts
from rfmedsam2_jax.tracking.recurrence import Cells

_LIMIT = 32.0  # of a previous mask's logits as a prompt (sam2_video_predictor.py:280)


@dataclasses.dataclass(frozen=True, eq=False)
class Tracks:
  """N objects followed through D slices, numpy arrays on the host.

  Attributes:
    cells: Cells [N, D]; logits float16, float32 if features are cached so.
    prompted: (track, slice) pairs that a person prompted, and what came of them.
    reverse: bool [D], slices that were last run backward.
  """

  cells: Cells
  prompted: dict[tuple[int, int], "Prompted"]
  reverse: np.ndarray


class Prompted(NamedTuple):
  """A conditioning cell: Cells without leading axes, and its memory map [G, G, mem_dim]."""

  cells: Cells
  maps: np.ndarray


class Batch(NamedTuple):
  """Slices that are done: numbers int [L], Cells [N, L], and the direction they were run in."""

  slices: np.ndarray
  cells: Cells
  reverse: bool


# Cells [N, D] as far as they are known, and the slices that are new in them.
Arrived = Callable[[Cells, np.ndarray], None]


def _unheard(cells: Cells, slices: np.ndarray) -> None:
  pass


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _decode_prompted(model, params, features, prompts, slots, multimask, dynamic):
  if slots is None:
    conditioned = apply(model.config, params, features.embedding, method="unconditioned")
  else:
    conditioned = apply(model.config, params, features.embedding, slots, method="condition")
  cells = recurrence.decode_cells(
    model, params, conditioned, features.high_res, prompts, multimask, dynamic
  )
  maps = recurrence.remember_cells(model, params, features.embedding, cells, binarize=True)
  return cells, maps


@functools.partial(jax.jit, static_argnums=0)
def _take_given(model, params, features, masks):
  cells = recurrence.given_cells(model, params, features, masks)
  maps = recurrence.remember_cells(model, params, features.embedding, cells, binarize=True)
  return cells, maps


_sweep = jax.jit(recurrence.sweep, static_argnums=(0, 9), donate_argnums=2)
_remember = jax.jit(recurrence.remember_cells, static_argnums=(0, 4))


class VolumeTracker:
  """A volume whose objects are to be followed: its slices and what was encoded of them.

  Tracks are values: `track` and `correct` return new ones and change nothing but the cache.

  Args:
    slices: gives float32 [n, S, S, 3], normalised by ImageNet's mean and standard deviation, for
      slice numbers [n].
    depth: number of slices.
    progress: called with (slices done, slices in all).
  """

  def __init__(
    self,
    model: SAM2,
    params: Params,
    config: TrackingConfig,
    slices: Callable[[np.ndarray], np.ndarray],
    depth: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
  ):
    self._model, self._params, self._config = model, params, config
    self._depth, self._progress = depth, progress
    self._features = FeatureStore(model, params, config, slices)

  def track(self, prompts: Sequence[SlicePrompt], arrived: Arrived = _unheard) -> Tracks:
    """Follows the prompted objects in both directions.

    Args:
      arrived: called whenever slices are known: prompted ones first, then as they are swept.

    Raises:
      ValueError: no prompts, a slice outside the volume, an object without any prompt, or two
        prompts for one object on one slice.
    """
    prompted = self.begin(prompts)
    return self._collected(prompted, set(prompted), None, arrived)

  def correct(
    self, tracks: Tracks, prompts: Sequence[SlicePrompt], arrived: Arrived = _unheard
  ) -> Tracks:
    """Adds prompts on any slices, seen together with what is there, and follows anew.

    A point or a box is decoded with the memories around its slice and with the mask that was
    found there, as SAM 2 corrects (`add_all_frames_to_correct_as_cond=True`). All other slices
    are then followed again from the prompted ones; what was remembered of wrong masks is not kept
    (the official predictor keeps it). An object that is new begins with these prompts. Objects
    without one stay as they are, unless the first prompted slice of all is another now: both
    directions set out from it, so that everything is followed again.

    Raises:
      ValueError: as `track`.
    """
    known = len(tracks.cells.presence)
    added = self._checked(prompts, max([known, *(1 + p.track for p in prompts)]))
    new = [p for p in added if p.track >= known]
    _check_complete(new, known)
    decoded = self._correct_prompted(tracks, [p for p in added if p.track < known])
    decoded |= self._begin(new)
    return self._collected({**tracks.prompted, **decoded}, set(decoded), tracks, arrived)

  def begin(self, prompts: Sequence[SlicePrompt]) -> dict[tuple[int, int], Prompted]:
    """Decodes the prompted cells, without memory; raises as `track`."""
    if not prompts:
      raise ValueError("no prompts: nothing says what to follow")
    prompts = self._checked(prompts, 1 + max(p.track for p in prompts))
    _check_complete(prompts, 0)
    return self._begin(prompts)

  def _begin(self, prompts: Sequence[SlicePrompt]) -> dict[tuple[int, int], Prompted]:
    size = self._config.slices_per_batch
    return self._decode(prompts, size, lambda chosen: None, lambda chosen: (None, None))

  def follow(
    self, prompted: dict[tuple[int, int], Prompted], moved: Sequence[int]
  ) -> Iterator[Batch]:
    """Sweeps from the first prompted slice forward to the end, then backward to the beginning.

    Yields every slice at least once; where a slice comes again (the first prompted one, for
    objects that are prompted elsewhere), the later is the one that counts, as in the official
    predictor.

    Args:
      moved: the tracks to follow; the cells of a batch are theirs, in this order.
    """
    c = self._config
    start = min(z for _, z in prompted)
    count = -(-len(moved) // c.objects_per_batch)
    groups = np.array_split(np.asarray(moved), count)
    row_of = {track: row for row, track in enumerate(moved)}
    banks = [self._bank(group, prompted) for group in groups]
    order = [(np.arange(start, self._depth), False)]
    if start > 0:
      order.append((np.arange(start, -1, -1), True))
    total, done = sum(len(slices) for slices, _ in order), 0
    batches = [
      (slices[first : first + c.slices_per_batch], reverse)
      for slices, reverse in order
      for first in range(0, len(slices), c.slices_per_batch)
    ]
    runs = [
      [np.array([[(t, z) not in prompted for z in chunk] for t in group]) for group in groups]
      for chunk, _ in batches
    ]
    busy = [any(run.any() for run in by_group) for by_group in runs]
    wanted = [chunk for (chunk, _), is_busy in zip(batches, busy, strict=True) if is_busy]
    self._progress(0, total)
    features_of = self._features.ahead(wanted)
    for (chunk, reverse), by_group, is_busy in zip(batches, runs, busy, strict=True):
      features = next(features_of) if is_busy else None
      parts = []
      for number, (group, run) in enumerate(zip(groups, by_group, strict=True)):
        if run.any():
          banks[number], cells = self._sweep(banks[number], features, chunk, run, start, reverse)
        else:
          cells = self._nothing(len(group), len(chunk))
        parts.append(cells)
      cells = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
      for (t, z), known in prompted.items():
        for where in np.flatnonzero(chunk == z) if t in row_of else ():
          for whole, one in zip(cells, known.cells, strict=True):
            whole[row_of[t], where] = one
      done += len(chunk)
      self._progress(done, total)
      yield Batch(chunk, cells, reverse)

  def _collected(
    self, prompted: dict[tuple[int, int], Prompted], added: set[tuple[int, int]],
    known: Tracks | None, arrived: Arrived,
  ) -> Tracks:
    """Follows the tracks that `added` changes, or all; what is `known` of the others stays."""
    tracks = 1 + max(track for track, _ in prompted)
    cells, backward = self._nothing(tracks, self._depth), np.zeros(self._depth, bool)
    if self._config.cache != "float32":
      cells = cells._replace(logits=cells.logits.astype(np.float16))
    moved = list(range(tracks))
    if known is not None:
      for whole, old in zip(cells, known.cells, strict=True):
        whole[: len(old)] = old
      if min(z for _, z in known.prompted) == min(z for _, z in prompted):
        moved = sorted({track for track, _ in added})
    for (track, z), one in prompted.items():
      if (track, z) in added:
        for whole, part in zip(cells, one.cells, strict=True):
          whole[track, z] = part
    arrived(cells, np.array(sorted({z for _, z in added})))
    for batch in self.follow(prompted, moved):
      backward[batch.slices] = batch.reverse
      for whole, part in zip(cells, batch.cells, strict=True):
        whole[np.ix_(np.array(moved), batch.slices)] = part
      arrived(cells, batch.slices)
    return Tracks(cells, prompted, backward)

  def _nothing(self, tracks: int, slices: int) -> Cells:
    cells = recurrence.no_cells(self._model, ())
    return Cells(*(np.broadcast_to(x, (tracks, slices, *x.shape)).copy() for x in cells))

  def _checked(self, prompts: Sequence[SlicePrompt], tracks: int) -> list[SlicePrompt]:
    seen = set()
    for prompt in prompts:
      if not 0 <= prompt.slice < self._depth:
        raise ValueError(f"slice {prompt.slice} is outside the volume (0 to {self._depth - 1})")
      if not 0 <= prompt.track < tracks:
        raise ValueError(f"object {prompt.track} is unknown; add it to the first prompts")
      if (prompt.track, prompt.slice) in seen:
        raise ValueError(f"object {prompt.track} has two prompts on slice {prompt.slice}")
      seen.add((prompt.track, prompt.slice))
    return list(prompts)

  def _decode(self, prompts, size, slots_of, masks_of) -> dict[tuple[int, int], Prompted]:
    """Prompted cells, in batches of one kind each.

    Args:
      size: of a batch.
      slots_of, masks_of: give the MemorySlots, and the mask prompts with which of them exist, of
        some prompts; None where there are none.
    """
    found = {}
    kinds = {
      "mask": [p for p in prompts if p.mask is not None],
      "multimask": [p for p in prompts if p.is_ambiguous and self._config.multimask],
    }
    chosen = {id(p) for kind in kinds.values() for p in kind}
    kinds["single"] = [p for p in prompts if id(p) not in chosen]
    for kind, members in kinds.items():
      for first in range(0, len(members), size):
        some = members[first : first + size]
        batch = some + [some[-1]] * (size - len(some))
        at = np.array([p.slice for p in batch])
        features = jax.tree.map(lambda x: x[:size], self._features.get(at, keep=True))
        if kind == "mask":
          masks = np.stack([p.mask for p in batch]).astype(np.float32)
          out = _take_given(self._model, self._params, features, masks)
        else:
          out = _decode_prompted(
            self._model, self._params, features, point_prompts(batch, *masks_of(batch)),
            slots_of(batch), kind == "multimask", self._config.dynamic_multimask,
          )
        cells, maps = jax.tree.map(np.asarray, out)
        for row, prompt in enumerate(some):
          one = Cells(*(x[row] for x in cells))
          found[prompt.track, prompt.slice] = Prompted(one, self._stored(maps[row]))
    return found

  def _stored(self, maps: np.ndarray) -> np.ndarray:
    return maps.astype(self._map_dtype)

  @property
  def _map_dtype(self) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if self._config.memory_dtype == "bfloat16" else np.float32)

  def _bank(
    self, group: np.ndarray, prompted: dict[tuple[int, int], Prompted]
  ) -> memory.MemoryBank:
    """A bank that holds the prompted slices of some tracks."""
    config = self._model.config
    of_track = [sorted(z for t, z in prompted if t == track) for track in group]
    bank = memory.empty_bank(
      len(group), _power_of_two(max(map(len, of_track))), config.grid, config.mem_dim,
      config.d_model, config.compute_dtype, self._map_dtype,
    )
    # Filled on the host: any number of prompted slices, without a compilation of its own.
    maps, pointers = jax.tree.map(np.array, (bank.maps, bank.pointers))
    for row, (track, slices) in enumerate(zip(group, of_track, strict=True)):
      for slot, z in enumerate(slices):
        known = prompted[int(track), z]
        for ring, value in ((maps, known.maps), (pointers, known.cells.pointer)):
          ring.values[row, slot] = value
          ring.slices[row, slot] = z
          ring.valid[row, slot] = True
    return jax.tree.map(jnp.asarray, memory.MemoryBank(maps, pointers))

  def _sweep(self, bank, features, chunk, run, start, reverse) -> tuple[memory.MemoryBank, Cells]:
    """One call of the compiled sweep; a batch that is not full is filled up with idle slices."""
    size = self._config.slices_per_batch
    idle = size - len(chunk)
    numbers = np.pad(chunk, (0, idle), mode="edge").astype(np.int32)
    run = np.pad(run, ((0, 0), (0, idle)))
    starts = np.full(len(run), start, np.int32)
    bank, cells = _sweep(
      self._model, self._params, bank, features, numbers, run, starts, np.int32(self._depth),
      np.bool_(reverse), self._config.multimask,
    )
    cells = jax.tree.map(lambda x: np.swapaxes(np.asarray(x)[: len(chunk)], 0, 1), cells)
    return bank, Cells(*cells)

  def _correct_prompted(self, tracks: Tracks, prompts) -> dict[tuple[int, int], Prompted]:
    """Decodes prompts on slices that were followed before: with memories and the mask found."""
    def slots_of(batch):
      slots = [self._slots(tracks, p) for p in batch]
      # As wide as the bank of a sweep, so that few widths are compiled.
      prompted = _power_of_two(max(
        sum(track == p.track for track, _ in tracks.prompted) for p in batch
      ))
      width = prompted + memory.RECENT_SLOTS, prompted + memory.POINTER_SLOTS
      padded = []
      for s in slots:
        more = [(0, width[0] - len(s.maps))], [(0, width[1] - len(s.pointers))]
        sizes = (more[0], more[0], more[0], more[1], more[1], more[1])
        padded.append([
          np.pad(x, extra + [(0, 0)] * (x.ndim - 1)) for x, extra in zip(s, sizes, strict=True)
        ])
      return MemorySlots(*(jnp.asarray(np.stack(parts)) for parts in zip(*padded, strict=True)))

    def masks_of(batch):
      found = [Cells(*(x[p.track, p.slice] for x in tracks.cells)) for p in batch]
      masks = np.stack([
        one.logits if one.presence > 0 else np.full_like(one.logits, -_LIMIT) for one in found
      ])
      return np.clip(masks.astype(np.float32), -_LIMIT, _LIMIT), np.ones(len(batch), bool)

    # One at a time: a batch that is filled up would read memories for nothing.
    return self._decode(prompts, 1, slots_of, masks_of)

  def _slots(self, tracks: Tracks, prompt: SlicePrompt) -> MemorySlots:
    """What SAM 2 reads at a slice that is corrected, without a leading axis."""
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
      cells = Cells(*(x[track, z][None] for x in tracks.cells))
      cells = cells._replace(logits=cells.logits.astype(np.float32))
      pointers.append(cells.pointer[0])
      offsets.append(distance)
      if distance <= memory.RECENT_SLOTS:
        embedding = self._features.get(np.array([z])).embedding[:1]
        remembered = _remember(self._model, self._params, embedding, cells, False)
        maps.append(self._stored(np.asarray(remembered[0])))
        rows.append(distance - 1)
    positions = memory.pointer_positions(jnp.array(offsets), self._depth)
    everything = (
      np.stack(maps), np.array(rows, np.int32), np.ones(len(maps), bool),
      np.stack(pointers), positions, np.ones(len(pointers), bool),
    )
    return MemorySlots(*(jnp.asarray(x) for x in everything))


def _check_complete(prompts: Sequence[SlicePrompt], first: int) -> None:
  """ValueError unless every track from `first` to the last that is prompted has a prompt."""
  given = {p.track for p in prompts}
  missing = set(range(first, 1 + max(given, default=first - 1))) - given
  if missing:
    raise ValueError(f"object {min(missing)} has no prompt")


def _power_of_two(number: int) -> int:
  """The smallest one that is not smaller."""
  return 1 << (number - 1).bit_length()
