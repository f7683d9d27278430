"""From a stage's masks to one label map, class by class, so that host memory stays bounded.

No array of all classes exists at full size in float32: what is kept is the best probability so far
and the label that has it. In: the generator's log-odds and `StageResult`s. Out: a label map.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from rfmedsam2_jax.data.cuts import Cut
from rfmedsam2_jax.refinement.config import RefinementConfig
from rfmedsam2_jax.refinement.refine import StageResult


class Fused(NamedTuple):
  """labels: uint8 or uint16 [D, H, W]. winning: float32 [D, H, W], the probability of the organ
  whose label a voxel has; without meaning on background."""

  labels: np.ndarray
  winning: np.ndarray


def blended(
  generator: np.ndarray, seen: np.ndarray, result: StageResult | None, organ: int,
  config: RefinementConfig, resize: Callable[[np.ndarray, tuple[int, int]], np.ndarray], cut: Cut,
) -> np.ndarray:
  """Probability of one organ on the prepared grid, float32 [D, H, W].

  Args:
    generator: [D, H, W], the generator's log-odds of this organ. They stand where no cell was run,
      and outside of the cut.
    seen: [D, 4G, 4G], the same as the first stage saw them.
    result: of a stage, or None for the generator alone.
    config: says how the generator counts where a cell was run.
    resize: linear resize of [n, h, w] to [n, H, W], half-pixel centres.
    cut: what the stages saw of the slices.
  """
  probability = expit(generator.astype(np.float32))
  if result is None or organ not in result.cells[:, 0]:
    return probability
  mine = result.cells[:, 0] == organ
  slices, logits = result.cells[mine, 1], result.logits[mine].astype(np.float32)
  if config.fusion == "masks":
    refined = resize(expit(logits), cut.shape)
  else:
    # What reaches a cell's last stage if none changes it has passed the limits of all up to there.
    limits = np.minimum.accumulate([stage.residual_limit for stage in config.stages])
    limit = limits.astype(np.float32)[result.stage[mine] - 1][:, None, None]
    own, before = (np.clip(x.astype(np.float32), -limit, limit)
                   for x in (cut.of(generator[slices]), seen[slices]))
    # Absence (-1024) still outweighs any vote for presence after this.
    change = np.maximum(logits, -2.5 * limit) - before
    refined = expit(own + resize(change, cut.shape))
  weight, mixed = config.generator_weight, probability[slices]
  cut.put(mixed, weight * cut.of(mixed) + (1 - weight) * refined)
  probability[slices] = mixed
  return probability


def fuse(
  sources: Sequence[Callable[[int], np.ndarray]], output_values: Sequence[int],
  shape: tuple[int, int, int], threshold: float = 0.5, exclusive: bool = False,
  regions: bool = False, watch: Callable[[int, np.ndarray], None] = lambda *_: None,
) -> Fused:
  """Label map from per-organ probabilities.

  Args:
    sources: one per run, gives an organ's foreground probability, float32 of `shape`; averaged.
    output_values: label of each organ. shape: D, H, W of the label map.
    threshold: a voxel with no organ above it is background.
    exclusive: background is what they leave of 1; the largest share wins even below the threshold.
    regions: may overlap; later ones are written over earlier ones (nnU-Net's regions_class_order).
    watch: takes every organ and its averaged probability, float32 [D, H, W], one after the other.
  """
  labels = np.zeros(shape, np.uint8 if max(output_values, default=0) < 256 else np.uint16)
  best = np.zeros(shape, np.float32)
  total = np.zeros(shape, np.float32) if exclusive and not regions else None
  for organ, value in enumerate(output_values):
    probability = sources[0](organ)
    for source in sources[1:]:
      probability = probability + source(organ)  # a source keeps what it gave
    if len(sources) > 1:
      probability = probability / np.float32(len(sources))
    watch(organ, probability)
    if regions:
      better = probability > threshold
    elif total is not None:
      total += probability
      better = probability > best
    else:
      better = probability > np.maximum(best, threshold)
    labels[better] = value
    np.copyto(best, probability, where=better)
  if total is not None:
    labels[best <= 1.0 - total] = 0
  return Fused(labels, best)
