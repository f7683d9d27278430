"""Batches for training, by grain: patches for the generator, runs of slices for the refiner.

In: prepared cases (data.preprocessing) and, for the refiner, the generator's stored mask logits.
Out: grain iterators of dictionaries of numpy arrays, which training.loop puts on the devices.

Sample number i is a pure function of (seed, i): which case, where, how transformed. An iterator
can therefore start at any batch, `get_state` and `set_state` are exact, prefetching and the number
of threads change nothing, and n processes together see the batches that one process would see.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
from absl import flags

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.augmentation import (
  AugmentationConfig,
  augment_intensity,
  draw_affine,
  is_anisotropic,
  on_grid,
  sample_patch,
  transform_slices,
)
from rfmedsam2_jax.data.datasets import IGNORED
from rfmedsam2_jax.data.loader import LoaderConfig
from rfmedsam2_jax.data.preprocessing import PreparedCase, load_case
from rfmedsam2_jax.data.prompt_mistakes import PromptCorruptionConfig, corrupt, logits_of_truth
from rfmedsam2_jax.data.sam_slices import as_rgb, resize_area, resize_linear, window_slices

_ENDLESS = 1 << 40  # samples of an iterator: more than any training takes
_OPEN_CASES = 200  # kept memory-mapped; each holds up to three of the process's file descriptors


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """What a sample of the refiner is."""

  image_size: int  # S, pixels of SAM's square; the mask grid is S / 4
  slices: int = 8  # consecutive slices of a run; memory and time grow with it
  structures: int = 2  # tracks of a run, at most as many as there are structures
  channels: tuple[int, ...] = (0,)  # the image channel that SAM sees, or three of them
  context: bool = False  # of one channel: the slices before, at and behind are its three colours
  oversample_foreground: float = 0.8  # share of runs that are sure to hold a structure


class _Cases:
  """Prepared cases in an order that is reshuffled every epoch, and the generator's logits of them.

  Args:
    folder: of prepared cases.
    identifiers: of those to draw from.
    seed: of the order and of all that is drawn for a sample.
    prompts: folder of the generator's mask logits, or None.
  """

  def __init__(self, folder: Path, identifiers: Sequence[str], seed: int, prompts: Path | None):
    if not identifiers:
      raise UserError(f"{folder}: no cases to draw from; the training part of the split is empty")
    self._arguments = (folder, tuple(identifiers), seed, prompts)
    self.folder, self.identifiers, self.seed, self.prompts = self._arguments
    self._open = functools.lru_cache(_OPEN_CASES)(self._load)

  def __reduce__(self):
    # Worker processes open the files for themselves.
    return _Cases, self._arguments

  def _load(self, identifier: str) -> tuple[PreparedCase, np.ndarray | None]:
    case = load_case(self.folder, identifier)
    if case.atoms is None:
      raise UserError(f"{self.folder}: case {identifier} has no label; train on labelled cases")
    if self.prompts is None:
      return case, None
    path = self.prompts / f"{identifier}.npy"
    try:
      return case, np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
      raise UserError(f"{path}: cannot be read ({error}); predict the prompts again") from None

  def draw(
    self, index: int, stream: int
  ) -> tuple[int, PreparedCase, np.ndarray | None, np.random.Generator]:
    """Number, case and prompts of sample `index`, and a random generator of its own."""
    epoch, position = divmod(index, len(self.identifiers))
    order = np.random.default_rng([self.seed, stream, 0, epoch])
    number = int(order.permutation(len(self.identifiers))[position])
    case, prompts = self._open(self.identifiers[number])
    return number, case, prompts, np.random.default_rng([self.seed, stream, 1, index])


def _is_oversampled(index: int, share: float) -> bool:
  """Spreads a share evenly over samples, so that also small batches get theirs."""
  return int((index + 1) * share) > int(index * share)


def _foreground(case: PreparedCase, rng: np.random.Generator) -> tuple[int, np.ndarray] | None:
  """A structure that the case has, drawn uniformly, and one of its voxels [3]; None if empty."""
  present = [k for k, voxels in enumerate(case.locations) if len(voxels)]
  if not present:
    return None
  structure = present[rng.integers(len(present))]
  voxels = case.locations[structure]
  return structure, np.asarray(voxels[rng.integers(len(voxels))])


class _Samples:
  """A random access source: `__getitem__` of what `sample` makes, some rows of every batch."""

  def __init__(self, sample, batch_size: int, rows: Sequence[int], start: int):
    self.sample, self.batch_size, self.rows, self.start = sample, batch_size, rows, start

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index):
    batch, row = divmod(int(index), len(self.rows))
    return self.sample((self.start + batch) * self.batch_size + self.rows[row])


def _batches(
  sample, batch_size: int, rows: Sequence[int] | None, start: int, loader: LoaderConfig
):
  rows = range(batch_size) if rows is None else [int(row) for row in rows]
  dataset = grain.MapDataset.source(_Samples(sample, batch_size, rows, start))
  dataset = dataset.batch(len(rows), drop_remainder=True)
  threads = 1 if loader.workers else loader.threads
  batches = dataset.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=loader.prefetch)
  )
  if loader.workers:
    # grain's worker processes read absl's flags, which only absl's own `app.run` parses.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=loader.workers))
  return iter(batches)


@dataclasses.dataclass(frozen=True)
class _PatchSample:
  cases: _Cases
  patch_size: tuple[int, int, int]
  augmentation: AugmentationConfig
  oversample_foreground: float

  def __call__(self, index: int) -> dict[str, np.ndarray]:
    number, case, _, rng = self.cases.draw(index, stream=0)
    assert case.atoms is not None
    shape, size = np.array(case.image.shape[1:]), np.array(self.patch_size)
    found = None
    if _is_oversampled(index, self.oversample_foreground):
      found = _foreground(case, rng)
    # The patch stays inside the volume, or the volume inside the patch.
    spare = np.maximum(shape - size, 0)
    if found is None:
      start = rng.integers(0, spare + 1)
    else:
      start = np.clip(found[1] - size // 2, 0, spare)
    start = np.where(shape < size, -((size - shape) // 2), start)
    centre = start + (size - 1) / 2
    flat = is_anisotropic(case.spacing)
    matrix = draw_affine(rng, self.augmentation, case.spacing, in_plane=flat)
    image = np.stack(
      [sample_patch(c, centre, self.patch_size, matrix, order=1, fill=0.0) for c in case.image]
    )
    image = augment_intensity(rng, image, self.augmentation, in_plane=flat)
    target = sample_patch(case.atoms, centre, self.patch_size, matrix, order=0, fill=0)
    image = np.ascontiguousarray(np.moveaxis(image, 0, -1))
    return {"image": image, "target": target, "case": np.array(number, np.int32)}


def generator_batches(
  folder: str | Path,
  identifiers: Sequence[str],
  patch_size: tuple[int, int, int],
  batch_size: int,
  augmentation: AugmentationConfig,
  seed: int,
  oversample_foreground: float = 0.33,
  rows: Sequence[int] | None = None,
  start: int = 0,
  loader: LoaderConfig | None = None,
):
  """Endless batches of 3D patches.

  Args:
    folder: of prepared cases (data.preprocessing.save_case).
    identifiers: of the cases to draw from; each comes once per epoch, reshuffled.
    patch_size: slices, rows, columns; smaller volumes are padded with 0 (the mean intensity).
    batch_size: of all processes together.
    augmentation: what is done to patches.
    seed: with the position it decides everything.
    oversample_foreground: share of patches that are centred on a voxel of some structure.
    rows: of every batch, those that this process makes; None: all.
    start: number of the first batch.
    loader: threads and prefetching.

  Returns:
    a grain iterator of {"image": float32 [B, D, H, W, C], "target": uint8 [B, D, H, W] atoms,
    255 where ignored, "case": int32 [B], positions in `identifiers`}, B the number of rows.
  """
  cases = _Cases(Path(folder), identifiers, seed, None)
  sample = _PatchSample(cases, patch_size, augmentation, oversample_foreground)
  return _batches(sample, batch_size, rows, start, loader or LoaderConfig())


@dataclasses.dataclass(frozen=True)
class _RunSample:
  cases: _Cases
  run: RunConfig
  membership: np.ndarray  # bool [A, K]
  augmentation: AugmentationConfig
  corruption: PromptCorruptionConfig

  def __call__(self, index: int) -> dict[str, np.ndarray]:
    number, case, prompts, rng = self.cases.draw(index, stream=1)
    assert case.atoms is not None
    depth, height, width = case.image.shape[1:]
    length, side = self.run.slices, self.run.image_size
    mask_side = side // 4

    found = None
    if _is_oversampled(index, self.run.oversample_foreground):
      found = _foreground(case, rng)
    first = int(rng.integers(max(depth - length, 0) + 1))
    if found is not None:
      # Anywhere in the run, so that runs also hold the structure's ends and what lies beyond.
      first = int(found[1][0]) - int(rng.integers(length))
      first = min(max(first, 0), max(depth - length, 0))
    beside = int(self.run.context)
    rows = np.arange(first - beside, first + length + beside)
    inside = rows < depth
    rows = np.clip(rows, 0, depth - 1)

    matrix = draw_affine(rng, self.augmentation, case.spacing, in_plane=True)
    if matrix is not None and matrix[0, 0] < 0:
      rows, inside = rows[::-1], inside[::-1]
    seen, run = rows, slice(beside, beside + length)
    rows, inside = rows[run], inside[run]

    if prompts is not None:
      expected = (self.membership.shape[1], depth, mask_side, mask_side)
      if prompts.shape != expected:
        raise UserError(
          f"{self.cases.prompts}: logits of case {case.identifier} have shape {prompts.shape}, "
          f"expected {expected}; they belong to another plan or image size, predict them again"
        )
    image = augment_intensity(
      rng, case.image[:, seen], self.augmentation, in_plane=is_anisotropic(case.spacing)
    )
    image = window_slices(image, case.window, self.run.channels)
    image = resize_linear(transform_slices(image, matrix, order=1, fill=0), side)
    if self.run.context:
      image = np.concatenate([image[:, :-2], image[:, 1:-1], image[:, 2:]])

    atoms = transform_slices(case.atoms[rows], matrix, order=0, fill=0)
    ignored = np.isin(atoms, IGNORED)
    truth = self.membership[np.where(ignored, 0, atoms)]  # [L, H, W, K]
    truth &= ~ignored[..., None]
    structures = self._structures(rng, truth, None if found is None else found[0])
    masks = resize_area(np.moveaxis(truth[..., structures], -1, 0), mask_side)
    known = np.broadcast_to(resize_area(~ignored, mask_side), masks.shape)

    on_masks = on_grid(matrix, (height, width), (mask_side, mask_side))
    logits = np.empty_like(masks)
    for track, structure in enumerate(structures):
      source = logits_of_truth(masks[track])
      if prompts is not None and rng.random() >= self.corruption.truth_probability:
        source = np.asarray(prompts[structure][rows], np.float32)
        source = transform_slices(source, on_masks, order=1, fill=-32.0)
      logits[track] = corrupt(rng, source, self.corruption)

    outside = ~inside
    image[:, outside] = 0
    masks[:, outside] = 0
    logits[:, outside] = -32.0
    return {
      "images": as_rgb(image),
      "masks": masks,
      "known": known * inside[:, None, None].astype(np.float32),
      "logits": logits,
      "inside": np.ascontiguousarray(inside),
      "depth": np.int32(depth),
      "structures": structures.astype(np.int32),
      "case": np.array(number, np.int32),
    }

  def _structures(
    self, rng: np.random.Generator, truth: np.ndarray, first: int | None
  ) -> np.ndarray:
    """Which structures become tracks: the one looked for, others of the run, then any."""
    present = np.atleast_1d(truth.any(axis=(0, 1, 2)))
    order = rng.permutation(truth.shape[-1])
    rank = np.where(present[order], 0, 1)
    if first is not None:
      rank[order == first] = -1
    return order[np.argsort(rank, kind="stable")][: self.run.structures]


def refiner_batches(
  folder: str | Path,
  identifiers: Sequence[str],
  run: RunConfig,
  membership: np.ndarray,
  batch_size: int,
  augmentation: AugmentationConfig,
  corruption: PromptCorruptionConfig,
  seed: int,
  prompts: str | Path | None = None,
  rows: Sequence[int] | None = None,
  start: int = 0,
  loader: LoaderConfig | None = None,
):
  """Endless batches of runs of consecutive slices with prompts.

  Args:
    folder: of prepared cases.
    identifiers: of the cases to draw from.
    run: length, structures and size of a sample.
    membership: bool [A, K], which atoms belong to which structure (data.datasets).
    batch_size: runs per batch, of all processes together.
    augmentation: one in-plane transform for a whole run; mirroring along the slice axis (0)
      reverses the run.
    corruption: mistakes put into the stage-0 logits.
    seed: with the position it decides everything.
    prompts: folder of CASE.npy, float16 [K, D, 4G, 4G], the generator's mask logits; None takes
      the truth instead.
    rows: of every batch, those that this process makes; None: all.
    start: number of the first batch.
    loader: threads and prefetching.

  Returns:
    a grain iterator, with T = min(run.structures, K), L = run.slices and m = S / 4, of
      "images": float32 [B, L, S, S, 3] in [0, 1].
      "masks": float32 [B, T, L, m, m], occupancy by the truth.
      "known": float32 [B, T, L, m, m], occupancy by voxels that are not ignored.
      "logits": float32 [B, T, L, m, m], mask logits of stage 0 within +-32.
      "inside": bool [B, L], the slice lies in the volume.
      "depth": int32 [B], slices of the whole volume.
      "structures": int32 [B, T].
      "case": int32 [B], positions in `identifiers`.

  Raises:
    UserError: the image has no such channel (while iterating: prompts of another shape).
  """
  if len(run.channels) not in (1, 3):
    raise UserError(f"channels {run.channels}: SAM sees one channel or three; name one or three")
  if run.context and len(run.channels) != 1:
    raise UserError(f"channels {run.channels}: with context SAM sees one channel; name one")
  cases = _Cases(Path(folder), identifiers, seed, None if prompts is None else Path(prompts))
  sample = _RunSample(cases, run, np.asarray(membership, bool), augmentation, corruption)
  return _batches(sample, batch_size, rows, start, loader or LoaderConfig())
