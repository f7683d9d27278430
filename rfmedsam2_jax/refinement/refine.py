"""All stages over one volume: live cells only, gathered into batches of fixed size.

Cost follows the organs and not D x K. Slices are encoded once, the memory of a cell is made once
per stage, and everything that is compiled has shapes that many volumes share. Slices and cells of
a batch are spread over the devices of the host.

In: slices and the stage-0 `VolumePrompts`. Out: one `StageResult` per stage, for refinement.fusion.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax import tracking
from rfmedsam2_jax.base.progress import Passing, Progress, Report, below, compiling, silent
from rfmedsam2_jax.nn import ABSENT_LOGIT, SAM2, apply
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.parallel.spread import device_count, everywhere, spread
from rfmedsam2_jax.refinement import stages as stages_lib
from rfmedsam2_jax.refinement.cell_batches import (
  SliceStore,
  batches,
  bucket,
  joined,
  on_host,
  padded,
)
from rfmedsam2_jax.refinement.config import RefinementConfig, StageConfig
from rfmedsam2_jax.refinement.prompts import (
  CellPrompts,
  anchor_score,
  live_cells,
  nearby_logits,
  next_prompts,
  sam_prompts,
)

DEPTH_BUCKET = 16  # depths are padded to multiples of it where they are part of a compiled shape


class VolumePrompts(NamedTuple):
  """Stage-0 prompts of all cells of a volume, as numpy arrays on the host; see CellPrompts.

  logits: float16 [K, D, 4G, 4G]. presence: float32 [K, D]. boxes: float32 [K, D, 4].
  has_box, has_mask: bool [K, D]. points: float32 [K, D, Q, 2]; point_labels: int32 [K, D, Q].
  given: bool [K, D], cells with a prompt that a person gave; further anchors.
  fixed_boxes: bool [K, D], cells whose box and presence hold through all stages (oracle, given).
  """

  logits: np.ndarray
  presence: np.ndarray
  boxes: np.ndarray
  has_box: np.ndarray
  has_mask: np.ndarray
  points: np.ndarray
  point_labels: np.ndarray
  given: np.ndarray
  fixed_boxes: np.ndarray


class StageResult(NamedTuple):
  """What is known after a stage: of cells that it ran, then of those that only earlier ones ran.

  cells: int [N, 2], organ and slice. logits: float16 [N, 4G, 4G], -1024 where the organ is absent.
  iou, presence (a probability): float32 [N]. boxes: float32 [N, 4], x0 y0 x1 y1 in pixels of the
  S x S image, what the cell was prompted with; has_box: bool [N].
  """

  cells: np.ndarray
  logits: np.ndarray
  iou: np.ndarray
  presence: np.ndarray
  boxes: np.ndarray
  has_box: np.ndarray


def sigmoid(logits: np.ndarray) -> np.ndarray:
  """float32, without overflow."""
  x = np.asarray(logits, np.float32)
  return (0.5 * (1.0 + np.tanh(0.5 * x))).astype(np.float32)


def _rows(store: Any, rows: Any) -> Any:
  return jax.tree.map(lambda x: x[rows], store)


def _remember_rows(model, params, embedding, rows, cells):
  return stages_lib.remember_cells(model, params, embedding[rows], cells)


def _refine_rows(model, params, stage, features, maps, pointers, rows, cells, slots):
  here = _rows(features, rows)
  return stages_lib.refine_cells(model, params, stage, here, cells, maps, pointers, slots)


def _decode_rows(model, params, stage, features, rows, cells):
  here = _rows(features, rows)
  conditioned = apply(model.config, params, here.embedding, method="unconditioned")
  return stages_lib.decode_cells(model, params, stage, conditioned, here, cells)


# Compiled once per (model, stage): both are hashable and static. Parameters and stores, of features
# and of memories, lie on every device.
_remember = spread(_remember_rows, static=[0], whole=[1, 2])
_refine = spread(_refine_rows, static=[0, 2], whole=[1, 3, 4, 5])
_decode = spread(_decode_rows, static=[0, 2], whole=[1, 3])
_track = jax.jit(tracking.track, static_argnums=0)
_bias = jax.jit(stages_lib.bias_of, static_argnums=(0, 2))
_next = jax.jit(next_prompts, static_argnums=(2, 3))
_score = jax.jit(anchor_score)
_slots = jax.jit(stages_lib.grid_slots, static_argnums=(0, 5))


def refine_volume(
  model: SAM2,
  params: Params,
  config: RefinementConfig,
  slices: Callable[[np.ndarray], np.ndarray],
  prompts: VolumePrompts,
  progress: Report = silent,
) -> list[StageResult]:
  """Runs the stages of `config` over one volume.

  Args:
    slices: gives float32 [n, S, S, 3] in [0, 1] for slice numbers [n].
    prompts: of stage 0.
    progress: takes lines about what is done.

  Returns:
    One StageResult per stage; N = 0 where no cell was ever live.
  """
  side = model.config.image_size
  prompts = prompts._replace(logits=prompts.logits.copy())
  absent = np.asarray(params["no_obj_ptr"], np.float32).reshape(-1)
  params = everywhere(params)
  encoded = SliceStore(model, params, slices, config.slices_per_batch * device_count())
  organs, depth = prompts.presence.shape
  pointers = np.broadcast_to(absent, (organs, depth, model.config.d_model))
  result = _nothing(model)
  results = []
  for number, stage in enumerate(config.stages, 1):
    live = live_cells(prompts.presence > 0, config.live_margin) | prompts.given
    cells = np.argwhere(live)
    if not len(cells):
      results.append(result)
      continue
    encoded.need(np.unique(cells[:, 1]), progress)
    progress(Passing(f"stage {number}: {len(cells)} cells on {encoded.count} slices"))
    run = _run_stream if stage.memory == "stream" else _run_cells
    outputs = run(
      model, params, stage, config, encoded, prompts, pointers, live, cells,
      below(progress, f"stage {number}, "),
    )
    shown = (outputs.presence > 0)[:, None, None]
    organ, at = cells.T
    new = StageResult(
      cells.astype(np.int32),
      np.where(shown, outputs.logits, ABSENT_LOGIT).astype(np.float16),
      outputs.iou,
      sigmoid(outputs.presence),
      prompts.boxes[organ, at],
      prompts.has_box[organ, at],
    )
    # Where an earlier stage found nothing and this one did not look again, nothing is there: the
    # generator's vote, which stands where no stage ever ran, must not come back.
    earlier = ~live[tuple(result.cells.T)]
    pairs = zip(new, result, strict=True)
    result = StageResult(*(np.concatenate([now, before[earlier]]) for now, before in pairs))
    results.append(result)
    pointers = np.broadcast_to(absent, pointers.shape).copy()
    pointers[organ, at] = outputs.pointer
    prompts = _carry_on(prompts, cells, outputs, side, config)
  return results


def _nothing(model: SAM2) -> StageResult:
  side = 4 * model.config.grid
  none = np.zeros(0, np.float32)
  return StageResult(
    np.zeros((0, 2), np.int32), np.zeros((0, side, side), np.float16), none, none,
    np.zeros((0, 4), np.float32), np.zeros(0, bool),
  )


def _carry_on(prompts, cells, outputs, side, config) -> VolumePrompts:
  """The next stage's prompts: from this stage's outputs where it ran; no organ elsewhere."""
  organ, at = cells.T
  new: list[CellPrompts] = []
  size = config.cells_per_batch
  for where, index in batches(len(cells), size):
    batch = _next(outputs.logits[index], outputs.presence[index], side, config.box_margin)
    new.append(on_host(batch, where.stop - where.start))
  cell = jax.tree.map(lambda *parts: np.concatenate(parts), *new)
  presence = np.zeros_like(prompts.presence)
  has_mask = np.zeros_like(prompts.has_mask)
  has_box = prompts.has_box & prompts.fixed_boxes
  boxes = prompts.boxes.copy()
  logits = prompts.logits
  presence[organ, at] = cell.presence
  has_mask[organ, at] = cell.has_mask
  logits[organ, at] = cell.logits
  free = ~prompts.fixed_boxes[organ, at]
  boxes[organ[free], at[free]] = cell.boxes[free]
  has_box[organ[free], at[free]] = cell.has_box[free]
  presence = np.where(prompts.fixed_boxes, prompts.presence, presence)
  has_mask &= presence > 0
  return prompts._replace(
    logits=logits, presence=presence, boxes=boxes, has_box=has_box, has_mask=has_mask
  )


def _gather(prompts: VolumePrompts, organ: np.ndarray, at: np.ndarray) -> CellPrompts:
  return CellPrompts(
    logits=prompts.logits[organ, at].astype(np.float32),
    presence=prompts.presence[organ, at],
    boxes=prompts.boxes[organ, at],
    has_box=prompts.has_box[organ, at],
    has_mask=prompts.has_mask[organ, at],
    points=prompts.points[organ, at],
    point_labels=prompts.point_labels[organ, at],
  )


def _gather_to_decode(
  model: SAM2, prompts: VolumePrompts, organ: np.ndarray, at: np.ndarray
) -> CellPrompts:
  """With what a MaskAdapter asks for; memories and scores have no need of it."""
  cells, adapters = _gather(prompts, organ, at), model.config.adapters
  if not adapters.mask:
    return cells
  around = at[:, None] + np.arange(-adapters.mask_reach, adapters.mask_reach + 1)
  depth = prompts.presence.shape[1]
  here = organ[:, None], np.clip(around, 0, depth - 1)
  logits = prompts.logits[here].astype(np.float32)
  inside = (around >= 0) & (around < depth)
  return cells._replace(nearby=nearby_logits(logits, prompts.presence[here], inside))


def _scores(prompts, live, cells, size) -> np.ndarray:
  """Anchor scores [K, D]; zero where a cell is not live."""
  scores = np.zeros(live.shape, np.float32)
  organ, at = cells.T
  for where, index in batches(len(cells), size):
    batch = _gather(prompts, organ[index], at[index])
    n = where.stop - where.start
    scores[organ[where], at[where]] = np.asarray(_score(batch.presence, batch.logits))[:n]
  return scores


def _run_cells(
  model, params, stage: StageConfig, config, encoded, prompts, pointers, live, cells, report
) -> stages_lib.CellOutputs:
  """`neighbours` and `none`: every cell for itself, given the previous stage."""
  size = config.cells_per_batch * device_count()
  organ, at = cells.T
  depth = live.shape[1]
  rows = encoded.rows(at)
  outputs = []
  total = bucket(len(cells), size)
  program = _refine if stage.memory == "neighbours" else _decode
  new = compiling("the network", program, (model, stage, size, total, encoded.room), report)
  if stage.memory == "neighbours":
    scores = _scores(prompts, live, cells, size)
    # Padded, so that volumes of similar depth share a compilation; padding is not live.
    deep = [(0, 0), (0, -depth % DEPTH_BUCKET)]
    grids = (np.pad(x, deep) for x in (live, scores, prompts.given))
    max_given = int(prompts.given.sum(axis=1).max())
    table, positions = on_host(_slots(stage, *grids, depth, max_given), len(live))
    # Where a cell's memory lies in the store of live cells; empty slots point at row 0.
    place = np.zeros(live.shape, np.int32)
    place[organ, at] = np.arange(len(cells))
    progress, maps = Progress("memories", report, new), []
    for where, index in batches(len(cells), size):
      progress(where.start, len(cells))
      batch = _gather(prompts, organ[index], at[index])
      remembered = _remember(model, params, encoded.features.embedding, rows[index], batch)
      maps.append(on_host(remembered, where.stop - where.start))
    store = joined(maps, total)
    pointer_store = everywhere(padded(pointers[organ, at], total))
  progress = Progress("cells", report, new)
  for where, index in batches(len(cells), size):
    progress(where.start, len(cells))
    batch = _gather_to_decode(model, prompts, organ[index], at[index])
    if stage.memory == "neighbours":
      o, z = organ[index], at[index]
      valid = table.valid[o, z]
      row = np.where(valid, place[o[:, None], np.minimum(table.slices[o, z], depth - 1)], 0)
      slots = stages_lib.CellSlots(row, table.rows[o, z], valid, positions[o, z])
      out = _refine(
        model, params, stage, encoded.features, store, pointer_store, rows[index], batch, slots
      )
    else:
      out = _decode(model, params, stage, encoded.features, rows[index], batch)
    outputs.append(on_host(out, where.stop - where.start))
  return stages_lib.CellOutputs(*(np.concatenate(parts) for parts in zip(*outputs, strict=True)))


def _run_stream(
  model, params, stage: StageConfig, config, encoded, prompts, pointers, live, cells, report
) -> stages_lib.CellOutputs:
  """`stream`: SAM 2's recurrence outward from each organ's anchor, one organ after the other.

  One track at a time keeps the memory small, on one device; slices between its first and its last
  live one that are not live are skipped, not remembered.
  """
  del pointers  # the recurrence makes its own
  scores = _scores(prompts, live, cells, config.cells_per_batch)
  found = []
  progress, organs = Progress("structures", report, compiles=True), np.unique(cells[:, 0])
  for done, organ in enumerate(organs):
    progress(done, len(organs))
    at = np.flatnonzero(live[organ])
    first, last = int(at[0]), int(at[-1])
    length = last - first + 1
    total = bucket(length, config.slices_per_batch)
    compiling("the network", _track, (model, stage, total, live.shape[1]), report)
    span = padded(np.arange(first, last + 1), total)
    active = np.zeros(total, bool)
    active[at - first] = True
    gathered = _gather_to_decode(model, prompts, np.full(total, organ), span)
    cell = jax.tree.map(jnp.asarray, gathered)
    batch = sam_prompts(cell, stage.box, stage.mask)
    store_rows = encoded.rows(np.where(live[organ, span], span, at[0]))
    features = _rows(encoded.features, store_rows)
    mask_bias, presence_bias = _bias(model, params, stage, features.pixels, cell)
    start = int(np.argmax(np.where(live[organ], scores[organ] + 2.0 * prompts.given[organ], -1)))
    out = _track(
      model,
      params,
      features,
      tracking.TrackInputs(
        prompts=jax.tree.map(lambda x: x[None], batch),
        start=jnp.array([start - first], jnp.int32),
        active=jnp.asarray(active)[None],
        depth=jnp.int32(live.shape[1]),
        bias=tracking.Bias(mask_bias[None], presence_bias[None]),
      ),
    )
    found.append(jax.tree.map(lambda x, i=at - first: np.asarray(x)[0, i], out))
  return stages_lib.CellOutputs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
