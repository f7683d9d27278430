"""Preprocessing, generator by sliding window, prompts, stages of refinement, fusion by class.

In: a volume. Out: a label map on its own grid. Host memory stays bounded: logits of all classes
exist for a slab at a time; what is kept of the generator is float16 log-odds on its own grid, which
may be coarser than that of the slices.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from rfmedsam2_jax.base.constants import LOGIT_LIMIT
from rfmedsam2_jax.base.progress import Progress, Report, compiling, silent
from rfmedsam2_jax.data.cuts import Cut, around, bounds, whole
from rfmedsam2_jax.data.fingerprint import Fingerprint
from rfmedsam2_jax.data.plan import Plan
from rfmedsam2_jax.data.preprocessing import Prepared, prepare_atoms, preprocess
from rfmedsam2_jax.data.resampling import apply_separable, linear_matrix
from rfmedsam2_jax.data.sam_slices import as_rgb, resize_linear, window_slices, with_neighbours
from rfmedsam2_jax.data.volumes import Volume
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.nn.unet import UNet
from rfmedsam2_jax.parallel.spread import device_count, everywhere, spread
from rfmedsam2_jax.refinement import Fused, RefinementConfig, StageResult, blended, fuse
from rfmedsam2_jax.refinement.first_prompts import (
  GivenPrompt,
  generated,
  shadows,
  shown_by,
  truth_boxes,
  with_given,
  with_oracle,
)
from rfmedsam2_jax.refinement.prompts import VolumePrompts, stage0_logits
from rfmedsam2_jax.refinement.refine import refine_volume
from rfmedsam2_jax.segmentation.config import InferenceConfig
from rfmedsam2_jax.segmentation.sliding_window import predict_slabs

_CHUNK = 65536  # voxels per compiled call of the log-odds


@dataclasses.dataclass(frozen=True, eq=False)
class Segmenter:
  """All that prediction needs of one run.

  sam_channels, sam_context: what SAM 2 sees in its three colours, see config.DataConfig.
  name: of the run's folder. fingerprint: of the cases that were trained on, if it is known.
  fast: the plan's slices lie twice as far apart as those that were trained on, see `faster`.
  """

  plan: Plan
  unet: UNet
  generator: Params
  sam2: SAM2
  refiner: Params | None  # of `sam2`; None for the generator alone
  refinement: RefinementConfig
  inference: InferenceConfig = InferenceConfig()
  sam_channels: tuple[int, ...] = (0,)
  sam_context: bool = False
  name: str = ""
  fingerprint: Fingerprint | None = None
  fast: bool = False

  def faster(self) -> "Segmenter":
    """At half the resolution across slices: volumes are prepared with half as many.

    So the generator has half of the windows and the stages half of the slices; a generator that
    sees slices as far apart already stays as it is. Rows and columns stay as they were: on voxels
    twice as large a generator of one scale loses what it knows.
    """
    if self.fast:
      return self
    apart, rows, columns = self.plan.spacing
    plan = dataclasses.replace(self.plan, spacing=(2 * apart, rows, columns))
    if seen := self.plan.generator_spacing:  # slices that lie as far apart already stay
      seen = max(2 * apart, seen[0]), *seen[1:]
      plan = dataclasses.replace(plan, generator_spacing=seen)
    return dataclasses.replace(self, plan=plan, fast=True)

  @property
  def stages(self) -> int:
    """Number of label maps that a prediction has: the generator's and one per stage."""
    return 1 + (len(self.refinement.stages) if self.refiner is not None else 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
  """What the generator says of a prepared volume."""

  log_odds: np.ndarray  # float16 [K, d, h, w], on the generator's grid
  cuts: tuple[Cut, ...]  # what the stages see of the slices, for each structure
  prompts: VolumePrompts  # for the first stage, in these


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation:
  """A segmented volume; label maps are made from it by `label_map`."""

  segmenter: Segmenter
  prepared: Prepared
  generated: Generated
  results: list[StageResult]

  def probability(self, stage: int, organ: int) -> np.ndarray:
    """Foreground probability of one organ after a stage (0: generator), float32 [z, y, x]."""
    made, result = self.generated, self.results[stage - 1] if stage else None
    log_odds = _on_slices(made.log_odds[organ], self.prepared.image.shape[1:])
    probability = blended(log_odds, made.prompts.logits[organ], result, organ,
                          self.segmenter.refinement, _resize_plane, made.cuts[organ])
    return self.prepared.restore.to_native(probability, fill=0.0)


def segment_volume(
  segmenter: Segmenter, volume: Volume, truth_atoms: np.ndarray | None = None,
  by_hand: Callable[[Prepared], list[GivenPrompt]] | None = None,
  progress: Report = silent,
) -> Segmentation:
  """Segments one volume.

  Args:
    truth_atoms: uint8 [z, y, x] on the native canonical grid: prompts come from it (oracle).
    by_hand: gives a person's prompts on the prepared grid.
  """
  prepared, seen = prepare(volume, segmenter.plan)
  log_odds = run_generator(segmenter, prepared, progress, seen)
  if segmenter.refiner is None:
    return Segmentation(segmenter, prepared, first_prompts(segmenter, prepared, log_odds), [])
  labels = segmenter.plan.labels
  given = by_hand(prepared) if by_hand is not None else []
  shown = shown_by(given, len(labels.structures), prepared.image.shape[2:])
  atoms = None
  if truth_atoms is not None:
    atoms = prepare_atoms(truth_atoms, segmenter.plan, prepared.restore)
    shown |= shadows(atoms, labels)
  made = first_prompts(segmenter, prepared, log_odds, shown)
  side, prompts = segmenter.sam2.config.image_size, made.prompts
  if atoms is not None:
    prompts = with_oracle(prompts, *truth_boxes(atoms, labels, made.cuts, side), side)
  if given:
    prompts = with_given(prompts, given, made.cuts, side, side // 4, resize_linear)
  results = refine(segmenter, prepared, made.cuts, prompts, progress)
  return Segmentation(segmenter, prepared, made, results)


def refine(
  segmenter: Segmenter, prepared: Prepared, cuts: Sequence[Cut], prompts: VolumePrompts,
  progress: Report = silent,
) -> list[StageResult]:
  """The stages over a prepared volume, from prompts in the cut of each structure."""
  assert segmenter.refiner is not None
  views = list(dict.fromkeys(cuts))
  return refine_volume(
    segmenter.sam2, segmenter.refiner, segmenter.refinement,
    functools.partial(sam_slices, segmenter, prepared, views), prompts, progress,
    [views.index(cut) for cut in cuts])


def prepare(volume: Volume, plan: Plan) -> tuple[Prepared, Prepared]:
  """A volume as the stages see it and as the generator does, of one field of view."""
  prepared = preprocess(volume, plan)
  return prepared, prepared if plan.generator_spacing is None else preprocess(
    volume, plan.of_generator)


def run_generator(
  segmenter: Segmenter, prepared: Prepared, report: Report = silent, seen: Prepared | None = None
) -> np.ndarray:
  """The generator's log-odds of every structure, float16 [K, d, h, w] on its own grid.

  seen: the prepared volume as the generator sees it; None where that is `prepared`, too.
  """
  plan, config = segmenter.plan, segmenter.inference
  image = (seen or prepared).image
  log_odds = np.empty((len(plan.labels.structures), *image.shape[1:]), np.float16)
  batch = config.batch_size * device_count()
  program = segmenter.unet, plan.patch_size, batch
  new = compiling("the generator", _unet_forward, program, report)
  slabs = predict_slabs(
    functools.partial(_unet_forward, segmenter.unet, everywhere(segmenter.generator)),
    image, plan.patch_size, config.overlap, batch, config.mirror_axes,
    segmenter.unet.config.mirrored, Progress("generator, windows", report, new),
  )
  for where, slab in slabs:
    log_odds[:, where] = _log_odds(slab, plan.labels.regions)
  return log_odds


def first_prompts(
  segmenter: Segmenter, prepared: Prepared, log_odds: np.ndarray, shown: np.ndarray | None = None
) -> Generated:
  """The first stage's prompts from what the generator says, in the cut of each structure.

  shown: bool [K, H, W], what cuts have to hold beside what the generator found.
  """
  config, sam2 = segmenter.refinement, segmenter.sam2.config
  shape, side = prepared.image.shape[1:], 4 * sam2.grid
  logits = np.empty((len(log_odds), shape[0], side, side), np.float16)
  cuts = []
  for organ, mine in enumerate(log_odds):
    fine = _on_slices(mine, shape)
    cut = whole(shape[1:])
    if config.zoom:
      found = [np.asarray((fine > 0).any(axis=0))]
      place = bounds(found if shown is None else [*found, shown[organ]])
      if place is not None:
        cut = around(*place, config.zoom, np.array(prepared.spacing[1:]), shape[1:])
    seen = resize_linear(cut.of(fine, -LOGIT_LIMIT), side)
    logits[organ] = np.clip(seen, -LOGIT_LIMIT, LOGIT_LIMIT)
    cuts.append(cut)
  return Generated(log_odds, tuple(cuts), generated(logits, sam2.image_size, config.box_margin))


def sam_slices(
  segmenter: Segmenter, prepared: Prepared, views: Sequence[Cut], numbers: np.ndarray
) -> np.ndarray:
  """Slices [n] of a prepared volume as SAM 2 sees them, float32 [n, S, S, 3] in [0, 1].

  numbers: slice z in the cut v has v D + z.
  """
  view, slices = np.divmod(numbers, prepared.image.shape[1])
  seen = np.empty((len(numbers), *2 * [segmenter.sam2.config.image_size], 3), np.float32)
  for v in np.unique(view).tolist():
    seen[view == v] = _slices_of_cut(segmenter, prepared, views[v], slices[view == v])
  return seen


def _slices_of_cut(
  segmenter: Segmenter, prepared: Prepared, cut: Cut, slices: np.ndarray
) -> np.ndarray:
  if segmenter.sam_context:
    slices = with_neighbours(slices, prepared.image.shape[1])
  # What lies beyond the slices is as dark as the window's lower end.
  image = cut.of(prepared.image[:, slices], -np.inf)
  windowed = window_slices(image, prepared.window, segmenter.sam_channels)
  resized = resize_linear(windowed, segmenter.sam2.config.image_size)
  return as_rgb(resized[0] if segmenter.sam_context else resized)


def label_maps(segmentations: Sequence[Segmentation]) -> list[np.ndarray]:
  """The label map of every stage, generator first; see `label_map`."""
  return [label_map(segmentations, stage) for stage in range(segmentations[0].segmenter.stages)]


def label_map(segmentations: Sequence[Segmentation], stage: int) -> np.ndarray:
  """Mean label map after a stage (0: generator), uint8 or uint16 [z, y, x] on the native grid."""
  return fused(segmentations, stage).labels


def fused(
  segmentations: Sequence[Segmentation], stage: int,
  watch: Callable[[int, np.ndarray], None] = lambda organ, probability: None,
) -> Fused:
  """As `label_map`, with the winning probability; `watch` takes every organ's own, see `fuse`."""
  first = segmentations[0].segmenter
  labels, refinement = first.plan.labels, first.refinement
  return fuse(
    [functools.partial(found.probability, stage) for found in segmentations],
    labels.output_values, segmentations[0].prepared.restore.native_shape,
    threshold=refinement.threshold, exclusive=stage == 0 or refinement.background == "rest",
    regions=labels.regions, watch=watch,
  )


def _apply_unet(unet: UNet, params: Params, patches: jax.Array) -> Any:
  return unet.apply({"params": params}, patches)


_unet_forward = spread(_apply_unet, static=[0], whole=[1])


@functools.partial(jax.jit, static_argnums=1)
def _log_odds_chunk(logits: jax.Array, regions: bool) -> jax.Array:
  return stage0_logits(logits, regions).T


def _log_odds(slab: np.ndarray, regions: bool) -> np.ndarray:
  """float32 [K, d, H, W] of logits [d, H, W, K'], in chunks of one compiled size."""
  flat = slab.reshape(-1, slab.shape[-1])
  parts = []
  for first in range(0, len(flat), _CHUNK):
    chunk = flat[first : first + _CHUNK]
    filled = np.pad(chunk, [(0, _CHUNK - len(chunk)), (0, 0)])
    parts.append(np.asarray(_log_odds_chunk(jnp.asarray(filled), regions))[:, : len(chunk)])
  return np.concatenate(parts, axis=1).reshape(-1, *slab.shape[:-1])


def _resize_plane(masks: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Linear resize of [n, h, w] to [n, H, W]."""
  pairs = zip(masks.shape[1:], shape, strict=True)
  return apply_separable(masks, [linear_matrix(before, after) for before, after in pairs])


def _on_slices(log_odds: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Log-odds of the generator's grid [d, h, w] for `shape`, that of the slices; or as they are.

  Probabilities are interpolated: between a voxel that is sure of the background and one that is
  less sure of the organ, log-odds would move the border into the organ.
  """
  if log_odds.shape == shape:
    return log_odds
  matrices = [None if before == after else linear_matrix(before, after)
              for before, after in zip(log_odds.shape, shape, strict=True)]
  # Both sides for themselves, because 1 - p has no digits where p is almost 1.
  inside, outside = (apply_separable(expit(sign * log_odds.astype(np.float32)), matrices)
                     for sign in (1, -1))
  return np.log(inside) - np.log(outside)
