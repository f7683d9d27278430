"""Batches for the training of the tracker: runs of slices with objects, of several sources mixed.

Objects have no class: structures of prepared cases or connected parts of them, whole or cut out
large, and those of the synthetic stream. As in data.pipeline, sample i is a pure function of the
seed and i, whatever the source.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data import augmentation as augment
from rfmedsam2_jax.data.augmentation import AugmentationConfig, transform_slices
from rfmedsam2_jax.data.cuts import Cut
from rfmedsam2_jax.data.datasets import IGNORED
from rfmedsam2_jax.data.pipeline import (
  BatchConfig,
  Cases,
  RunConfig,
  batches_of,
  foreground,
  seen_image,
)
from rfmedsam2_jax.data.sam_slices import as_rgb, resize_area, resize_linear

_STREAM = 3  # of a seed, of what is drawn here; data.pipeline and data.synthetic have 0 to 2
_LEAST, _MOST = 12, 0.85  # pixels of an object on its largest slice, and share of all of them
_PARTS = 0.5  # share of structures whose connected parts are objects of their own
_CUTS = 0.75  # share of runs that show one object large, as tracking cuts around a prompt
_CUT_SIZES = 1.4, 4.0  # side of a cut, in sides of the object's box
_CUT_STEP = 8  # pixels, so that few sizes have to be resized
# Making a synthetic run takes as long as a step of a small network. So as many as memory keeps are
# seen this often, each time around another object, before the next ones are made.
_VIEWS, _KEPT = 3, 64
_CANDIDATES = 6  # objects of a synthetic run of which one view shows some

Sample = Callable[[int], dict[str, np.ndarray]]


def _sample(image: np.ndarray, objects: np.ndarray, case: int) -> dict[str, np.ndarray]:
  has = np.array([mask.any() for mask in objects])
  return {"images": as_rgb(image), "objects": objects, "has": has, "case": np.array(case, np.int32)}


def _draw_cut(rng: np.random.Generator, mask: np.ndarray) -> Cut:
  """A square around an object, bool [L, H, W] with some voxel: one and a half to four times its
  box, off the box's centre by a quarter of what it has beside the object at most."""
  factor, shift = np.exp(rng.uniform(*np.log(_CUT_SIZES))), rng.uniform(-0.25, 0.25, 2)
  places = np.argwhere(mask.any(axis=0))
  low, high = places.min(axis=0), places.max(axis=0) + 1
  box = (high - low).max()
  side = int(np.ceil(factor * box / _CUT_STEP)) * _CUT_STEP
  row, column = np.round((low + high - side) / 2 + shift * (side - box)).astype(int)
  return Cut(int(row), int(column), side, side)


@dataclasses.dataclass(frozen=True)
class SyntheticRuns:
  """Runs of data.synthetic; with `run.context` the slices beside are colours, the ends repeated.

  Every run is seen three times, 64 runs apart: turned and mirrored anew, and around another object.
  """

  seed: int
  run: RunConfig
  plain: float = 0.0  # share, see SyntheticConfig

  def __call__(self, index: int) -> dict[str, np.ndarray]:
    run = self.run
    block, place = divmod(index, _VIEWS * _KEPT)
    view, number = divmod(place, _KEPT)
    rng = np.random.default_rng([self.seed, _STREAM, 3, index])
    turns, mirrored = int(rng.integers(4)), bool(rng.random() < 0.5)
    drawn = _synthetic(self.seed, block * _KEPT + number, self.plain, run.image_size, run.slices)
    images, objects = (_turned(x, turns, mirrored) for x in drawn)
    if len(objects):
      images, objects = self._view(rng, images, np.roll(objects, -view, axis=0))
    objects = np.concatenate([objects, np.zeros((run.structures, *images.shape), bool)])
    objects = objects[: run.structures]
    channels = images[None]
    if run.context:
      slices = np.arange(run.slices)
      channels = np.stack([images[np.clip(slices + step, 0, run.slices - 1)]
                           for step in (-1, 0, 1)])
    return _sample(channels, objects, 0)

  def _view(self, rng: np.random.Generator, images: np.ndarray, objects: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray]:
    """Images [L, S, S] and the first of objects [T, L, S, S] large, with some of the others."""
    side = self.run.image_size
    if rng.random() < _CUTS and (cut := _draw_cut(rng, objects[0])).height < side:
      images = resize_linear(cut.of(images), side)
      objects = resize_linear(cut.of(objects), side) > 0.5
    sizes = objects.sum(axis=(2, 3)).max(axis=1)
    return images, objects[(sizes >= _LEAST) & (sizes < _MOST * side**2)]


@functools.lru_cache(_KEPT)
def _synthetic(seed: int, index: int, plain: float, side: int, slices: int
               ) -> tuple[np.ndarray, np.ndarray]:
  """Images [L, S, S] of run `index` and the objects [T, L, S, S] that it has."""
  from rfmedsam2_jax.data.synthetic import SyntheticConfig, synthetic_run

  run = synthetic_run(SyntheticConfig(plain=plain), seed, index, side, slices, _CANDIDATES)
  return run.images, run.objects[run.objects.any(axis=(1, 2, 3))]


def _turned(slices: np.ndarray, turns: int, mirrored: bool) -> np.ndarray:
  """[..., S, S], turned by quarters and perhaps mirrored."""
  turned = np.rot90(slices, turns, axes=(-2, -1))
  return turned[..., ::-1] if mirrored else turned


@dataclasses.dataclass(frozen=True)
class CaseRuns:
  """Runs of prepared cases that begin or end on a slice with some structure.

  Runs with voxels that nobody has labelled have no objects: what is not the object is not known.
  """

  cases: Cases
  run: RunConfig
  membership: np.ndarray  # bool [A, K]
  augmentation: AugmentationConfig

  def __call__(self, index: int) -> dict[str, np.ndarray]:
    number, case, _, rng = self.cases.draw(index, stream=_STREAM)
    depth, length = case.image.shape[1], self.run.slices
    found = foreground(case, rng, index, 1.0)
    first = int(rng.integers(max(depth - length, 0) + 1))
    if found is not None:
      first = int(found[1][0]) - (0 if rng.random() < 0.5 else length - 1)
      first = min(max(first, 0), max(depth - length, 0))
    # A volume that ends before the run stands still on its last slice.
    rows = np.clip(np.arange(first, first + length), 0, depth - 1)
    matrix = augment.draw_affine(rng, self.augmentation, case.spacing, in_plane=True)
    assert case.atoms is not None
    atoms = transform_slices(case.atoms[rows], matrix, order=0, fill=0)
    known = not np.isin(atoms, IGNORED).any()
    truth = np.moveaxis(self.membership[np.where(np.isin(atoms, IGNORED), 0, atoms)], -1, 0)
    cut = self._cut(rng, truth, None if found is None else found[0])
    beside = int(self.run.context)
    seen = np.clip(np.arange(first - beside, first + length + beside), 0, depth - 1)
    image = seen_image(rng, self.run, self.augmentation, case, seen,
                       lambda x: cut(transform_slices(x, matrix, order=1, fill=0)))
    objects = np.zeros((self.run.structures, length, *2 * [self.run.image_size]), bool)
    if known:
      for slot, mask in enumerate(self._objects(rng, cut(truth), found)):
        objects[slot] = mask
    return _sample(image, objects, number)

  def _cut(self, rng: np.random.Generator, truth: np.ndarray, first: int | None
           ) -> Callable[[np.ndarray], np.ndarray]:
    """Takes a square around the object looked for from slices [..., H, W], or leaves them whole.

    What lies outside of the slices is 0."""
    if first is None or rng.random() >= _CUTS or not truth[first].any():
      return lambda slices: slices
    return _draw_cut(rng, truth[first]).of

  def _objects(self, rng: np.random.Generator, truth: np.ndarray,
               found: tuple[int, np.ndarray] | None) -> list[np.ndarray]:
    """Up to as many masks bool [L, S, S] as a run has tracks, the structure looked for first."""
    order = list(rng.permutation(len(truth)))
    if found is not None:
      order = [found[0], *(k for k in order if k != found[0])]
    masks: list[np.ndarray] = []
    for structure in order:
      if len(masks) >= self.run.structures:
        break
      if not truth[structure].any():
        continue
      mask = resize_area(truth[structure], self.run.image_size) > 0.5
      if rng.random() < _PARTS:
        labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
        sizes = ndimage.sum_labels(mask, labels, np.arange(1, count + 1))
        masks += [labels == 1 + part for part in np.argsort(-sizes)[: self.run.structures]]
      else:
        masks.append(mask)
    return [mask for mask in masks if mask.sum(axis=(1, 2)).max() >= _LEAST][: self.run.structures]


@dataclasses.dataclass(frozen=True)
class _Mixture:
  """Sample i is that of a source drawn by weight; "case" counts on from one source to the next."""

  samples: Sequence[Sample]
  shares: np.ndarray  # float64, sum 1
  offsets: Sequence[int]
  seed: int

  def __call__(self, index: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([self.seed, _STREAM, 2, index])
    source = int(rng.choice(len(self.samples), p=self.shares))
    sample = self.samples[source](index)
    return sample | {"case": sample["case"] + np.int32(self.offsets[source])}


def object_batches(sources: Sequence[tuple[Sample, float, int]], seed: int, batches: BatchConfig):
  """Endless batches of runs of slices with objects.

  sources: `SyntheticRuns` or `CaseRuns`, their weights, and how many cases each of them has.

  Returns:
    a grain iterator of "images": float32 [B, L, S, S, 3] in [0, 1]; "objects": bool [B, T, L, S,
    S]; "has": bool [B, T], objects that there are; "case": int32 [B], over all sources.
  """
  samples, weights, counts = zip(*sources, strict=True)
  shares = np.array(weights, np.float64)
  offsets = np.cumsum([0, *counts[:-1]]).tolist()
  return batches_of(_Mixture(samples, shares / shares.sum(), offsets, seed), batches)


def check_channels(run: RunConfig, channels: int, source: Any) -> None:
  """UserError unless images of a source have the channels that SAM sees."""
  if max(run.channels) >= channels:
    raise UserError(f"{source}: images have channels 0 to {channels - 1}, but data.sam_channels "
                    f"has {max(run.channels)}; leave this data set out or name another channel")
