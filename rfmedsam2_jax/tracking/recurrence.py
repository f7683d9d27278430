"""SAM 2's recurrence over slices: decode prompted slices, remember them, sweep through the others.

All tracks (one object each) step together as one batch. A sweep is one `lax.scan` over a batch of
slices whose direction is an argument, with a memory bank of fixed shape: one compiled program
serves both directions and volumes of every depth.
"""

import functools
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp

from rfmedsam2_jax.base.constants import LOGIT_LIMIT
from rfmedsam2_jax.nn import (
  ABSENT_LOGIT,
  SAM2,
  Decoded,
  ImageFeatures,
  Prompts,
  apply,
  no_prompts,
)
from rfmedsam2_jax.nn import memory_bank as memory
from rfmedsam2_jax.nn.layers import A, AnyArray, Array, Params

MASK_LOGIT = 10.0  # a given mask is an output of +-10 (sam2_base.py:_use_mask_as_output)


class Cells(NamedTuple, Generic[A]):
  """What was decoded of cells; leading axes as the function says.

  logits: float32 [..., 4G, 4G], not gated by presence. iou: float32 [...], predicted.
  presence: float32 [...], logit. pointer: [..., C], `no_obj_ptr` where the object is absent.
  """

  logits: A
  iou: A
  presence: A
  pointer: A


class Bias(NamedTuple):
  """Added to what is decoded: mask logits float32 [..., 4G, 4G], presence logits float32 [...]."""

  mask: Array
  presence: Array


class Decoding(NamedTuple):
  """How cells are decoded; static.

  multimask: the mask with the highest predicted IoU of three, and its pointer.
  dynamic_multimask: without `multimask`, the same where the single mask is unstable.
  looks: times that a cell is decoded, each time but the first with the mask before as a prompt.
  """

  multimask: bool = False
  dynamic_multimask: bool = False
  looks: int = 1


SINGLE, BEST = Decoding(), Decoding(multimask=True)


def decode_cells(
  model: SAM2, params: Params, conditioned: Array, high_res: tuple[Array, Array], prompts: Prompts,
  how: Decoding = SINGLE, bias: Bias | None = None,
) -> Cells[Array]:
  """Decodes N cells to one mask each.

  Args:
    conditioned: [N, G, G, C]. high_res: leading axis N, or 1 where all cells share a slice.
  """

  def look(prompts: Prompts) -> Decoded:
    decoded = apply(
      model, params, conditioned, high_res, prompts, method="decode", multimask=how.multimask,
      dynamic_multimask=how.dynamic_multimask and not how.multimask,
    )
    return best_mask(decoded) if how.multimask else decoded

  decoded = look(prompts)
  for _ in range(how.looks - 1):
    mask = mask_to_correct(decoded.masks[:, 0], decoded.presence)
    decoded = look(prompts._replace(mask=mask, has_mask=jnp.ones(len(mask), bool)))
  if bias is not None:
    masks = decoded.masks + bias.mask[:, None]
    decoded = decoded._replace(masks=masks, presence=decoded.presence + bias.presence)
  pointer = apply(model, params, decoded, method="gate").pointer
  return Cells(decoded.masks[:, 0], decoded.ious[:, 0], decoded.presence, pointer)


def best_mask(decoded: Decoded) -> Decoded:
  """Of several masks of each cell the one with the highest predicted IoU."""
  best = jnp.argmax(decoded.ious, axis=1)[:, None]
  masks = jnp.take_along_axis(decoded.masks, best[..., None, None], axis=1)
  return decoded._replace(masks=masks, ious=jnp.take_along_axis(decoded.ious, best, axis=1))


def cells_of_masks(
  model: SAM2, params: Params, features: ImageFeatures, masks_NSS: Array
) -> Cells[Array]:
  """Cells whose masks (0 or 1, image resolution) a person gave: the mask is the output.

  The pointer comes from the decoder on features without `no_mem_embed` (sam2_base.py:440).
  """
  count, side = masks_NSS.shape[0], 4 * model.config.grid
  prompt = apply(model, params, masks_NSS, method="mask_prompt")
  prompts = no_prompts(count)._replace(mask=prompt)
  decoded = decode_cells(model, params, features.embedding, features.high_res, prompts)
  logits = MASK_LOGIT * (2 * masks_NSS.astype(jnp.float32) - 1)
  logits = jax.image.resize(logits, (count, side, side), "linear", antialias=True)
  present = jnp.any(masks_NSS > 0, axis=(1, 2))
  absent = params["no_obj_ptr"].reshape(1, -1).astype(decoded.pointer.dtype)
  pointer = jnp.where(present[:, None], decoded.pointer, absent)
  return Cells(logits, jnp.ones(count), jnp.where(present, MASK_LOGIT, -MASK_LOGIT), pointer)


def remember_cells(
  model: SAM2, params: Params, embedding: Array, logits: Array, presence: Array,
  binarize: bool = False,
) -> Array:
  """Memory maps [N, G, G, mem_dim] of cells; absent objects are remembered as masks of -1024.

  Args:
    embedding: [N, G, G, C], of the cells' slices. logits: [N, 4G, 4G]. presence: [N].
    binarize: SAM 2 does so on slices that a person prompted.
  """
  return apply(
    model, params, embedding, gated_logits(logits, presence), presence > 0,
    method="remember", binarize=binarize,
  )


def gated_logits(logits: AnyArray, presence: AnyArray) -> Array:
  """Mask logits [..., 4G, 4G], -1024 where the object is absent: `presence` [...] not positive."""
  return jnp.where((presence > 0)[..., None, None], logits, ABSENT_LOGIT)


def mask_to_correct(logits: AnyArray, presence: AnyArray) -> Array:
  """Mask logits [..., 4G, 4G] as the prompt for a further look at them: at most +-32 as SAM 2 has
  them when it corrects (sam2_video_predictor.py:280), -32 where the object is absent."""
  return jnp.clip(gated_logits(logits, presence), -LOGIT_LIMIT, LOGIT_LIMIT)


def mask_to_follow(logits: AnyArray, presence: AnyArray) -> Array:
  """The same as a bank keeps it for the next slice: -1024, which is no prompt, where the object is
  absent."""
  return gated_logits(mask_to_correct(logits, presence), presence)


class Course(NamedTuple):
  """The way of N tracks through L slices of a volume.

  slices: int32 [L], their numbers in the order of travel.
  run: bool [N, L], cells to segment and to remember; the others are neither.
  start: int32 [N], the slice that both directions set out from. depth: int32, of the volume.
  reverse: bool, direction of travel.
  """

  slices: Array
  run: Array
  start: Array
  depth: Array
  reverse: Array


def sweep(
  model: SAM2, params: Params, bank: memory.MemoryBank, features: ImageFeatures, course: Course,
  how: Decoding = BEST, prompts: Prompts | None = None,
  bias: Bias | None = None,
) -> tuple[memory.MemoryBank, Cells[Array]]:
  """Follows N objects through L slices.

  Args:
    bank: of N tracks; conditioning slices are already in it. If it has masks, that of the slice
      before is a prompt.
    features: leading axis L. prompts, bias: leading axes [L, N].

  Returns:
    The bank, and Cells [L, N]; those that were not run hold logits and presence of -1024.
  """
  tracks = course.run.shape[0]
  none = functools.partial(no_cells, model, (tracks,))

  def step(bank: memory.MemoryBank, inputs):
    here, number, running, prompted, added = inputs
    here = jax.tree.map(lambda x: x[None], here)
    embedding = jnp.broadcast_to(here.embedding, (tracks, *here.embedding.shape[1:]))
    at = jnp.full(tracks, number, jnp.int32)

    def advance(bank):
      slots = memory.read(bank, at, course.depth, course.reverse)
      conditioned = apply(model, params, here.embedding, slots, method="condition")
      tokens = no_prompts(tracks) if prompted is None else prompted
      if bank.masks is not None:
        mask, has_mask = memory.mask_before(bank, at, course.reverse)
        tokens = tokens._replace(mask=mask, has_mask=has_mask)
      cells = decode_cells(model, params, conditioned, here.high_res, tokens, how, added)
      maps = remember_cells(model, params, embedding, cells.logits, cells.presence)
      masks = None if bank.masks is None else mask_to_follow(cells.logits, cells.presence)
      bank = memory.add_recent(
        bank, running, maps, cells.pointer, at, course.start, course.reverse, masks)
      return bank, jax.tree.map(functools.partial(_where, running), cells, none())

    # Where no track runs there is nothing to do, and nothing is done.
    return jax.lax.cond(jnp.any(running), advance, lambda bank: (bank, none()), bank)

  return jax.lax.scan(step, bank, (features, course.slices, course.run.T, prompts, bias))


def _where(which: Array, new: Array, old: Array) -> Array:
  """jnp.where over the leading axes that `which` has."""
  return jnp.where(which.reshape(*which.shape, *(1,) * (new.ndim - which.ndim)), new, old)


def no_cells(model: SAM2, shape: tuple[int, ...]) -> Cells[Array]:
  """Cells of a shape that were not run."""
  side = 4 * model.config.grid
  return Cells(
    jnp.full((*shape, side, side), ABSENT_LOGIT), jnp.zeros(shape), jnp.full(shape, ABSENT_LOGIT),
    jnp.zeros((*shape, model.config.d_model), model.config.compute_dtype)
  )


class TrackInputs(NamedTuple):
  """N tracks over Z slices (padding included), each from a slice of its own.

  prompts, bias: leading axes [N, Z].
  start: int32 [N], the conditioning slice that the track starts from; decoded without memory.
  active: bool [N, Z], cells to run; the others are neither segmented nor remembered.
  depth: int32, true depth of the volume, for the positions of pointers.
  """

  prompts: Prompts
  start: Array
  active: Array
  depth: Array
  bias: Bias | None = None


def track(
  model: SAM2, params: Params, features: ImageFeatures, inputs: TrackInputs
) -> Cells[Array]:
  """Follows N objects whose every slice may have prompts, with mask token 0 alone.

  The recurrence of the `stream` stages of refinement: all slices' features (leading axis Z) are at
  hand, and no mask is binarised.

  Returns:
    Cells [N, Z]; those that are not active have logits of -1024 and presence -1024.
  """
  tracks, depth_padded = inputs.active.shape
  config, start, which = model.config, jnp.asarray(inputs.start), jnp.arange(tracks)
  first = jax.tree.map(lambda x: x[start], features)
  prompts, bias = jax.tree.map(lambda x: x[which, start], (inputs.prompts, inputs.bias))
  conditioned = apply(model, params, first.embedding, method="unconditioned")
  begun = decode_cells(model, params, conditioned, first.high_res, prompts, bias=bias)
  maps = remember_cells(model, params, first.embedding, begun.logits, begun.presence)
  sizes = config.grid, config.mem_dim, config.d_model
  bank = memory.empty_bank(tracks, 1, *sizes, config.compute_dtype)
  bank = memory.add_conditioning(
    bank, jnp.zeros(tracks, jnp.int32), jnp.ones(tracks, bool), maps, begun.pointer, start
  )
  numbers = jnp.arange(depth_padded, dtype=jnp.int32)
  by_slice = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (inputs.prompts, inputs.bias))
  outputs = no_cells(model, (tracks, depth_padded))
  outputs = jax.tree.map(lambda x, new: x.at[which, start].set(new), outputs, begun)
  for reverse in (False, True):
    run = inputs.active & (numbers < start[:, None] if reverse else numbers > start[:, None])
    order = slice(None, None, -1) if reverse else slice(None)
    sliced = features, numbers, by_slice
    here, slices, prompted = jax.tree.map(lambda x, order=order: x[order], sliced)
    course = Course(slices, run[:, order], start, inputs.depth, jnp.asarray(reverse))
    bank, cells = sweep(model, params, bank, here, course, SINGLE, *prompted)
    cells = jax.tree.map(lambda x, order=order: jnp.swapaxes(x[order], 0, 1), cells)
    outputs = jax.tree.map(functools.partial(_where, run), cells, outputs)
  return outputs
