"""Prompted segmentation of a volume by SAM 2's own recurrence: a scan over slices, both directions.

Every track (one object) starts at its own slice and runs forward to the end of the volume, then
backward from the start; all tracks step together as one batch, in one compiled call, with a memory
bank whose shapes do not depend on depth.

In: features of slices and prompts per cell. Out: mask logits, scores and pointers per cell.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rfmedsam2_jax import memory
from rfmedsam2_jax.nn import ABSENT_LOGIT, SAM2, ImageFeatures, Prompts, apply

Array = jax.Array


class TrackInputs(NamedTuple):
  """N tracks over a volume of Z slices (padding included).

  prompts: Prompts with leading axes [N, Z].
  start: int32 [N], the conditioning slice that the track starts from; decoded without memory.
  active: bool [N, Z], cells to run; the others are neither segmented nor remembered.
  depth: int32, true depth of the volume, for the positions of pointers.
  mask_bias: float32 [N, Z, 4G, 4G] or None, added to decoded mask logits.
  presence_bias: float32 [N, Z] or None, added to decoded presence logits.
  """

  prompts: Prompts
  start: Array
  active: Array
  depth: Array
  mask_bias: Array | None = None
  presence_bias: Array | None = None


class TrackOutputs(NamedTuple):
  """Per cell [N, Z]: logits [4G, 4G] ungated, predicted IoU, presence logit, gated pointer [C]."""

  logits: Array
  iou: Array
  presence: Array
  pointer: Array


def track(
  model: SAM2, params: dict[str, Any], features: ImageFeatures, inputs: TrackInputs
) -> TrackOutputs:
  """Follows N objects from their conditioning slices to both ends of the volume.

  Args:
    features: leading axis Z.

  Returns:
    TrackOutputs; cells that are not active have logits of -1024 and presence -1024.
  """
  tracks, depth_padded = inputs.active.shape
  config = model.config
  which = jnp.arange(tracks)

  def segment(bank: memory.MemoryBank, slices: Array, mode: str):
    """One slice of every track: its outputs, and its memory."""
    at = jnp.clip(slices, 0, depth_padded - 1)
    here = jax.tree.map(lambda x: x[at], features)
    if mode == "start":
      conditioned = apply(model.config, params, here.embedding, method="unconditioned")
    else:
      slots = memory.read(bank, 1, at, inputs.depth, mode == "reverse")
      conditioned = apply(model.config, params, here.embedding, slots, method="condition")
    prompts = jax.tree.map(lambda x: x[which, at], inputs.prompts)
    decoded = apply(model.config, params, conditioned, here.high_res, prompts, method="decode")
    if inputs.mask_bias is not None:
      decoded = decoded._replace(masks=decoded.masks + inputs.mask_bias[which, at][:, None])
    if inputs.presence_bias is not None:
      decoded = decoded._replace(presence=decoded.presence + inputs.presence_bias[which, at])
    gated = apply(model.config, params, decoded, method="gate")
    present = decoded.presence > 0
    maps = apply(
      model.config, params, here.embedding, gated.masks[:, 0], present, method="remember"
    )
    outputs = TrackOutputs(
      decoded.masks[:, 0].astype(jnp.float32),
      decoded.ious[:, 0].astype(jnp.float32),
      decoded.presence.astype(jnp.float32),
      gated.pointer,
    )
    return outputs, maps

  def keep(outputs: TrackOutputs, new: TrackOutputs, slices: Array, run: Array) -> TrackOutputs:
    at = jnp.where(run, slices, depth_padded)  # out of bounds is dropped
    return jax.tree.map(lambda old, value: old.at[which, at].set(value, mode="drop"), outputs, new)

  side = 4 * config.grid
  outputs = TrackOutputs(
    jnp.full((tracks, depth_padded, side, side), ABSENT_LOGIT),
    jnp.zeros((tracks, depth_padded)),
    jnp.full((tracks, depth_padded), ABSENT_LOGIT),
    jnp.zeros((tracks, depth_padded, config.d_model), config.compute_dtype),
  )
  bank = memory.empty_bank(
    tracks, 1, config.grid, config.mem_dim, config.d_model, config.compute_dtype
  )
  new, maps = segment(bank, inputs.start, "start")
  everyone = jnp.ones(tracks, bool)
  outputs = keep(outputs, new, inputs.start, everyone)
  bank = memory.add_conditioning(
    bank, jnp.zeros(tracks, jnp.int32), everyone, maps, new.pointer, inputs.start
  )

  def sweep(mode: str, carry):
    direction = -1 if mode == "reverse" else 1

    def step(carry, distance):
      bank, outputs = carry
      slices = inputs.start + direction * distance
      within = (slices >= 0) & (slices < depth_padded)
      run = within & inputs.active[which, jnp.clip(slices, 0, depth_padded - 1)]

      def advance(carry):
        bank, outputs = carry
        new, maps = segment(bank, slices, mode)
        bank = memory.add_recent(
          bank, 1, run, maps, new.pointer, slices, inputs.start, mode == "reverse"
        )
        return bank, keep(outputs, new, slices, run)

      # Past the end of every track there is nothing to do, and nothing is done.
      return jax.lax.cond(jnp.any(run), advance, lambda carry: carry, (bank, outputs)), None

    return jax.lax.scan(step, carry, jnp.arange(1, depth_padded, dtype=jnp.int32))[0]

  carry = sweep("forward", (bank, outputs))
  return sweep("reverse", carry)[1]
