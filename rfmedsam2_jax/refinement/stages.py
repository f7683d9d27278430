"""One stage of refinement: remember the previous stage's masks, condition, decode.

A stage only needs what the previous stage said, so its cells are independent of each other: N of
them are one batched call. In training the cells of a run are all there at once (`stage_on_grid`);
at prediction refinement.refine gathers live cells into batches of fixed size.

In: features and `CellPrompts`. Out: `Cells`, from which refinement.prompts makes the next
stage's prompts and refinement.fusion the label map.
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
from rfmedsam2_jax.refinement.config import RefinementConfig, StageConfig
from rfmedsam2_jax.refinement.prompts import (
  CellPrompts,
  anchor_score,
  live_cells,
  nearby_logits,
  next_prompts,
  residual_of,
)
from rfmedsam2_jax.tracking.image import encode_images
from rfmedsam2_jax.tracking.recurrence import Bias, Cells, decode_cells, remember_cells


class CellSlots(NamedTuple, Generic[A]):
  """Where the memories of N cells lie in a store of memories.

  place: int32 [N, M], rows of the store. rows, valid: see MemorySlots.
  positions: float32 [N, M], temporal positions of the pointers.
  """

  place: A
  rows: A
  valid: A
  positions: A


class Memories(NamedTuple):
  """A store that `CellSlots.place` points into.

  maps: [R, G, G, mem_dim]. pointers: [R, C], the previous stage's; read only where a stage uses
  pointers.
  """

  maps: Array
  pointers: Array


def encode_slices(model: SAM2, params: Params, slices: Array) -> ImageFeatures:
  """Features of slices [B, S, S, 3] with intensities in [0, 1]."""
  return encode_images(model, params, _normalised(slices), in_turn=False)


def _normalised(slices: Array) -> Array:
  return (slices - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)


def refine_cells(
  model: SAM2, params: Params, stage: StageConfig, features: ImageFeatures,
  cells: CellPrompts[Array], memories: Memories, slots: CellSlots[Array],
) -> Cells[Array]:
  """One stage over N cells.

  Args:
    features: of the cells' slices, leading axis N.
  """
  # A clamped index of an empty slot is masked out, whatever it points at.
  used = slots.valid if stage.pointers else slots.valid[:, :0]
  width = used.shape[1]
  read = MemorySlots(
    maps=memories.maps[slots.place], rows=slots.rows, valid=slots.valid,
    pointers=memories.pointers[slots.place[:, :width]],
    pointer_positions=slots.positions[:, :width], pointer_valid=used
  )
  conditioned = apply(model.config, params, features.embedding, read, method="condition")
  return decode_stage(model, params, stage, conditioned, features, cells)


def decode_alone(
  model: SAM2, params: Params, stage: StageConfig, features: ImageFeatures,
  cells: CellPrompts[Array],
) -> Cells[Array]:
  """As `refine_cells`, without memory."""
  conditioned = apply(model.config, params, features.embedding, method="unconditioned")
  return decode_stage(model, params, stage, conditioned, features, cells)


def decode_stage(
  model: SAM2, params: Params, stage: StageConfig, conditioned: Array, features: ImageFeatures,
  cells: CellPrompts[Array],
) -> Cells[Array]:
  """Masks from conditioned features and prompts: box and mask together, mask token 0 only."""
  bias = bias_of(model, params, stage, features.pixels, cells)
  return decode_cells(
    model, params, conditioned, features.high_res, sam_prompts(cells, stage), bias=bias
  )


def sam_prompts(cells: CellPrompts[Array], stage: StageConfig) -> Prompts:
  """The prompts of SAM 2's correction path: box, clicks and mask, as far as the stage uses them."""
  return pack_prompts(
    cells.boxes, cells.has_box & stage.box, cells.points, cells.point_labels,
    cells.logits, cells.has_mask & stage.mask,
  )


def bias_of(
  model: SAM2, params: Params, stage: StageConfig, pixels: Array | None, cells: CellPrompts[Array]
) -> Bias:
  """What is added to decoded logits: see `residual_of`, and the MaskAdapter's correction, where
  there are `pixels` (ImageFeatures) for it."""
  mask, presence = residual_of(cells, stage)
  if pixels is not None:
    assert cells.nearby is not None
    # Without the mask as a prompt the adapter has the image alone.
    nearby = cells.nearby if stage.mask else jnp.zeros_like(cells.nearby)
    mask = mask + apply(model.config, params, pixels, nearby, method="correct_masks")
  return Bias(mask, presence)


class Runs(NamedTuple):
  """Runs of L consecutive slices with T tracks each, whose cells are N = B * T * L in this order.

  inside: bool [B * T, L], slices that belong to the volume.
  depth: int32 [B * T], of the whole volume.
  """

  inside: Array
  depth: Array

  def of_cells(self, x: Array) -> Array:
    """What belongs to the slices [B * L, ...] of runs, for each of their cells [N, ...]."""
    length = self.inside.shape[1]
    x = x.reshape(-1, 1, length, *x.shape[1:])
    tracks = len(self.inside) // len(x)
    return jnp.broadcast_to(x, (len(x), tracks, *x.shape[2:])).reshape(-1, *x.shape[3:])


def nearby_on_grid(cells: CellPrompts[Array], inside: Array, reach: int) -> Array:
  """`CellPrompts.nearby` of all cells of runs, from `reach` slices on either side.

  Args:
    inside: bool [B * T, L], see `Runs`.
  """
  length = inside.shape[1]

  def around(x: Array) -> Array:
    x = x.reshape(*inside.shape, *x.shape[1:])
    padded = jnp.pad(x, [(0, 0), (reach, reach)] + [(0, 0)] * (x.ndim - 2))
    return jnp.stack([padded[:, step : step + length] for step in range(2 * reach + 1)], axis=2)

  nearby = nearby_logits(
    around(cells.logits), around(cells.presence), around(inside.reshape(-1))
  )
  return nearby.reshape(-1, *nearby.shape[2:])


def grid_slots(
  stage: StageConfig, live: Array, score: Array, given: Array, depth: Array | int,
  max_given: int = 0, inside: Array | None = None,
) -> tuple[memory.SlotTable, Array]:
  """Which slices every cell of a [T, Z] grid of tracks and slices remembers.

  Args:
    live, given: bool [T, Z]. score: float32 [T, Z], see `anchor_score`.
    depth: true depth of the volume, scalar or [T]. inside: bool [T, Z].

  Returns:
    SlotTable [T, Z, M], pointer positions float32 [T, Z, M].
  """
  anchors, anchors_valid = memory.anchor_slices(score, live, given, stage.anchors, max_given)
  table = memory.neighbour_slots(live, stage.reach, anchors, anchors_valid, inside)
  depth = jnp.asarray(depth).reshape(-1, 1, 1)
  return table, memory.pointer_positions(table.offsets, depth)


def stage_on_grid(
  model: SAM2, params: Params, stage: StageConfig, features: ImageFeatures,
  cells: CellPrompts[Array], pointers: Array | None, runs: Runs, live: Array,
) -> Cells[Array]:
  """One stage over all cells of runs.

  A `stream` stage is trained like `neighbours`, on the previous stage's masks: the recurrence over
  a whole volume is for prediction.

  Args:
    features: of the slices, leading axis B * L. cells: leading axis N.
    pointers: [N, C] of the previous stage, or None in the first.
    live: bool [B * T, L], cells that the stage would run at prediction.
  """
  here = jax.tree.map(runs.of_cells, features)
  if stage.memory == "none":
    return decode_alone(model, params, stage, here, cells)
  score = anchor_score(cells.presence, cells.logits).reshape(live.shape)
  table, positions = grid_slots(
    stage, live, score, jnp.zeros(live.shape, bool), runs.depth, inside=runs.inside
  )
  first = jnp.arange(len(live), dtype=jnp.int32)[:, None, None] * live.shape[1]
  slots = CellSlots(*(
    x.reshape(live.size, -1) for x in (first + table.slices, table.rows, table.valid, positions)
  ))
  maps = remember_cells(model, params, here.embedding, cells.logits, cells.presence)
  if pointers is None:
    pointers = jnp.zeros((live.size, here.embedding.shape[-1]), maps.dtype)
  return refine_cells(model, params, stage, here, cells, Memories(maps, pointers), slots)


def all_stages_on_grid(
  model: SAM2, params: Params, config: RefinementConfig, slices: Array, cells: CellPrompts[Array],
  inside: Array, depth: Array,
) -> list[tuple[Cells[Array], Array]]:
  """Every stage over B runs, as training sees them; gradients pass between stages through pointers.

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
    outputs = stage_on_grid(model, params, stage, features, cells, pointers, runs, live)
    absent = params["no_obj_ptr"].reshape(-1).astype(outputs.pointer.dtype)
    pointers = jnp.where(live.reshape(-1, 1), outputs.pointer, absent)
    return outputs

  return _one_after_the_other(model, config, cells, (inside, depth), run)


def masks_on_grid(
  model: SAM2, params: Params, config: RefinementConfig, slices: Array, cells: CellPrompts[Array],
  inside: Array, depth: Array,
) -> list[tuple[Cells[Array], Array]]:
  """As `all_stages_on_grid`, of the MaskAdapter alone: the rest of SAM 2 is not run.

  As beside a decoder that is silent: stages have to be `residual`. Every structure stays where the
  stage before saw it, and the predicted IoU is 0.
  """
  pixels = apply(model.config, params, _normalised(slices), method="pixels")
  nothing = jnp.zeros(cells.presence.shape[0])

  def run(stage: StageConfig, cells: CellPrompts[Array], runs: Runs, live: Array) -> Cells[Array]:
    bias = bias_of(model, params, stage, runs.of_cells(pixels), cells)
    return Cells(bias.mask, nothing, bias.presence, nothing[:, None])

  return _one_after_the_other(model, config, cells, (inside, depth), run)


def _one_after_the_other(
  model: SAM2, config: RefinementConfig, cells: CellPrompts[Array], volume: tuple[Array, Array],
  run: Callable[[StageConfig, CellPrompts[Array], Runs, Array], Cells[Array]],
) -> list[tuple[Cells[Array], Array]]:
  """Runs the stages, each on the prompts that the one before makes, as at prediction.

  Args:
    volume: `inside` and `depth` of runs. run: gives the cells of one stage.
  """
  tracks = cells.presence.shape[0] // volume[0].size
  runs = Runs(*(jnp.repeat(x, tracks, axis=0) for x in volume))
  adapters = model.config.adapters
  results = []
  for stage in config.stages:
    # What a stage says of padding must not make slices of the volume live.
    present = (cells.presence > 0).reshape(runs.inside.shape) & runs.inside
    live = live_cells(present, config.live_margin) & runs.inside
    if adapters.mask:
      cells = cells._replace(nearby=nearby_on_grid(cells, runs.inside, adapters.mask_reach))
    outputs = run(stage, cells, runs, live)
    ran = live.reshape(-1)
    results.append((outputs, ran))
    # A cell that is not live is not run: no organ.
    presence = jnp.where(ran, outputs.presence, ABSENT_LOGIT)
    cells = next_prompts(outputs.logits, presence, model.config.image_size, config.box_margin)
  return results
