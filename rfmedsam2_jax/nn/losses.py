"""Losses of the two training phases: pure functions of logits and truth, float32.

A loss has two halves. `generator_sums` and `refiner_sums` see some rows of a batch and give sums:
those of parts of a batch, on whatever devices and one after the other, add up to those of all of
it. `generator_loss` and `refiner_loss` make the loss of the batch from its sums. So a batch has one
loss and one gradient, however it is divided, also where cells count unevenly, and a Dice loss is
over the whole batch.

What must not count (ignored voxels, absent structures, dead cells) is a mask, and gives a zero
gradient, never NaN, whatever stands under it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from rfmedsam2_jax.base.ranges import STRICT, Share, Weight
from rfmedsam2_jax.nn.layers import Array

IGNORE = 255  # value of a voxel without a label in `target`


@dataclasses.dataclass(frozen=True)
class GeneratorLossConfig:
  """Loss of the prompt generator, nnU-Net's by default, which is what training takes."""

  dice: float = 1.0  # weight of the soft Dice loss
  cross_entropy: float = 1.0  # weight of the cross-entropy (binary where structures overlap)
  batch_dice: bool = True  # Dice over the batch's voxels together; steadier for small structures


@dataclasses.dataclass(frozen=True)
class RefinerLossConfig:
  """Loss of one refinement stage, SAM 2's fine-tuning weights by default."""

  __pydantic_config__ = STRICT

  focal: Weight = 20.0  # weight of the focal loss on mask logits; the Dice loss counts once
  iou: Weight = 1.0  # weight of the regression of the predicted IoU
  presence: Weight = 1.0  # weight of the cross-entropy of "the structure is on this slice"
  iou_form: Literal["l1", "mse"] = "l1"
  focal_alpha: Share = 0.25  # weight of foreground pixels; 1 - alpha that of background
  focal_gamma: Annotated[float, Field(ge=0, le=100)] = 2.0  # higher leaves out easy pixels more
  dice: ClassVar[float] = 1.0


def binary_cross_entropy(logits: Array, target: Array) -> Array:
  """Per element; `target` in [0, 1]. Finite for any finite logit, also -1024."""
  return jnp.maximum(logits, 0) - logits * target + jnp.log1p(jnp.exp(-jnp.abs(logits)))


class Mean(NamedTuple):
  """A weighted mean as its sums, float32 [] each: `total` of weight times value, and `weight`."""

  total: Array
  weight: Array

  @property
  def value(self) -> Array:
    """0 without any weight."""
    return self.total / jnp.maximum(self.weight, 1e-6)


def weighted(values: Array, mask: Array) -> Mean:
  """The mean of `values` where `mask` (broadcast to them) says, which may be in between, too."""
  mask = jnp.broadcast_to(mask, values.shape).astype(jnp.float32)
  return Mean((jnp.where(mask > 0, values, 0.0) * mask).sum(), mask.sum())


class Overlap(NamedTuple):
  """What soft Dice is made of, float32 [..., K]: sums over voxels of p t, and of p + t."""

  intersection: Array
  total: Array

  @property
  def dice(self) -> Array:
    """nnU-Net's form (smooth 1e-5), [..., K]."""
    return (2.0 * self.intersection + 1e-5) / (self.total + 1e-5)


def soft_overlap(p: Array, truth: Array, valid: Array, batch_dice: bool) -> Overlap | Mean:
  """The sums of the soft Dice loss: `Overlap` [K] of all rows together, or the `Mean` over rows.

  Probabilities and truth are [B, D, H, W, K], `valid` [B, D, H, W], 0 for ignored voxels.
  """
  voxels = (0, 1, 2, 3) if batch_dice else (1, 2, 3)
  weight = valid[..., None]
  sums = Overlap((p * truth * weight).sum(voxels),
                 (p * weight).sum(voxels) + (truth * weight).sum(voxels))
  return sums if batch_dice else weighted(1.0 - sums.dice, jnp.float32(1))


class SegmentationSums(NamedTuple):
  """Of one resolution, see `segmentation_loss`."""

  dice: Overlap | Mean
  cross_entropy: Mean


def segmentation_sums(
  logits: Array, target: Array, membership: Array, regions: bool,
  config: GeneratorLossConfig = GeneratorLossConfig(),
) -> SegmentationSums:
  """The sums of soft Dice and cross-entropy at one resolution.

  Args:
    logits: [B, D, H, W, K + 1] with background first (softmax); regions [B, D, H, W, K] (sigmoid).
    target: uint8 [B, D, H, W], atoms of the label map; 255 is ignored.
    membership: bool [A, K], which structures an atom belongs to (at most one unless regions).
  """
  logits = logits.astype(jnp.float32)
  valid = target != IGNORE
  atoms, valid = jnp.where(valid, target, 0).astype(jnp.int32), valid.astype(jnp.float32)
  member = jnp.asarray(membership, jnp.float32)
  if regions:
    truth, probability = member[atoms], jax.nn.sigmoid(logits)
    entropy = binary_cross_entropy(logits, truth).mean(-1)
  else:
    background = 1.0 - member.max(1, keepdims=True)
    one_hot = jnp.concatenate([background, member], 1)[atoms]
    log_probability = jax.nn.log_softmax(logits)
    entropy = -(one_hot * log_probability).sum(-1)
    # As in nnU-Net the background has no Dice term: it would only reward what is easy.
    probability, truth = jnp.exp(log_probability[..., 1:]), one_hot[..., 1:]
  overlap = soft_overlap(probability, truth, valid, config.batch_dice)
  return SegmentationSums(overlap, weighted(entropy, valid))


def segmentation_loss(
  sums: SegmentationSums, config: GeneratorLossConfig = GeneratorLossConfig()
) -> tuple[Array, dict[str, Array]]:
  """The weighted sum of 1 - mean soft Dice over channels and of the mean cross-entropy of voxels,
  and these two unweighted, "dice" and "cross_entropy"."""
  dice = sums.dice.value if isinstance(sums.dice, Mean) else 1.0 - sums.dice.dice.mean()
  parts = {"dice": dice, "cross_entropy": sums.cross_entropy.value}
  total = config.dice * parts["dice"] + config.cross_entropy * parts["cross_entropy"]
  return total, parts


def deep_supervision_weights(outputs: int) -> tuple[float, ...]:
  """nnU-Net's weights, full resolution first: halved per level, 0 for the lowest, sum 1."""
  weights = 0.5 ** np.arange(outputs)
  weights[1:][-1:] = 0
  return tuple((weights / weights.sum()).tolist())


def downsample_target(target: Array, shape: Sequence[int]) -> Array:
  """Nearest neighbour at pixel centres, [B, D, H, W] to [B, *shape]; sizes must divide."""
  for axis, size in enumerate(shape, start=1):
    step, rest = divmod(target.shape[axis], size)
    if rest:
      raise ValueError(f"target {target.shape[1:]} is not a multiple of {tuple(shape)}")
    target = jax.lax.slice_in_dim(target, step // 2, None, step, axis)
  return target


def generator_sums(
  logits: Sequence[Array], target: Array, membership: Array, regions: bool = False,
  config: GeneratorLossConfig = GeneratorLossConfig(),
) -> list[SegmentationSums]:
  """The sums of the prompt generator's deeply supervised loss, at every resolution that counts.

  `logits` are UNet's, full resolution first, and `target` has that too.
  """
  weights = deep_supervision_weights(len(logits))
  return [
    segmentation_sums(x, downsample_target(target, x.shape[1:4]), membership, regions, config)
    for weight, x in zip(weights, logits, strict=True) if weight]


def generator_loss(
  sums: Sequence[SegmentationSums], config: GeneratorLossConfig = GeneratorLossConfig()
) -> tuple[Array, dict[str, Array]]:
  """The deeply supervised loss, and its parts at full resolution, see `segmentation_loss`."""
  found = [segmentation_loss(x, config) for x in sums]
  weights = deep_supervision_weights(len(sums) + 1)[:-1]  # the lowest resolution is left out
  total = sum((w * loss for w, (loss, _) in zip(weights, found, strict=True)), jnp.float32(0))
  return total, found[0][1]


def focal_loss(
  logits: Array, target: Array, known: Array, alpha: float = 0.25, gamma: float = 2.0
) -> Array:
  """Sigmoid focal loss, mean over the known pixels of each mask, [..., H, W] to [...].

  On hard targets it is SAM 2's. On soft ones (occupancy of coarse pixels) the modulating factor is
  |target - p|^gamma, so that the target itself is the optimum (quality focal loss, 2006.04388).
  """
  p = jax.nn.sigmoid(logits)
  # Away from zero, where a power below one has no finite gradient; p does become 1.
  modulation = jnp.maximum(jnp.abs(target - p), 1e-6) ** gamma
  balance = alpha * target + (1 - alpha) * (1 - target)
  loss = binary_cross_entropy(logits, target) * modulation * balance * known
  return loss.sum((-2, -1)) / jnp.maximum(known.sum((-2, -1)), 1.0)


def mask_dice_loss(logits: Array, target: Array, known: Array) -> Array:
  """1 - Dice of each mask, [..., H, W] to [...], smoothed by 1 as in SAM 2.

  The overlap is |p| + |t| - |p - t|: 2 p t on hard targets, and least at p = t on soft ones, which
  2 p t is not (Dice semimetric loss, 2303.16296).
  """
  p, t = jax.nn.sigmoid(logits) * known, target * known
  total = p.sum((-2, -1)) + t.sum((-2, -1))
  overlap = total - jnp.abs(p - t).sum((-2, -1))
  return 1.0 - (overlap + 1.0) / (total + 1.0)


def mask_iou(logits: Array, target: Array, known: Array) -> Array:
  """IoU of logits > 0 and target > 0.5 over known pixels, [..., H, W] to [...]; 1 if both empty."""
  p, t = (logits > 0) & (known > 0.5), (target > 0.5) & (known > 0.5)
  union = (p | t).sum((-2, -1))
  return jnp.where(union > 0, (p & t).sum((-2, -1)) / jnp.maximum(union, 1), 1.0)


class CellTruth(NamedTuple):
  """What is true of cells; leading axes [...] are of any number. `masks`: [..., H, W], occupancy of
  the structure in [0, 1]. `known`: [..., H, W], share of the pixel that is labelled at all, in
  [0, 1]. `present`: bool [...], the structure has a voxel on the slice, be it smaller than a pixel
  of the mask: only then masks and IoU count."""

  masks: Array
  known: Array
  present: Array


def refiner_sums(
  mask_logits: Array, ious: Array, presence: Array, truth: CellTruth, live: Array,
  config: RefinerLossConfig = RefinerLossConfig(),
) -> dict[str, Mean]:
  """The sums of the loss of one refinement stage over cells [...], see `refiner_loss`.

  Args:
    mask_logits: [..., H, W], before the presence gate.
    ious, presence: [...], predicted IoU and logits.
    live: bool [...], the cell counts at all; anything, NaN included, may stand in the others.
  """
  # Replaced before any arithmetic: a mask after it would leave NaN in the gradient.
  live = jnp.asarray(live, bool)
  logits = jnp.where(live[..., None, None], mask_logits.astype(jnp.float32), 0.0)
  ious = jnp.where(live, ious.astype(jnp.float32), 0.0)
  presence = jnp.where(live, presence.astype(jnp.float32), 0.0)
  target, known = truth.masks.astype(jnp.float32), truth.known.astype(jnp.float32)
  shown = live & truth.present & (known.sum((-2, -1)) > 0)
  # A structure that fills no pixel by half has no mask that could be right.
  measured = shown & ((target > 0.5) & (known > 0.5)).any((-2, -1))
  error = ious - jax.lax.stop_gradient(mask_iou(logits, target, known))
  error = jnp.abs(error) if config.iou_form == "l1" else jnp.square(error)
  focal = focal_loss(logits, target, known, config.focal_alpha, config.focal_gamma)
  entropy = binary_cross_entropy(presence, truth.present.astype(jnp.float32))
  return {
    "focal": weighted(focal, shown),
    "dice": weighted(mask_dice_loss(logits, target, known), shown),
    "iou": weighted(error, measured),
    "presence": weighted(entropy, live),
  }


def refiner_loss(
  sums: Mapping[str, Mean], config: RefinerLossConfig = RefinerLossConfig()
) -> tuple[Array, dict[str, Array]]:
  """The weighted sum of the parts of one stage's loss, and these unweighted: "focal", "dice",
  "iou", "presence", each a mean over the cells that count, 0 where there is none."""
  parts = {name: mean.value for name, mean in sums.items()}
  return sum((getattr(config, k) * v for k, v in parts.items()), jnp.float32(0)), parts


def prompted_loss(
  mask_logits: Array, ious: Array, presence: Array, truth: Array, config: RefinerLossConfig
) -> tuple[dict[str, Array], Array]:
  """SAM 2's losses of N cells with M masks each (training/loss_fns.py, MultiStepMultiMasksAndIous).

  Of the masks the one with the least focal and Dice loss counts, of the predicted IoUs their mean
  (supervise_all_iou). Where the object is absent all but the presence is 0. The masks are those
  before the presence gate: the original takes them behind it, and a mask that is there but was
  thought absent has no gradient then, and a loss of thousands.

  Args:
    mask_logits: [N, M, h, w], compared at the truth's resolution. ious: [N, M]. presence: [N].
    truth: bool [N, H, W].

  Returns:
    "focal", "dice", "iou", "presence", unweighted, and the true IoU of the mask that counts; [N].
  """
  cells, masks = ious.shape
  target, known = truth[:, None].astype(jnp.float32), jnp.ones((1, 1, *truth.shape[1:]))
  shape = cells, masks, *truth.shape[1:]
  # Torch's bilinear without antialias, as sam2_base.py:382 does it.
  logits = jax.image.resize(mask_logits.astype(jnp.float32), shape, "linear", antialias=False)
  focal = focal_loss(logits, target, known, config.focal_alpha, config.focal_gamma)
  dice = mask_dice_loss(logits, target, known)
  true = jax.lax.stop_gradient(mask_iou(logits, target, known))
  error = ious.astype(jnp.float32) - true
  error = jnp.abs(error) if config.iou_form == "l1" else jnp.square(error)
  best = jnp.argmin(config.focal * focal + config.dice * dice, axis=1)[:, None]
  present = jnp.any(truth, axis=(1, 2))

  def of_best(x: Array) -> Array:
    return jnp.where(present, jnp.take_along_axis(x, best, axis=1)[:, 0], 0.0)

  parts = {
    "focal": of_best(focal), "dice": of_best(dice),
    "iou": jnp.where(present, error.mean(axis=1), 0.0),
    "presence": binary_cross_entropy(presence.astype(jnp.float32), present.astype(jnp.float32)),
  }
  return parts, of_best(true)
