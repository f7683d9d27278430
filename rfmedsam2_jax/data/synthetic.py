"""An endless stream of synthetic runs of slices with objects to prompt, to train the tracker on.

Run i of a seed is a function of (config, seed, i) alone: nothing is read, written or kept, and the
number of workers changes nothing. Labels first, then intensities drawn for them, as in SynthSeg
(Billot et al., Medical Image Analysis 2023) and SynthMorph (Hoffmann et al., TMI 2022): what is
learned from it cannot depend on one scanner or one organ.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from rfmedsam2_jax.base.ranges import STRICT, Share
from rfmedsam2_jax.data.sam_slices import resize_linear
from rfmedsam2_jax.data.synthetic_bodies import body, neighbours, tissues
from rfmedsam2_jax.data.synthetic_fields import fields
from rfmedsam2_jax.data.synthetic_scanner import Modality, Palette, acquire
from rfmedsam2_jax.data.synthetic_scene import Scene
from rfmedsam2_jax.data.synthetic_shapes import Space, log_uniform

_STREAM = 2  # of a seed; data.pipeline has 0 and 1
_LEAST = 12  # pixels of an object on its largest slice
# How often candidates are drawn, others once. Rarer is what has the box of something more likely
# and what hardly looks like an object.
_WEIGHTS = {"region": 0.1, "wall": 0.3, "cortex": 0.3, "white": 0.5, "tree": 0.5, "islands": 0.5,
            "sheet": 0.4, "cluster": 0.4, "canal": 0.5}
_FOCUS = 3.0  # times as often what belongs to the organ that the picture is made around
_ATTEMPTS = 8  # at a run with an object in sight; nearly all succeed at once
_FIELDS = 0.4  # share of runs of shapes of no family
_NO_ORDER = 0.12  # share of runs whose tissues may have any intensity


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
  __pydantic_config__ = STRICT

  ct: Share = 0.5  # of the runs with an order of tissues; the others are like MRI
  plain: Share = 0.0
  # Share of runs of plain tissues that differ clearly from what is around them: on these a network
  # from scratch learns to look at the picture several times sooner.
  cut: Share = 0.75  # share of runs that show one object large, as tracking cuts around a prompt


class SyntheticRun(NamedTuple):
  """Consecutive slices of a volume, and what may be prompted in them.

  Attributes:
    images: float32 [L, S, S] in [0, 1].
    objects: bool [T, L, S, S], which may touch, nest or share voxels; empty where there are fewer.
      The first is of the organ that the picture is made around, if that is in sight.
    kinds: the family of each object, "" where there are fewer.
  """

  images: np.ndarray
  objects: np.ndarray
  kinds: tuple[str, ...]


def synthetic_run(config: SyntheticConfig, seed: int, index: int, side: int, length: int = 8,
                  tracks: int = 3) -> SyntheticRun:
  """Run `index` of the stream `seed`: `length` slices of `side` pixels, up to `tracks` objects."""
  for attempt in range(_ATTEMPTS):
    rng = np.random.default_rng([seed, _STREAM, index, attempt])
    run = _attempt(rng, config, side, length, tracks)
    if run.objects[:1].any():
      break
  return run


def _attempt(rng: np.random.Generator, config: SyntheticConfig, side: int, length: int, tracks: int
             ) -> SyntheticRun:
  cut = rng.random() < config.cut
  space = _space(rng, cut, side, length)
  modality: Modality = "ct" if rng.random() < config.ct else "mr"
  if rng.random() < _NO_ORDER:
    modality = "any"
  if config.plain and rng.random() < config.plain:
    modality = "plain"
  scene = Scene(rng, space, Palette(rng, modality))
  reach = space.shape[0] * space.spacing[0] / 2
  if cut:
    radius, place = rng.uniform(0.12, 0.42), rng.normal(0, 0.05, 2)
  else:
    radius, place = log_uniform(rng, 0.03, 0.35), rng.uniform(-0.25, 0.25, 2)
  centre = np.array([rng.uniform(-1, 1) * (reach + 0.5 * radius), *place])
  if rng.random() < _FIELDS:
    fields(scene)
    if rng.random() < 0.5:
      neighbours(scene, centre, radius)
    return _finished(rng, scene, side, tracks)
  if rng.random() < 0.65:
    # In the middle where all of the body is seen; else somewhere around the organ.
    size = radius / log_uniform(rng, 0.12, 0.6) if cut else rng.uniform(0.3, 0.48)
    away = (size * np.array([rng.normal(0, 0.3), *rng.uniform(-0.55, 0.55, 2)]) if cut
            else centre * (1, 0.9, 0.9))
    body(scene, centre - away, size)
  else:
    tissues(scene)
  neighbours(scene, centre, radius)
  return _finished(rng, scene, side, tracks)


def _finished(rng: np.random.Generator, scene: Scene, side: int, tracks: int) -> SyntheticRun:
  """The scanner's picture of a scene, and some of what may be asked for."""
  image = acquire(rng, scene.image, scene.palette)
  kinds, objects = _drawn(rng, scene, tracks)
  if rng.random() < 0.25:
    beyond = _beyond(rng, image)
    image[beyond], objects[:, *beyond] = 0, False
  return SyntheticRun(resize_linear(image, side), resize_linear(objects, side) > 0.5, kinds)


def _space(rng: np.random.Generator, cut: bool, side: int, length: int) -> Space:
  """A scanner's pixels and slices: coarse pixels where a small part of a volume is shown large."""
  least = min(40 if cut else 80, side)
  columns = side if rng.random() < 0.35 else round(log_uniform(rng, least, side))
  aspect = 1.0 if rng.random() < 0.5 else float(np.exp(rng.uniform(-0.35, 0.35)))
  rows = min(max(round(columns * aspect), 16), side)
  step = log_uniform(rng, 0.004, 0.09)
  # Planes that a slice is the mean of; one where it is no thicker than a pixel, or one of many.
  planes = int(np.searchsorted([1.5, 5.0], step * columns)) + 1 if rng.random() < 0.85 else 1
  shifts = np.zeros((length, 2))
  if rng.random() < 0.15:
    shifts = rng.normal(0, rng.uniform(0.002, 0.012), (length, 2))
  return Space(rng, (length * planes, rows, columns), planes,
               (step / planes, aspect / rows, 1 / columns), rng.uniform(0.005, 0.045),
               np.repeat(shifts, planes, axis=0))


def _drawn(rng: np.random.Generator, scene: Scene, tracks: int
           ) -> tuple[tuple[str, ...], np.ndarray]:
  """Names and masks [T, L, H, W] of some candidates, neither specks nor nearly everything."""
  depth, *plane = scene.owner.shape
  place = scene.owner + 256 * np.arange(depth)[:, None, None]
  counts = np.bincount(place.ravel(), minlength=256 * depth).reshape(depth, 256)
  usable = [c for c in scene.candidates
            if _LEAST <= counts[:, list(c.parts)].sum(axis=1).max() < 0.85 * plane[0] * plane[1]]
  boxes = ndimage.find_objects(scene.owner)
  weights = [_WEIGHTS.get(c.kind, 1.0) * (_FOCUS if c.focus else 1) * _by_size(
    [boxes[p - 1] for p in c.parts if 0 < p <= len(boxes)], plane) for c in usable]
  masks, kinds = np.zeros((tracks, *scene.owner.shape), bool), [""] * tracks
  for track in range(min(tracks, len(usable))):
    odds = np.array(weights)
    if track == 0 and any(c.focus for c in usable):
      odds = np.where([c.focus for c in usable], odds, 0)
    pick = int(rng.choice(len(usable), p=odds / odds.sum()))
    masks[track] = np.isin(np.arange(256), usable[pick].parts)[scene.owner]
    kinds[track], weights[pick] = usable[pick].kind, 0.0
  return tuple(kinds), masks


def _by_size(boxes: list, plane: list[int]) -> float:
  """How often an object is drawn, by the larger side of its box as a share of the picture's."""
  boxes = [b for b in boxes if b is not None]
  if not boxes:
    return 1.0
  share = max((max(b[a].stop for b in boxes) - min(b[a].start for b in boxes)) / plane[a - 1]
              for a in (1, 2))
  return float(np.interp(share, [0.05, 0.12, 0.25, 0.7, 0.85, 1.0], [0.05, 0.2, 1, 1, 0.5, 0.2]))


def _beyond(rng: np.random.Generator, image: np.ndarray) -> tuple[slice, ...]:
  """A border strip of slices [L, H, W] that lies outside of the volume."""
  axis = int(rng.integers(1, 3))
  width = int(image.shape[axis] * rng.uniform(0.05, 0.3))
  strip = slice(0, width) if rng.random() < 0.5 else slice(image.shape[axis] - width, None)
  return (slice(None), strip) if axis == 1 else (slice(None), slice(None), strip)
