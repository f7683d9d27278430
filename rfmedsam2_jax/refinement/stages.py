"""One stage of refinement: remember the previous stage's masks, condition, decode.

A stage only needs what the previous stage said, so its cells are independent of each other: N of
them are one batched call. In: features and `CellPrompts`. Out: `Cells`, from which
refinement.prompts makes the next stage's prompts and refinement.fusion the label map.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp

from rfmedsam2_jax.base.constants import IMAGE_MEAN, IMAGE_STD
from rfmedsam2_jax.nn import ABSENT_LOGIT, SAM2, ImageFeatures, MemorySlots, apply
from rfmedsam2_jax.nn import memory_bank as memory
from rfmedsam2_jax.nn.layers import A, Array, Params
from rfmedsam2_jax.nn.prompt_encoder import Prompts, pack_prompts
from rfmedsam2_jax.refinement import prompts as prompts_lib
from rfmedsam2_jax.refinement.config import RefinementConfig, StageConfig
from rfmedsam2_jax.refinement.prompts import CellPrompts
from rfmedsam2_jax.tracking.image import encode_images
from rfmedsam2_jax.tracking.recurrence import Bias, Cells, decode_cells, remember_cells


class CellSlots(NamedTuple, Generic[A]):
  """Where the memories of N cells lie in `Memories`.

  place: int32 [N, M], rows of the store. rows, valid: see MemorySlots.
  positions: float32 [N, M], temporal positions of the pointers.
  """

  place: A
  rows: A
  valid: A
  positions: A


class Memories(NamedTuple):
  """maps: [R, G, G, mem_dim]. pointers: [R, C], the previous stage's, for stages that use them."""

  maps: Array
  pointers: Array


def encode_slices(model: SAM2, params: Params, slices: Array) -> ImageFeatures:
  """Features of slices [B, S, S, 3] with intensities in [0, 1]."""
  return encode_images(model, params, _normalised(slices), in_turn=False)


def _normalised(slices: Array) -> Array:
  return (slices - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)


def refine_cells(
  model: SAM2, params: Params, stage: StageConfig, features: ImageFeatures,
  cells: CellPrompts[Array], memories: Memories | None = None,
  slots: CellSlots[Array] | None = None,
) -> Cells[Array]:
  """One stage over N cells, with features of their slices; without `memories`, each for itself."""
  if memories is None or slots is None:
    conditioned = apply(model, params, features.embedding, method="unconditioned")
    return decode_stage(model, params, stage, conditioned, features, cells)
  # A clamped index of an empty slot is masked out, whatever it points at.
  used = slots.valid if stage.pointers else slots.valid[:, :0]
  width = used.shape[1]
  read = MemorySlots(
    maps=memories.maps[slots.place], rows=slots.rows, valid=slots.valid,
    pointers=memories.pointers[slots.place[:, :width]],
    pointer_positions=slots.positions[:, :width], pointer_valid=used
  )
  conditioned = apply(model, params, features.embedding, read, method="condition")
  return decode_stage(model, params, stage, conditioned, features, cells)


def decode_stage(
  model: SAM2, params: Params, stage: StageConfig, conditioned: Array, features: ImageFeatures,
  cells: CellPrompts[Array],
) -> Cells[Array]:
  """Masks from conditioned features and prompts: box and mask together, mask token 0 only."""
  bias = bias_of(model, params, stage, features.pixels, cells)
  prompts = sam_prompts(cells, stage)
  return decode_cells(model, params, conditioned, features.high_res, prompts, bias=bias)


def sam_prompts(cells: CellPrompts[Array], stage: StageConfig) -> Prompts:
  """The prompts of SAM 2's correction path: box, clicks and mask, as far as the stage uses them."""
  return pack_prompts(
    cells.boxes, cells.has_box & stage.box, cells.points, cells.point_labels,
    cells.logits, cells.has_mask & stage.mask,
  )


def bias_of(
  model: SAM2, params: Params, stage: StageConfig, pixels: Array | None, cells: CellPrompts[Array]
) -> Bias:
  """What is added to decoded logits.

  In a `residual` stage, what the stage before said; its mask is left out where it is no prompt
  either. Where there are `pixels` (ImageFeatures), the MaskAdapter's correction.
  """
  if stage.residual:
    shown, limit = (cells.has_mask & stage.mask)[:, None, None], stage.residual_limit
    mask = jnp.where(shown, jnp.clip(cells.logits, -limit, limit), 0.0)
    # Log-odds of a structure that was seen, or not: gaps outnumber islands.
    presence = jnp.where(cells.presence > 0, 4.0, -2.0)
  else:
    mask, presence = jnp.zeros_like(cells.logits), jnp.zeros_like(cells.presence)
  if pixels is not None:
    assert cells.nearby is not None
    # Without the mask as a prompt the adapter has the image alone.
    nearby = cells.nearby if stage.mask else jnp.zeros_like(cells.nearby)
    mask = mask + apply(model, params, pixels, nearby, method="correct_masks")
  return Bias(mask, presence)


class Runs(NamedTuple):
  """Runs of L consecutive slices with T tracks each, whose cells are N = B * T * L in this order.

  inside: bool [B * T, L], slices that belong to the volume. depth: int32 [B * T], of all of it.
  """

  inside: Array
  depth: Array

  def of_cells(self, x: Array) -> Array:
    """What belongs to the slices [B * L, ...] of runs, for each of their cells [N, ...]."""
    x = x.reshape(-1, 1, self.inside.shape[1], *x.shape[1:])
    tracks = len(self.inside) // len(x)
    return jnp.broadcast_to(x, (len(x), tracks, *x.shape[2:])).reshape(-1, *x.shape[3:])


def nearby_on_grid(cells: CellPrompts[Array], inside: Array, reach: int) -> Array:
  """`CellPrompts.nearby` of all cells of `Runs`, from `reach` slices on either side."""

  def around(x: Array) -> Array:
    x = x.reshape(*inside.shape, *x.shape[1:])
    padded = jnp.pad(x, [(0, 0), (reach, reach)] + [(0, 0)] * (x.ndim - 2))
    shifts = [padded[:, step : step + inside.shape[1]] for step in range(2 * reach + 1)]
    return jnp.stack(shifts, axis=2)

  known = (around(x) for x in (cells.logits, cells.presence, inside.reshape(-1)))
  nearby = prompts_lib.nearby_logits(*known)
  return nearby.reshape(-1, *nearby.shape[2:])


def grid_slots(
  stage: StageConfig, live: Array, score: Array, given: Array, depth: Array | int,
  max_given: int = 0, inside: Array | None = None,
) -> tuple[memory.SlotTable, Array]:
  """What every cell of a [T, Z] grid of tracks and slices remembers: SlotTable, pointer positions.

  Args:
    live, given, inside: bool [T, Z]. score: float32 [T, Z], see `anchor_score`.
    depth: true depth of the volume, scalar or [T].
  """
  anchors = memory.anchor_slices(score, live, given, stage.anchors, max_given)
  table = memory.neighbour_slots(live, stage.reach, *anchors, inside)
  return table, memory.pointer_positions(table.offsets, jnp.asarray(depth).reshape(-1, 1, 1))


def all_stages_on_grid(
  model: SAM2, params: Params, config: RefinementConfig, slices: Array, cells: CellPrompts[Array],
  inside: Array, depth: Array,
) -> list[tuple[Cells[Array], Array]]:
  """Every stage over B runs, as training sees them; gradients pass between stages through pointers.

  A `stream` stage is trained like `neighbours`, on the previous stage's masks: the recurrence over
  a whole volume is for prediction.

  Args:
    slices: float32 [B * L, S, S, 3] in [0, 1]. cells: stage-0 prompts of N = B * T * L cells.
    inside: bool [B, L], slices that belong to the volume. depth: int32 [B], of the whole volume.

  Returns:
    Per stage: Cells [N]; live bool [N], those that the stage would run at prediction.
  """
  features = encode_slices(model, params, slices)
  pointers = None

  def run(stage: StageConfig, cells: CellPrompts[Array], runs: Runs, live: Array) -> Cells[Array]:
    nonlocal pointers
    here = jax.tree.map(runs.of_cells, features)
    memories, slots = None, None
    if stage.memory != "none":
      score = prompts_lib.anchor_score(cells.presence, cells.logits).reshape(live.shape)
      given = jnp.zeros(live.shape, bool)
      table, positions = grid_slots(stage, live, score, given, runs.depth, inside=runs.inside)
      first = jnp.arange(len(live), dtype=jnp.int32)[:, None, None] * live.shape[1]
      where = first + table.slices, table.rows, table.valid, positions
      slots = CellSlots(*(x.reshape(live.size, -1) for x in where))
      maps = remember_cells(model, params, here.embedding, cells.logits, cells.presence)
      if pointers is None:
        pointers = jnp.zeros((live.size, here.embedding.shape[-1]), maps.dtype)
      memories = Memories(maps, pointers)
    outputs = refine_cells(model, params, stage, here, cells, memories, slots)
    absent = params["no_obj_ptr"].reshape(-1).astype(outputs.pointer.dtype)
    pointers = jnp.where(live.reshape(-1, 1), outputs.pointer, absent)
    return outputs

  return _one_after_the_other(model, config, cells, inside, depth, run)


def masks_on_grid(
  model: SAM2, params: Params, config: RefinementConfig, slices: Array, cells: CellPrompts[Array],
  inside: Array, depth: Array,
) -> list[tuple[Cells[Array], Array]]:
  """As `all_stages_on_grid`, of the MaskAdapter alone, as beside a decoder that is silent.

  Stages have to be `residual`. Every structure stays where the stage before saw it, and the
  predicted IoU is 0.
  """
  pixels = apply(model, params, _normalised(slices), method="pixels")
  nothing = jnp.zeros(len(cells.presence))

  def run(stage: StageConfig, cells: CellPrompts[Array], runs: Runs, live: Array) -> Cells[Array]:
    bias = bias_of(model, params, stage, runs.of_cells(pixels), cells)
    return Cells(bias.mask, nothing, bias.presence, nothing[:, None])

  return _one_after_the_other(model, config, cells, inside, depth, run)


def _one_after_the_other(
  model: SAM2, config: RefinementConfig, cells: CellPrompts[Array], inside: Array, depth: Array,
  run: Callable[[StageConfig, CellPrompts[Array], Runs, Array], Cells[Array]],
) -> list[tuple[Cells[Array], Array]]:
  """Runs the stages by `run`, each on the prompts that the one before makes, as at prediction."""
  tracks = len(cells.presence) // inside.size
  runs = Runs(*(jnp.repeat(x, tracks, axis=0) for x in (inside, depth)))
  adapters, results = model.config.adapters, []
  for stage in config.stages:
    # What a stage says of padding must not make slices of the volume live.
    present = (cells.presence > 0).reshape(runs.inside.shape) & runs.inside
    live = prompts_lib.live_cells(present, config.live_margin) & runs.inside
    if adapters.mask:
      cells = cells._replace(nearby=nearby_on_grid(cells, runs.inside, adapters.mask_reach))
    outputs = run(stage, cells, runs, live)
    ran = live.reshape(-1)
    results.append((outputs, ran))
    # A cell that is not live is not run: no organ.
    presence = jnp.where(ran, outputs.presence, ABSENT_LOGIT)
    size = model.config.image_size
    cells = prompts_lib.next_prompts(outputs.logits, presence, size, config.box_margin)
  return results
