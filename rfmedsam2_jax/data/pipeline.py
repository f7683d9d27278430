"""Batches for training, by grain: patches for the generator, runs of slices for the refiner.

Sample i is a pure function of (seed, i). So an iterator can start at any batch, `get_state` and
`set_state` are exact, prefetching and threads change nothing, and n processes together see the
batches that one process would see.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2_jax.base.constants import LOGIT_LIMIT
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data import augmentation as augment
from rfmedsam2_jax.data.augmentation import AugmentationConfig, is_anisotropic, transform_slices
from rfmedsam2_jax.data.cuts import Cut
from rfmedsam2_jax.data.datasets import IGNORED
from rfmedsam2_jax.data.loader import LoaderConfig
from rfmedsam2_jax.data.plan import Triple
from rfmedsam2_jax.data.preprocessing import PreparedCase, load_case, open_array
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
  cuts: bool = False  # a run shows the cut of its one structure, in which its prompts lie


@dataclasses.dataclass(frozen=True)
class BatchConfig:
  """Which batches an iterator gives, and how it makes them."""

  size: int  # samples, of all processes together
  rows: Sequence[int] | None = None  # of every batch, those that this process makes; None: all
  start: int = 0  # number of the first batch
  loader: LoaderConfig = LoaderConfig()


class Cases:
  """Cases of `preprocessing.save_case`, each once per epoch, in an order drawn for every epoch.

  `seed` is of the order and of all that is drawn for a sample; `prompts` a folder of CASE.npy,
  float16 [K, D, 4G, 4G], the generator's mask logits, or None. Where these lie in cuts, the folder
  has cuts/CASE.npy, int [K, 4] (data.cuts.Cut).
  """

  def __init__(self, folder: str | Path, identifiers: Sequence[str], seed: int,
               prompts: str | Path | None = None):
    if not identifiers:
      raise UserError(f"{folder}: no cases to draw from; the training part of the split is empty")
    self.folder, self.identifiers, self.seed = Path(folder), tuple(identifiers), seed
    self.prompts = None if prompts is None else Path(prompts)
    self._open = functools.lru_cache(_OPEN_CASES)(self._load)
    self._cuts = functools.lru_cache(_OPEN_CASES)(self._load_cuts)

  def __reduce__(self):
    # Worker processes open the files for themselves.
    return Cases, (self.folder, self.identifiers, self.seed, self.prompts)

  def _load(self, identifier: str) -> tuple[PreparedCase, np.ndarray | None]:
    case = load_case(self.folder, identifier)
    if case.atoms is None:
      raise UserError(f"{self.folder}: case {identifier} has no label; train on labelled cases")
    if self.prompts is None:
      return case, None
    return case, open_array(self.prompts / f"{identifier}.npy", "r", "predict the prompts again")

  def _load_cuts(self, identifier: str) -> list[Cut]:
    assert self.prompts is not None
    path = self.prompts / "cuts" / f"{identifier}.npy"
    return [Cut(*cut) for cut in open_array(path, None, "predict the prompts again").tolist()]

  def cut(self, number: int, structure: int) -> Cut:
    """In which the prompts of a structure of case `number` lie."""
    return self._cuts(self.identifiers[number])[structure]

  def draw(self, index: int, stream: int
           ) -> tuple[int, PreparedCase, np.ndarray | None, np.random.Generator]:
    """Number, case and prompts of sample `index`, and a random generator of its own."""
    epoch, position = divmod(index, len(self.identifiers))
    order = np.random.default_rng([self.seed, stream, 0, epoch])
    number = int(order.permutation(len(self.identifiers))[position])
    case, prompts = self._open(self.identifiers[number])
    return number, case, prompts, np.random.default_rng([self.seed, stream, 1, index])


def foreground(case: PreparedCase, rng: np.random.Generator, index: int, share: float
               ) -> tuple[int, np.ndarray] | None:
  """A structure that the case has, drawn uniformly, and one of its voxels [3]; None if empty.

  None for samples outside the share, which is spread evenly so that small batches get theirs too.
  """
  present = [k for k, voxels in enumerate(case.locations) if len(voxels)]
  if int((index + 1) * share) == int(index * share) or not present:
    return None
  structure = present[rng.integers(len(present))]
  voxels = case.locations[structure]
  return structure, np.asarray(voxels[rng.integers(len(voxels))])


def _row(sample: Callable[[int], Any], batches: BatchConfig, rows: Sequence[int], index: int):
  """The sample that is number `index` of those that this process makes."""
  batch, row = divmod(index, len(rows))
  return sample((batches.start + batch) * batches.size + int(rows[row]))


def batches_of(sample: Callable[[int], Any], batches: BatchConfig):
  """A grain iterator over endless batches of `sample(0)`, `sample(1)` and so on."""
  import grain  # takes a second, and prediction does without

  rows = range(batches.size) if batches.rows is None else batches.rows
  samples = grain.MapDataset.range(_ENDLESS).map(functools.partial(_row, sample, batches, rows))
  loader = batches.loader
  dataset = samples.batch(len(rows), drop_remainder=True).to_iter_dataset(grain.ReadOptions(
    num_threads=1 if loader.workers else loader.threads, prefetch_buffer_size=loader.prefetch))
  if loader.workers:
    from absl import flags

    # grain's worker processes read absl's flags, which only absl's own `app.run` parses.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=loader.workers))
  return iter(dataset)


@dataclasses.dataclass(frozen=True)
class _PatchSample:
  cases: Cases
  patch_size: Triple
  augmentation: AugmentationConfig
  oversample_foreground: float

  def __call__(self, index: int) -> dict[str, np.ndarray]:
    number, case, _, rng = self.cases.draw(index, stream=0)
    assert case.atoms is not None
    shape, size = np.array(case.image.shape[1:]), np.array(self.patch_size)
    found = foreground(case, rng, index, self.oversample_foreground)
    # The patch stays inside the volume, or the volume inside the patch.
    spare = np.maximum(shape - size, 0)
    start = (rng.integers(0, spare + 1) if found is None
             else np.clip(found[1] - size // 2, 0, spare))
    centre = np.where(shape < size, -((size - shape) // 2), start) + (size - 1) / 2
    flat = is_anisotropic(case.spacing)
    matrix = augment.draw_affine(rng, self.augmentation, case.spacing, flat)
    sample = functools.partial(
      augment.sample_patch, centre=centre, size=self.patch_size, matrix=matrix, fill=0)
    image = np.stack([sample(channel, order=1) for channel in case.image])
    image = augment.augment_intensity(rng, image, self.augmentation, flat)
    return {"image": np.ascontiguousarray(np.moveaxis(image, 0, -1)),
            "target": sample(case.atoms, order=0), "case": np.array(number, np.int32)}


def generator_batches(cases: Cases, patch_size: Triple, augmentation: AugmentationConfig,
                      oversample_foreground: float, batches: BatchConfig):
  """Endless batches of 3D patches.

  A grain iterator of {"image": float32 [B, D, H, W, C], "target": uint8 [B, D, H, W] atoms, 255
  where ignored, "case": int32 [B], positions in `identifiers`}, B the number of rows.

  `patch_size` is slices, rows, columns; smaller volumes are padded with 0 (the mean intensity).
  `oversample_foreground` is the share of patches that are centred on a voxel of some structure.
  """
  return batches_of(_PatchSample(cases, patch_size, augmentation, oversample_foreground), batches)


def seen_image(
  rng: np.random.Generator, run: RunConfig, augmentation: AugmentationConfig, case: PreparedCase,
  rows: np.ndarray, view: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
  """What SAM sees of slices, float32 [1 or 3, L, S, S].

  rows: with `context` the slices before and behind the run, too.
  view: turns windowed slices [..., H, W] and takes a part of them.
  """
  flat = is_anisotropic(case.spacing)
  image = augment.augment_intensity(rng, case.image[:, rows], augmentation, flat)
  image = window_slices(image, case.window, run.channels)
  image = resize_linear(view(image), run.image_size)
  if run.context:
    image = np.concatenate([image[:, :-2], image[:, 1:-1], image[:, 2:]])
  return image


@dataclasses.dataclass(frozen=True)
class _RunSample:
  cases: Cases
  run: RunConfig
  membership: np.ndarray  # bool [A, K]
  augmentation: AugmentationConfig
  corruption: PromptCorruptionConfig

  def __call__(self, index: int) -> dict[str, np.ndarray]:
    number, case, prompts, rng = self.cases.draw(index, stream=1)
    depth, height, width = case.image.shape[1:]
    found = foreground(case, rng, index, self.run.oversample_foreground)
    seen = self._seen(rng, depth, found)
    matrix = augment.draw_affine(rng, self.augmentation, case.spacing, in_plane=True)
    if matrix is not None and matrix[0, 0] < 0:
      seen = seen[::-1]
    rows = seen[1:-1] if self.run.context else seen
    inside = rows < depth
    rows = np.clip(rows, 0, depth - 1)
    first = None if found is None else found[0]
    assert case.atoms is not None
    atoms, structures, cut = case.atoms[rows], None, None
    if self.run.cuts:  # the structure decides what is seen
      structures = self._structures(rng, self._truth(atoms)[0], first)
      cut = self.cases.cut(number, int(structures[0]))
    turned = functools.partial(transform_slices, matrix=matrix, cut=cut)
    image = seen_image(rng, self.run, self.augmentation, case, np.clip(seen, 0, depth - 1),
                       functools.partial(turned, order=1, fill=0))
    truth, annotated = self._truth(turned(atoms, order=0, fill=0))
    if structures is None:
      structures = self._structures(rng, truth, first)
    side = self.run.image_size // 4
    masks = resize_area(np.moveaxis(truth[..., structures], -1, 0), side)
    known = np.broadcast_to(resize_area(annotated, side), masks.shape)
    # Of the truth as it is: on the grid of masks thin structures fill no pixel by half.
    present = np.asarray(truth.any(axis=(1, 2))).T[structures] & inside
    absent = ~present & annotated.all(axis=(1, 2)) & inside
    expected = (truth.shape[-1], depth, side, side)
    if prompts is not None and prompts.shape != expected:
      raise UserError(
        f"{self.cases.prompts}: logits of case {case.identifier} have shape {prompts.shape}, "
        f"expected {expected}; they belong to another plan or image size, predict them again")
    matrix = augment.on_grid(matrix, cut.shape if cut else (height, width), (side, side))
    logits = np.stack([
      self._logits(rng, mask, None if prompts is None else prompts[structure], rows, matrix)
      for structure, mask in zip(structures, masks, strict=True)])
    image[:, ~inside] = 0
    masks[:, ~inside] = 0
    logits[:, ~inside] = -LOGIT_LIMIT
    return {
      "images": as_rgb(image), "masks": masks, "logits": logits,
      "known": known * inside[:, None, None].astype(np.float32),
      "present": present, "absent": absent,
      "inside": np.ascontiguousarray(inside), "depth": np.int32(depth),
      "structures": structures.astype(np.int32), "case": np.array(number, np.int32)}

  def _truth(self, atoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where structures are, bool [..., K], and where that is known, bool [...]."""
    annotated: np.ndarray = ~np.isin(atoms, IGNORED)
    return self.membership[np.where(annotated, atoms, 0)] & annotated[..., None], annotated

  def _seen(self, rng: np.random.Generator, depth: int, found: tuple[int, np.ndarray] | None
            ) -> np.ndarray:
    """Numbers of the run's slices and of those beside it; the volume may end before."""
    length, last = self.run.slices, max(depth - self.run.slices, 0)
    first = int(rng.integers(last + 1))
    if found is not None:
      # Anywhere in the run, so that runs also hold the structure's ends and what lies beyond.
      first = min(max(int(found[1][0]) - int(rng.integers(length)), 0), last)
    beside = int(self.run.context)
    return np.arange(first - beside, first + length + beside)

  def _structures(self, rng: np.random.Generator, truth: np.ndarray, first: int | None
                  ) -> np.ndarray:
    """Which structures become tracks: the one looked for, others of the run, then any."""
    order = rng.permutation(truth.shape[-1])
    rank = np.where(np.asarray(truth.any(axis=(0, 1, 2)))[order], 0, 1)
    if first is not None:
      rank[order == first] = -1
    return order[np.argsort(rank, kind="stable")][: self.run.structures]

  def _logits(self, rng: np.random.Generator, mask: np.ndarray, stored: np.ndarray | None,
              rows: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Mask logits of one track [L, m, m]: the generator's or the truth's, with mistakes."""
    source = logits_of_truth(mask)
    if stored is not None and rng.random() >= self.corruption.truth_probability:
      source = np.asarray(stored[rows], np.float32)
      source = transform_slices(source, matrix, order=1, fill=-LOGIT_LIMIT)
    return corrupt(rng, source, self.corruption)


def refiner_batches(cases: Cases, run: RunConfig, membership: np.ndarray,
                    augmentation: AugmentationConfig, corruption: PromptCorruptionConfig,
                    batches: BatchConfig):
  """Endless batches of runs of consecutive slices with prompts.

  Without a folder of prompts, these come from the truth. A run has one in-plane transform, and
  mirroring along the slice axis (0) reverses it. UserError: the image has no such channel (while
  iterating: prompts of another shape).

  `membership` is bool [A, K], which atoms belong to which structure (data.datasets).

  Returns:
    a grain iterator, with T = min(run.structures, K), L = run.slices and m = S / 4, of
      "images": float32 [B, L, S, S, 3] in [0, 1].
      "masks", "known": float32 [B, T, L, m, m], occupancy by the truth, by voxels not ignored.
      "present": bool [B, T, L], the structure has a voxel on the slice.
      "absent": bool [B, T, L], it has none, and no voxel of the slice is ignored.
      "logits": float32 [B, T, L, m, m], mask logits of stage 0 within +-32, with mistakes.
      "inside": bool [B, L], the slice lies in the volume. "depth": int32 [B], its slices.
      "structures": int32 [B, T]. "case": int32 [B], positions in `identifiers`.
  """
  if len(run.channels) not in (1, 3):
    raise UserError(f"channels {run.channels}: SAM sees one channel or three; name one or three")
  if run.context and len(run.channels) != 1:
    raise UserError(f"channels {run.channels}: with context SAM sees one channel; name one")
  sample = _RunSample(cases, run, np.asarray(membership, bool), augmentation, corruption)
  return batches_of(sample, batches)
