"""The tracker's loss: runs of slices are prompted, corrected and followed, as SAM 2 is trained.

Slices are encoded once; all tracks step through them together, one `lax.scan` over slices and
within it one over rounds of clicks. Follows training/model/sam2.py of sam2 1.1.0
(`forward_tracking`), which differs from prediction: no mask is binarised for memory and no memory
rounded, a given mask is remembered at the image's resolution, pointers of prompted slices ahead are
read, the mask of the round before is a prompt with its gradient and without a limit, and every
slice that was corrected is remembered as a prompted one (add_all_frames_to_correct_as_cond).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rfmedsam2_jax.config.tracker import TrackerConfig
from rfmedsam2_jax.nn import SAM2, ImageFeatures, apply
from rfmedsam2_jax.nn import memory_bank as memory
from rfmedsam2_jax.nn.layers import Array, Params
from rfmedsam2_jax.nn.losses import RefinerLossConfig, prompted_loss
from rfmedsam2_jax.nn.prompt_encoder import ABSENT, pack_prompts
from rfmedsam2_jax.refinement.stages import encode_slices
from rfmedsam2_jax.tracking.recurrence import MASK_LOGIT, best_mask, mask_to_follow, remember_cells
from rfmedsam2_jax.training.step import Batch, Keys, Loss
from rfmedsam2_jax.training.tracker_prompts import PROMPTED, Plan, corrections, draw_plan

PARTS = "focal", "dice", "iou", "presence"
_ALONE = 0.6  # share of rounds without a click, where prompts are drawn


class Told(NamedTuple):
  """What is told of cells, by step, round and track.

  counts: bool [L, 1 + R, N], cells that were decoded; a given mask is not.
  parts: float32 [L, 1 + R, N] each, see `prompted_loss`. overlap: alike, the true IoU.
  """

  counts: Array
  parts: dict[str, Array]
  overlap: Array


def tracker_loss_fn(model: SAM2, config: TrackerConfig) -> Loss:
  """SAM 2's loss: the sum over slices and rounds, a mean over tracks; see data.object_runs."""

  def sums(params: Params, batch: Batch, keys: Keys) -> Sums:
    runs, objects, length, side, _ = batch["objects"].shape
    size = model.config.image_size
    features = encode_slices(model, params, batch["images"].reshape(-1, size, size, 3))
    each = config.promptings
    truth = jnp.repeat(batch["objects"].astype(bool), each, axis=1).reshape(-1, length, side, side)
    has = jnp.repeat(batch["has"], each, axis=1).reshape(-1)
    # Two of every track: how it is prompted, and where it is clicked.
    of_tracks = jax.vmap(lambda key: jax.random.split(key, (len(has) // runs, 2)))(keys.rows)
    of_tracks = of_tracks.reshape(-1, 2)
    plan = draw_plan(truth, has, of_tracks[:, 0], keys.whole[0], config)
    told = follow(model, params, features, truth, plan, of_tracks[:, 1], config)
    return sums_of(told, plan.used)

  return Loss(sums, functools.partial(loss_of, config=config.loss))


class Sums(NamedTuple):
  """float32 [] each. parts, overlap: over cells. cells, present: how many there are, and how many
  with the object. tracks: how many there are."""

  parts: dict[str, Array]
  overlap: Array
  cells: Array
  present: Array
  tracks: Array


def sums_of(told: Told, used: Array) -> Sums:
  """The sums over the tracks that are `used`, bool [N]."""
  counts = told.counts & used
  present = counts & (told.overlap >= 0)
  parts = {name: jnp.where(counts, x, 0.0).sum() for name, x in told.parts.items()}
  overlap = jnp.where(present, told.overlap, 0.0).sum()
  count = functools.partial(jnp.sum, dtype=jnp.float32)
  return Sums(parts, overlap, count(counts), count(present), count(used))


def loss_of(sums: Sums, config: RefinerLossConfig) -> tuple[Array, dict[str, Array]]:
  """The loss, and means over cells: each part unweighted, and the true IoU."""
  metrics = {
    name: value / jnp.maximum(sums.cells if name == "presence" else sums.present, 1)
    for name, value in sums.parts.items()
  }
  metrics["mask_iou"] = sums.overlap / jnp.maximum(sums.present, 1)
  weighted = [getattr(config, name) * value for name, value in sums.parts.items()]
  return sum(weighted, jnp.float32(0)) / jnp.maximum(sums.tracks, 1), metrics


def follow(
  model: SAM2, params: Params, features: ImageFeatures, truth: Array, plan: Plan, keys: Array,
  config: TrackerConfig,
) -> Told:
  """Follows N tracks through L slices.

  Args:
    features: leading axis B * L, slices of B runs; tracks are N = B * T, ordered by run.
    truth: bool [N, L, S, S]. keys: [N], of clicks.
  """
  count, length, side, _ = truth.shape
  sam2, rounds = model.config, config.corrections
  call = functools.partial(apply, sam2, params)
  run = jnp.arange(count, dtype=jnp.int32) // (count * length // len(features.embedding))

  def step(bank: memory.MemoryBank, inputs):
    number, slices, places, prompted, corrected, boxes, has_box, points, labels, given = inputs
    here = jax.tree.map(lambda x: x[run * length + slices], features)
    target = jnp.take_along_axis(truth, slices[:, None, None, None], axis=1)[:, 0]
    has_before = jnp.zeros(count, bool)
    if length == 1:
      conditioned = call(here.embedding, method="unconditioned")
    else:
      slots = memory.read(bank, places, length, False, pointers_ahead=True)
      slots = slots._replace(
        valid=slots.valid & ~prompted[:, None],
        pointer_valid=slots.pointer_valid & ~prompted[:, None],
      )
      conditioned = call(here.embedding, slots, method="condition")
      if bank.masks is not None:  # that of the slice before, where nobody prompts
        before, has_before = memory.mask_before(bank, places, False)
        has_before &= ~prompted
        given = jnp.where(has_before[:, None, None], before, given)
    takes_mask = prompted & plan.takes_mask
    conditioned = jnp.where(takes_mask[:, None, None, None], here.embedding, conditioned)

    def decode(cell, index):
      points, labels, mask, has_mask = cell
      ambiguous = jnp.sum(labels >= 0, axis=1) + 2 * has_box <= 1
      decoded = call(
        conditioned, here.high_res, pack_prompts(boxes, has_box, points, labels, mask, has_mask),
        method="decode", multimask=ambiguous & ~takes_mask,
      )
      parts, overlap = jax.checkpoint(
        functools.partial(prompted_loss, config=config.loss), prevent_cse=False
      )(decoded.masks, decoded.ious, decoded.presence, target)
      best = call(best_mask(decoded), method="gate")
      mask = best.masks[:, 0]
      found = upsampled(mask) > 0
      of_click = jax.vmap(lambda key: jax.random.fold_in(key, number * (rounds + 1) + index))(keys)
      where, label = corrections(target, found, of_click)
      if sam2.drawn_prompts:  # its own mask alone, as tracking shows it to the network once more
        alone = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 2)))(of_click)
        label = jnp.where(alone < _ALONE, ABSENT, label)
      new = jnp.arange(1 + rounds) == index + 1
      cell = (
        jnp.where(new[:, None], where[:, None], points), jnp.where(new, label[:, None], labels),
        mask, jnp.ones_like(has_mask),
      )
      return cell, (mask, decoded.presence, best.pointer), (parts, overlap)

    if sam2.remat != "none":
      decode = jax.checkpoint(decode, prevent_cse=False)

    def upsampled(mask: Array) -> Array:
      return jax.image.resize(mask, (count, side, side), "linear", antialias=False)

    def one_round(state, index):
      running = (index == 0) | corrected

      def go(state):
        *new, told = decode(state[0], index)
        keep = lambda x, y: jnp.where(running.reshape(-1, *(1,) * (x.ndim - 1)), x, y)  # noqa: E731
        return jax.tree.map(keep, tuple(new), state), told

      def stay(state):
        nothing = jnp.zeros(count)
        return state, (dict.fromkeys(PARTS, nothing), nothing)

      state, told = jax.lax.cond(jnp.any(running), go, stay, state)
      return state, (running & ~(takes_mask & (index == 0)), told)

    clicked = jnp.full((count, rounds), ABSENT, jnp.int32)
    points = jnp.concatenate([points[:, None], jnp.zeros((count, rounds, 2))], axis=1)
    labels = jnp.concatenate([labels[:, None], clicked], axis=1)
    cell = points, labels, given, takes_mask | has_before
    nothing = jnp.zeros_like(given), jnp.zeros(count), jnp.zeros((count, sam2.d_model),
                                                                 sam2.compute_dtype)
    state, told = jax.lax.scan(one_round, (cell, nothing), jnp.arange(rounds + 1))
    counted, (parts, overlap) = told
    is_there = jnp.any(target, axis=(1, 2))
    told = Told(counted, parts, jnp.where(is_there, overlap, -1.0))
    if length == 1:  # nothing will remember it
      return bank, told
    mask, presence, pointer = state[1]
    mask = jnp.where(
      takes_mask[:, None, None], MASK_LOGIT * (2.0 * target - 1), upsampled(mask)
    )
    presence = jnp.where(takes_mask, MASK_LOGIT * (2.0 * is_there - 1), presence)
    maps = remember_cells(model, params, here.embedding, mask, presence)
    kept = prompted | corrected
    slot = jnp.minimum(jnp.full(count, number), PROMPTED - 1)
    seen = None if bank.masks is None else jax.lax.stop_gradient(mask_to_follow(
      jnp.where(takes_mask[:, None, None], given, state[1][0]), presence))
    bank = memory.add_conditioning(bank, slot, kept, maps, pointer, places, seen)
    bank = memory.add_recent(
      bank, ~kept, maps, pointer, places, jnp.zeros_like(places), False, seen)
    return bank, told

  bank = memory.empty_bank(
    count, PROMPTED, sam2.grid, sam2.mem_dim, sam2.d_model, sam2.compute_dtype,
    masks=sam2.drawn_prompts and length > 1,
  )
  first = jnp.take_along_axis(truth, plan.slices[:, :PROMPTED, None, None], axis=1)
  given = call(first.reshape(-1, side, side), method="mask_prompt")
  given = given.reshape(*first.shape[:2], *given.shape[1:])
  given = jnp.pad(given, [(0, 0), (0, length - first.shape[1]), (0, 0), (0, 0)])
  by_step = functools.partial(jnp.swapaxes, axis1=0, axis2=1)
  inputs = (
    jnp.arange(length, dtype=jnp.int32),
    *map(by_step, (plan.slices, plan.places, plan.prompted, plan.corrected, plan.boxes,
                   plan.has_box, plan.points, plan.labels, given)),
  )
  return jax.lax.scan(step, bank, inputs)[1]
