"""One stage of refinement: remember the previous stage's masks, condition, decode.

A stage only needs what the previous stage said, so its cells are independent of each other: N of
them are one batched call. In training the cells of a run are all there at once (`stage_on_grid`);
at prediction refinement.refine gathers live cells into batches of fixed size.

In: features and `CellPrompts`. Out: `CellOutputs`, from which refinement.prompts makes the next
stage's prompts and refinement.fusion the label map.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rfmedsam2_jax.nn import ABSENT_LOGIT, SAM2, ImageFeatures, MemorySlots, apply
from rfmedsam2_jax.nn import memory_bank as memory
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.refinement.config import RefinementConfig, StageConfig
from rfmedsam2_jax.refinement.prompts import (
  CellPrompts,
  anchor_score,
  live_cells,
  nearby_logits,
  next_prompts,
  residual_of,
  sam_prompts,
)

Array = Any  # a JAX array; numpy arrays are taken too

# SAM 2's input statistics (sam2/utils/transforms.py), the usual ones of ImageNet.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class CellOutputs(NamedTuple):
  """What a stage says of N cells.

  logits: float32 [N, 4G, 4G], not gated by presence. iou: float32 [N], predicted.
  presence: float32 [N], logit. pointer: [N, C], `no_obj_ptr` where the object is absent.
  """

  logits: Array
  iou: Array
  presence: Array
  pointer: Array


class CellSlots(NamedTuple):
  """Where the memories of N cells lie in a store of memories.

  place: int32 [N, M], rows of the store. rows, valid: see MemorySlots.
  positions: float32 [N, M], temporal positions of the pointers.
  """

  place: Array
  rows: Array
  valid: Array
  positions: Array


def encode_slices(model: SAM2, params: Params, slices: Array) -> ImageFeatures:
  """Features of slices [B, S, S, 3] with intensities in [0, 1]."""
  return apply(model.config, params, _normalised(slices), method="encode_image")


def _normalised(slices: Array) -> Array:
  return (slices - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)


def remember_cells(model: SAM2, params: Params, embedding: Array, cells: CellPrompts) -> Array:
  """Memory maps [N, G, G, mem_dim] of cells as the previous stage saw them.

  The mask is not binarised; a cell without the object is remembered as a mask of -1024.

  Args:
    embedding: [N, G, G, C], of the cells' slices.
  """
  present = cells.presence > 0
  logits = jnp.where(present[:, None, None], cells.logits, ABSENT_LOGIT)
  return apply(model.config, params, embedding, logits, present, method="remember")


def refine_cells(
  model: SAM2,
  params: Params,
  stage: StageConfig,
  features: ImageFeatures,
  cells: CellPrompts,
  maps: Array,
  pointers: Array,
  slots: CellSlots,
) -> CellOutputs:
  """One stage over N cells.

  Args:
    features: of the cells' slices, leading axis N.
    maps: [R, G, G, mem_dim], the store that `slots.place` points into.
    pointers: [R, C], the previous stage's; read only where the stage uses pointers.
  """
  # A clamped index of an empty slot is masked out, whatever it points at.
  used = slots.valid if stage.pointers else slots.valid[:, :0]
  width = used.shape[1]
  conditioned = apply(
    model.config,
    params,
    features.embedding,
    MemorySlots(
      maps=maps[slots.place],
      rows=slots.rows,
      valid=slots.valid,
      pointers=pointers[slots.place[:, :width]],
      pointer_positions=slots.positions[:, :width],
      pointer_valid=used,
    ),
    method="condition",
  )
  return decode_cells(model, params, stage, conditioned, features, cells)


def decode_cells(
  model: SAM2,
  params: Params,
  stage: StageConfig,
  conditioned: Array,
  features: ImageFeatures,
  cells: CellPrompts,
) -> CellOutputs:
  """Masks from conditioned features and prompts: box and mask together, mask token 0 only."""
  prompts = sam_prompts(cells, stage.box, stage.mask)
  decoded = apply(model.config, params, conditioned, features.high_res, prompts, method="decode")
  mask, presence = bias_of(model, params, stage, features.pixels, cells)
  decoded = decoded._replace(
    masks=decoded.masks.astype(jnp.float32) + mask[:, None],
    presence=decoded.presence.astype(jnp.float32) + presence,
  )
  gated = apply(model.config, params, decoded, method="gate")
  return CellOutputs(
    logits=decoded.masks[:, 0],
    iou=decoded.ious[:, 0].astype(jnp.float32),
    presence=decoded.presence,
    pointer=gated.pointer,
  )


def bias_of(
  model: SAM2,
  params: Params,
  stage: StageConfig,
  pixels: Array | None,
  cells: CellPrompts,
) -> tuple[Array, Array]:
  """What is added to decoded mask logits [N, 4G, 4G] and presence logits [N]: see `residual_of`,
  and the MaskAdapter's correction, where there are `pixels` (ImageFeatures) for it."""
  mask, presence = residual_of(cells, stage)
  if pixels is not None:
    # Without the mask as a prompt the adapter has the image alone.
    nearby = cells.nearby if stage.mask else jnp.zeros_like(cells.nearby)
    mask = mask + apply(model.config, params, pixels, nearby, method="correct_masks")
  return mask, presence


def nearby_on_grid(
  cells: CellPrompts, grid: tuple[int, int], inside: Array, reach: int
) -> Array:
  """`CellPrompts.nearby` of all cells of a [T, Z] grid of tracks and slices.

  Args:
    inside: bool [T, Z]. reach: slices on either side.
  """
  def around(x: Array) -> Array:
    x = x.reshape(*grid, *x.shape[1:])
    padded = jnp.pad(x, [(0, 0), (reach, reach)] + [(0, 0)] * (x.ndim - 2))
    shifted = [padded[:, step : step + grid[1]] for step in range(2 * reach + 1)]
    return jnp.stack(shifted, axis=2)

  nearby = nearby_logits(
    around(cells.logits), around(cells.presence), around(inside.reshape(-1))
  )
  return nearby.reshape(-1, *nearby.shape[2:])


def live_on_grid(cells: CellPrompts, config: RefinementConfig, inside_TL: Array) -> Array:
  """Cells that a stage runs at prediction, bool [T, L]."""
  # What a stage says of padding must not make slices of the volume live.
  present = (cells.presence > 0).reshape(inside_TL.shape) & inside_TL
  return live_cells(present, config.live_margin) & inside_TL


def of_cells(x: Array, tracks: int, length: int) -> Array:
  """What belongs to the slices [B * L, ...] of runs, for each of their cells [B * T * L, ...]."""
  x = x.reshape(-1, 1, length, *x.shape[1:])
  return jnp.broadcast_to(x, (len(x), tracks, *x.shape[2:])).reshape(-1, *x.shape[3:])


def absent_pointer(params: Params, like: Array) -> Array:
  """SAM 2's pointer [C] of a cell without the object, in the dtype of `like`."""
  return params["no_obj_ptr"].reshape(-1).astype(like.dtype)


def grid_slots(
  stage: StageConfig,
  live: Array,
  score: Array,
  given: Array,
  depth: Array | int,
  max_given: int = 0,
  inside: Array | None = None,
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
  model: SAM2,
  params: Params,
  stage: StageConfig,
  config: RefinementConfig,
  features: ImageFeatures,
  cells: CellPrompts,
  pointers: Array | None,
  inside: Array,
  depth: Array,
) -> tuple[CellOutputs, Array]:
  """One stage over all cells of B runs of L slices with T tracks each, N = B * T * L in this order.

  A `stream` stage is trained like `neighbours`, on the previous stage's masks: the recurrence over
  a whole volume is for prediction.

  Args:
    features: of the slices, leading axis B * L. cells: leading axis N.
    pointers: [N, C] of the previous stage, or None in the first.
    inside: bool [B, L], slices that belong to the volume. depth: int32 [B], of the whole volume.

  Returns:
    CellOutputs of all cells; live bool [N], those that the stage would run at prediction.
  """
  length = inside.shape[1]
  count = cells.presence.shape[0]
  tracks = count // inside.size
  grid = (count // length, length)
  inside_TL = jnp.repeat(inside, tracks, axis=0)
  live = live_on_grid(cells, config, inside_TL)
  cell_features = jax.tree.map(lambda x: of_cells(x, tracks, length), features)
  if model.config.adapters.mask:
    reach = model.config.adapters.mask_reach
    cells = cells._replace(nearby=nearby_on_grid(cells, grid, inside_TL, reach))
  if stage.memory == "none":
    conditioned = apply(model.config, params, cell_features.embedding, method="unconditioned")
    outputs = decode_cells(model, params, stage, conditioned, cell_features, cells)
    return outputs, live.reshape(-1)
  table, positions = grid_slots(
    stage,
    live,
    anchor_score(cells.presence, cells.logits).reshape(grid),
    jnp.zeros(grid, bool),
    jnp.repeat(depth, tracks),
    inside=inside_TL,
  )
  width = table.slices.shape[-1]
  first = jnp.arange(grid[0], dtype=jnp.int32)[:, None, None] * length
  slots = CellSlots(
    (first + table.slices).reshape(count, width),
    table.rows.reshape(count, width),
    table.valid.reshape(count, width),
    positions.reshape(count, width),
  )
  maps = remember_cells(model, params, cell_features.embedding, cells)
  if pointers is None:
    pointers = jnp.zeros((count, cell_features.embedding.shape[-1]), maps.dtype)
  outputs = refine_cells(model, params, stage, cell_features, cells, maps, pointers, slots)
  return outputs, live.reshape(-1)


def all_stages_on_grid(
  model: SAM2,
  params: Params,
  config: RefinementConfig,
  slices: Array,
  cells: CellPrompts,
  inside: Array,
  depth: Array,
) -> list[tuple[CellOutputs, Array]]:
  """Every stage over B runs, as training sees them; gradients pass between stages through pointers.

  Args:
    slices: float32 [B * L, S, S, 3] in [0, 1]. cells: stage-0 prompts of N = B * T * L cells.

  Returns:
    Per stage: CellOutputs [N], live bool [N].
  """
  features = encode_slices(model, params, slices)
  results = []
  pointers = None
  for stage in config.stages:
    outputs, live = stage_on_grid(
      model, params, stage, config, features, cells, pointers, inside, depth
    )
    results.append((outputs, live))
    cells = _following(model, config, outputs, live)
    pointers = jnp.where(live[:, None], outputs.pointer, absent_pointer(params, outputs.pointer))
  return results


def _following(
  model: SAM2, config: RefinementConfig, outputs: CellOutputs, live: Array
) -> CellPrompts:
  """The next stage's prompts, as at prediction: a cell that is not live is not run, no organ."""
  presence = jnp.where(live, outputs.presence, ABSENT_LOGIT)
  return next_prompts(outputs.logits, presence, model.config.image_size, config.box_margin)


def masks_on_grid(
  model: SAM2,
  params: Params,
  config: RefinementConfig,
  slices: Array,
  cells: CellPrompts,
  inside: Array,
  depth: Array,
) -> list[tuple[CellOutputs, Array]]:
  """As `all_stages_on_grid`, of the MaskAdapter alone: the rest of SAM 2 is not run.

  As beside a decoder that is silent: stages have to be `residual`. Every structure stays where the
  stage before saw it, and the predicted IoU is 0.
  """
  del depth  # of pointers
  pixels = apply(model.config, params, _normalised(slices), method="pixels")
  length, count = inside.shape[1], cells.presence.shape[0]
  tracks = count // inside.size
  pixels, inside_TL = of_cells(pixels, tracks, length), jnp.repeat(inside, tracks, axis=0)
  nothing = jnp.zeros(count)
  results = []
  for stage in config.stages:
    live = live_on_grid(cells, config, inside_TL)
    nearby = nearby_on_grid(cells, live.shape, inside_TL, model.config.adapters.mask_reach)
    cells = cells._replace(nearby=nearby)
    logits, presence = bias_of(model, params, stage, pixels, cells)
    live = live.reshape(-1)
    outputs = CellOutputs(logits, nothing, presence, nothing[:, None])
    results.append((outputs, live))
    cells = _following(model, config, outputs, live)
  return results
