"""Tracking through a volume: slices pass through the accelerator, the rest stays on the host.

The accelerator holds a batch of slices and a memory bank of fixed shape, however deep the volume
is. In: slices and `SlicePrompt`s. Out: `Tracks`, or batches of them as they are made.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.nn import SAM2, ImageFeatures
from rfmedsam2_jax.nn import memory_bank as memory
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.tracking import recurrence
from rfmedsam2_jax.tracking.conditioning import PromptDecoder, power_of_two
from rfmedsam2_jax.tracking.features import FeatureStore
from rfmedsam2_jax.tracking.image import encode_images
from rfmedsam2_jax.tracking.prompts import SlicePrompt
from rfmedsam2_jax.tracking.recurrence import Cells, Course
from rfmedsam2_jax.tracking.tracks import AllPrompted, HostCells, TrackingConfig, Tracks, put_cells

# Cells [N, D] as far as they are known, and the slices that are new in them.
Arrived = Callable[[HostCells, np.ndarray], None]

_encode = jax.jit(encode_images, static_argnums=0)
_sweep = jax.jit(recurrence.sweep, static_argnums=(0, 5), donate_argnums=2)


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
    self, model: SAM2, params: Params, config: TrackingConfig,
    slices: Callable[[np.ndarray], np.ndarray], depth: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
  ):
    self._model, self._params, self._config = model, params, config
    self._depth, self._progress = depth, progress
    self._features = FeatureStore(
      lambda images: _encode(model, params, images), slices, config.slices_per_batch,
      None if config.cache == "none" else jnp.dtype(config.cache),
    )
    self._how = config.decoding(model.config.drawn_prompts)
    self._decoded = PromptDecoder(model, params, config, self._features, depth)

  def track(self, prompts: Sequence[SlicePrompt], arrived: Arrived = lambda *_: None) -> Tracks:
    """Follows the prompted objects in both directions.

    Args:
      arrived: called whenever slices are known: prompted ones first, then as they are swept.

    Raises:
      ValueError: no prompts, a slice outside the volume, an object without any prompt, or two
        prompts for one object on one slice.
    """
    if not prompts:
      raise ValueError("no prompts: nothing says what to follow")
    self._check(prompts, 0)
    prompted = self._decoded(prompts)
    return self._collected(prompted, set(prompted), None, arrived)

  def look(self, prompts: Sequence[SlicePrompt]) -> AllPrompted:
    """Decodes prompted slices alone, each for itself, and follows nothing."""
    self._check(prompts, 0)
    return self._decoded(prompts)

  def correct(
    self, tracks: Tracks, prompts: Sequence[SlicePrompt], arrived: Arrived = lambda *_: None
  ) -> Tracks:
    """Adds prompts on any slices, seen together with what is there, and follows anew.

    A point or a box is decoded with the memories around its slice and with the mask that was
    found there, as SAM 2 corrects (`add_all_frames_to_correct_as_cond=True`). All other slices
    are followed again from the prompted ones; what was remembered of wrong masks is not kept (the
    official predictor keeps it). A new object begins with these prompts. Objects without one stay
    as they are, unless the first prompted slice of all, where both directions set out, is another.

    Raises:
      ValueError: as `track`.
    """
    known = len(tracks.cells.presence)
    self._check(prompts, known)
    decoded = self._decoded([p for p in prompts if p.track < known], tracks)
    decoded |= self._decoded([p for p in prompts if p.track >= known])
    return self._collected(tracks.prompted | decoded, set(decoded), tracks, arrived)

  def follow(
    self, prompted: AllPrompted, moved: Sequence[int]
  ) -> Iterator[tuple[np.ndarray, HostCells, bool]]:
    """Sweeps from the first prompted slice forward to the end, then backward to the beginning.

    Where a slice comes again (the first prompted one, for objects that are prompted elsewhere), the
    later is the one that counts, as in the official predictor.

    Yields:
      Slices int [L], Cells [N, L] of the `moved` tracks, and whether they were run backward; every
      slice at least once.
    """
    size, start = self._config.slices_per_batch, min(z for _, z in prompted)
    groups = np.array_split(range(len(moved)), -(-len(moved) // self._config.objects_per_batch))
    banks = [self._bank([moved[row] for row in rows], prompted) for rows in groups]
    ways = [(np.arange(start, self._depth), False), (np.arange(start, -1, -1), True)]
    followed = self._followed(prompted, moved)
    # A volume that begins with the first prompted slice has no way back.
    batches = [
      (chunk, followed[:, chunk], reverse)
      for slices, reverse in (ways if start > 0 else ways[:1])
      for chunk in np.split(slices, range(size, len(slices), size))
    ]
    total, done = sum(len(chunk) for chunk, _, _ in batches), 0
    self._progress(0, total)
    features_of = self._features.ahead([chunk for chunk, run, _ in batches if run.any()])
    for chunk, run, reverse in batches:
      features = next(features_of) if run.any() else None
      cells = self._nothing(len(moved), len(chunk))
      for i, rows in enumerate(groups):
        if features is not None and run[rows].any():
          banks[i], part = self._sweep(banks[i], features, chunk, run[rows], start, reverse)
          put_cells(cells, rows, part)
      for (t, z), known in prompted.items():
        if t in moved and z in chunk:
          put_cells(cells, (moved.index(t), chunk == z), known.cells)
      done += len(chunk)
      self._progress(done, total)
      yield chunk, cells, reverse

  def _followed(self, prompted: AllPrompted, moved: Sequence[int]) -> np.ndarray:
    """On which slices tracks are followed, bool [N, D]: not where they are prompted."""
    followed = np.ones((len(moved), self._depth), bool)
    for row, track in enumerate(moved):
      own = [z for t, z in prompted if t == track]
      if self._config.between:
        followed[row, : min(own)] = followed[row, max(own) + 1 :] = False
      followed[row, own] = False
    return followed

  def _collected(
    self, prompted: AllPrompted, added: set[tuple[int, int]], known: Tracks | None, arrived: Arrived
  ) -> Tracks:
    """Follows the tracks that `added` changes, or all; what is `known` of the others stays."""
    tracks = 1 + max(track for track, _ in prompted)
    cells, backward = self._nothing(tracks, self._depth), np.zeros(self._depth, bool)
    if self._config.cache != "float32":
      cells = cells._replace(logits=cells.logits.astype(np.float16))
    moved = list(range(tracks))
    if known is not None:
      put_cells(cells, slice(len(known.cells.presence)), known.cells)
      if min(z for _, z in known.prompted) == min(z for _, z in prompted):
        moved = sorted({track for track, _ in added})
    for where in added:
      put_cells(cells, where, prompted[where].cells)
    arrived(cells, np.array(sorted({z for _, z in added})))
    for slices, part, reverse in self.follow(prompted, moved):
      backward[slices] = reverse
      put_cells(cells, np.ix_(np.array(moved), slices), part)
      arrived(cells, slices)
    return Tracks(cells, prompted, backward)

  def _nothing(self, tracks: int, slices: int) -> HostCells:
    cells = recurrence.no_cells(self._model, ())
    return Cells(*(np.broadcast_to(x, (tracks, slices, *x.shape)).copy() for x in cells))

  def _check(self, prompts: Sequence[SlicePrompt], known: int) -> None:
    """Raises what `track` says; tracks from `known` on are new."""
    seen = set()
    for prompt in prompts:
      if not 0 <= prompt.slice < self._depth:
        raise ValueError(f"slice {prompt.slice} is outside the volume (0 to {self._depth - 1})")
      if prompt.track < 0:
        raise ValueError(f"object {prompt.track} is unknown; add it to the first prompts")
      if (prompt.track, prompt.slice) in seen:
        raise ValueError(f"object {prompt.track} has two prompts on slice {prompt.slice}")
      seen.add((prompt.track, prompt.slice))
    given = {p.track for p in prompts}
    missing = set(range(known, max(given, default=0))) - given
    if missing:
      raise ValueError(f"object {min(missing)} has no prompt")

  def _bank(self, group: Sequence[int], prompted: AllPrompted) -> memory.MemoryBank:
    """A bank that holds the prompted slices of some tracks."""
    config = self._model.config
    of_track = [sorted(z for t, z in prompted if t == track) for track in group]
    bank = memory.empty_bank(
      len(group), power_of_two(max(map(len, of_track))), config.grid, config.mem_dim,
      config.d_model, config.compute_dtype, self._config.map_dtype, config.drawn_prompts,
    )
    # Filled on the host: any number of prompted slices, without a compilation of its own.
    bank = jax.tree.map(np.array, bank)
    for row, (track, slices) in enumerate(zip(group, of_track, strict=True)):
      for slot, z in enumerate(slices):
        known = prompted[track, z]
        kept = [(bank.maps, known.maps), (bank.pointers, known.cells.pointer)]
        if bank.masks is not None and known.cells.presence > 0:
          mask = recurrence.mask_to_follow(known.cells.logits, known.cells.presence)
          kept.append((bank.masks, np.asarray(mask)))
        for ring, value in kept:
          ring.values[row, slot], ring.slices[row, slot], ring.valid[row, slot] = value, z, True
    return jax.tree.map(jnp.asarray, bank)

  def _sweep(
    self, bank: memory.MemoryBank, features: ImageFeatures, chunk: np.ndarray, run: np.ndarray,
    start: int, reverse: bool,
  ) -> tuple[memory.MemoryBank, HostCells]:
    """One call of the compiled sweep; a batch that is not full is filled up with idle slices."""
    idle = self._config.slices_per_batch - len(chunk)
    course = Course(*map(jnp.asarray, (
      np.pad(chunk, (0, idle), mode="edge").astype(np.int32), np.pad(run, ((0, 0), (0, idle))),
      np.full(len(run), start, np.int32), np.int32(self._depth), np.bool_(reverse),
    )))
    bank, cells = _sweep(self._model, self._params, bank, features, course, self._how)
    return bank, jax.tree.map(lambda x: np.swapaxes(np.asarray(x)[: len(chunk)], 0, 1), cells)
