"""All stages over one volume: live cells only, gathered into batches of fixed size.

Cost follows the organs and not D x K. Slices and cells of a batch are spread over the host's
devices. In: slices and the stage-0 `VolumePrompts`. Out: `StageResult`s, for refinement.fusion.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from rfmedsam2_jax import tracking
from rfmedsam2_jax.base.progress import Passing, Progress, Report, below, compiling, silent
from rfmedsam2_jax.nn import ABSENT_LOGIT, SAM2
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.parallel.spread import device_count, everywhere, spread
from rfmedsam2_jax.refinement import prompts as prompts_lib
from rfmedsam2_jax.refinement import stages as stages_lib
from rfmedsam2_jax.refinement.cell_batches import SliceTable, batches, bucket, joined, padded, table
from rfmedsam2_jax.refinement.config import RefinementConfig, StageConfig
from rfmedsam2_jax.refinement.prompts import CellPrompts
from rfmedsam2_jax.tracking import Cells
from rfmedsam2_jax.tracking.recurrence import remember_cells


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
  S x S image, what the cell was prompted with; has_box: bool [N]. stage: int32 [N], from 1, the one
  that ran the cell last.
  """

  cells: np.ndarray
  logits: np.ndarray
  iou: np.ndarray
  presence: np.ndarray
  boxes: np.ndarray
  has_box: np.ndarray
  stage: np.ndarray


def _remember_rows(model, params, embedding, rows, cells):
  return remember_cells(model, params, embedding[rows], cells.logits, cells.presence)


def _run_rows(model, params, stage, features, memories, rows, cells, slots):
  here = jax.tree.map(lambda x: x[rows], features)
  return stages_lib.refine_cells(model, params, stage, here, cells, memories, slots)


# Compiled once per (model, stage): both are hashable and static. Parameters and stores, of features
# and of memories, lie on every device.
_remember = spread(_remember_rows, static=[0], whole=[1, 2])
_run = spread(_run_rows, static=[0, 2], whole=[1, 3, 4])
_track = jax.jit(tracking.track, static_argnums=0)
_bias = jax.jit(stages_lib.bias_of, static_argnums=(0, 2))
_next = jax.jit(prompts_lib.next_prompts, static_argnums=(2, 3))
_score = jax.jit(prompts_lib.anchor_score)
_slots = jax.jit(stages_lib.grid_slots, static_argnums=(0, 5))


@dataclasses.dataclass(frozen=True, eq=False)
class StageRun:
  """One stage over one volume: its cells, and what the stage before said of them.

  live: bool [K, D], the cells to run. pointers: [K, D, C], of the stage before.
  """

  model: SAM2
  params: Params
  config: RefinementConfig
  stage: StageConfig
  encoded: SliceTable
  prompts: VolumePrompts
  pointers: np.ndarray
  live: np.ndarray
  report: Report

  @functools.cached_property
  def cells(self) -> np.ndarray:
    """Organ and slice of the live cells, int [N, 2]."""
    return np.argwhere(self.live)

  @property
  def depth(self) -> int:
    return self.live.shape[1]

  def on_grid(self, values: np.ndarray) -> np.ndarray:
    """[K, D, ...]: values [N, ...] of the live cells, zero elsewhere."""
    grid = np.zeros((*self.live.shape, *values.shape[1:]), values.dtype)
    grid[self.live] = values
    return grid

  def gathered(self, organ: np.ndarray, at: np.ndarray) -> CellPrompts[np.ndarray]:
    """What is known of cells; enough for memories and scores."""
    # The fields of both start alike.
    cells = CellPrompts(*(x[organ, at] for x in self.prompts[: len(CellPrompts._fields) - 1]))
    return cells._replace(logits=cells.logits.astype(np.float32))

  def to_decode(self, organ: np.ndarray, at: np.ndarray) -> CellPrompts[np.ndarray]:
    """With what a MaskAdapter asks for besides."""
    cells, adapters = self.gathered(organ, at), self.model.config.adapters
    if not adapters.mask:
      return cells
    around = at[:, None] + np.arange(-adapters.mask_reach, adapters.mask_reach + 1)
    inside = (around >= 0) & (around < self.depth)
    here = organ[:, None], np.clip(around, 0, self.depth - 1)
    logits = self.prompts.logits[here].astype(np.float32)
    nearby = prompts_lib.nearby_logits(logits, self.prompts.presence[here], inside)
    return cells._replace(nearby=nearby)

  def scored(
    self, size: int, watch: Callable[[np.ndarray, CellPrompts[np.ndarray]], None]
  ) -> np.ndarray:
    """Anchor scores float32 [K, D]; `watch` takes each batch of `size` cells, and their indices."""
    scores = []
    for index in batches(len(self.cells), size):
      batch = self.gathered(*self.cells[index].T)
      scores.append(np.asarray(_score(batch.presence, batch.logits)))
      watch(index, batch)
    return self.on_grid(joined(scores, len(self.cells)))


def refine_volume(
  model: SAM2, params: Params, config: RefinementConfig, slices: Callable[[np.ndarray], np.ndarray],
  prompts: VolumePrompts, progress: Report = silent,
) -> list[StageResult]:
  """Runs the stages over one volume; gives a StageResult each, N = 0 where no cell was ever live.

  Args:
    slices: gives float32 [n, S, S, 3] in [0, 1] for slice numbers [n].
    prompts: of stage 0. progress: takes lines about what is done.
  """
  prompts = prompts._replace(logits=prompts.logits.copy())
  absent = np.asarray(params["no_obj_ptr"], np.float32).reshape(-1)
  params = everywhere(params)
  encoded = SliceTable(model, params, slices, config.slices_per_batch * device_count())
  pointers = np.broadcast_to(absent, (*prompts.presence.shape, model.config.d_model))
  side, none = 4 * model.config.grid, np.zeros(0, np.float32)
  result = StageResult(
    np.zeros((0, 2), np.int32), np.zeros((0, side, side), np.float16), none, none,
    np.zeros((0, 4), np.float32), np.zeros(0, bool), np.zeros(0, np.int32),
  )
  results = []
  for number, stage in enumerate(config.stages, 1):
    live = prompts_lib.live_cells(prompts.presence > 0, config.live_margin) | prompts.given
    if not live.any():
      results.append(result)
      continue
    encoded.need(np.flatnonzero(live.any(axis=0)), progress)
    report = below(progress, f"stage {number}, ")
    run = StageRun(model, params, config, stage, encoded, prompts, pointers, live, report)
    progress(Passing(f"stage {number}: {len(run.cells)} cells on {len(encoded.row_of)} slices"))
    outputs = _run_stream(run) if stage.memory == "stream" else _run_cells(run)
    shown = np.where((outputs.presence > 0)[:, None, None], outputs.logits, ABSENT_LOGIT)
    new = StageResult(
      run.cells.astype(np.int32), shown.astype(np.float16), outputs.iou, expit(outputs.presence),
      prompts.boxes[live], prompts.has_box[live], np.full(len(run.cells), number, np.int32),
    )
    # Where an earlier stage found nothing and this one did not look again, nothing is there: the
    # generator's vote, which stands where no stage ever ran, must not come back.
    earlier = ~live[tuple(result.cells.T)]
    pairs = zip(new, result, strict=True)
    result = StageResult(*(np.concatenate([now, before[earlier]]) for now, before in pairs))
    results.append(result)
    pointers = np.broadcast_to(absent, pointers.shape).copy()
    pointers[live] = outputs.pointer
    prompts = _carry_on(run, outputs)
  return results


def _carry_on(run: StageRun, outputs: Cells[np.ndarray]) -> VolumePrompts:
  """The next stage's prompts: from this stage's outputs where it ran; no organ elsewhere."""
  prompts, config, fixed = run.prompts, run.config, run.prompts.fixed_boxes
  side, margin = run.model.config.image_size, config.box_margin
  cells: CellPrompts[np.ndarray] = joined([
    jax.device_get(_next(outputs.logits[index], outputs.presence[index], side, margin))
    for index in batches(len(run.cells), config.cells_per_batch)
  ], len(run.cells))
  prompts.logits[run.live] = cells.logits
  presence = np.where(fixed, prompts.presence, run.on_grid(cells.presence))
  return prompts._replace(
    presence=presence, has_mask=run.on_grid(cells.has_mask) & (presence > 0),
    boxes=np.where((run.live & ~fixed)[..., None], run.on_grid(cells.boxes), prompts.boxes),
    has_box=np.where(fixed, prompts.has_box, run.on_grid(cells.has_box)),
  )


def _run_cells(run: StageRun) -> Cells[np.ndarray]:
  """`neighbours` and `none`: every cell for itself, given the previous stage."""
  size = run.config.cells_per_batch * device_count()
  count = len(run.cells)
  rows, total = run.encoded.rows(run.cells[:, 1]), bucket(count, size)
  program = run.model, run.stage, size, total, run.encoded.room
  new = compiling("the network", _run, program, run.report)
  near = run.stage.memory == "neighbours"
  memories, slots_of = _remembered(run, rows, size, total, new) if near else (None, None)
  progress, outputs = Progress("cells", run.report, new), []
  for index in batches(count, size):
    progress(int(index[0]), count)
    outputs.append(jax.device_get(_run(
      run.model, run.params, run.stage, run.encoded.features, memories, rows[index],
      run.to_decode(*run.cells[index].T), slots_of and slots_of(index),
    )))
  return joined(outputs, count)


def _remembered(
  run: StageRun, rows: np.ndarray, size: int, total: int, new: bool
) -> tuple[stages_lib.Memories, Callable[[np.ndarray], stages_lib.CellSlots[np.ndarray]]]:
  """The memories of all live cells, in a table of `total`, and which of them cells read.

  Args:
    rows: of the cells' slices in the table of features. new: the programs are compiled now.
  """
  progress, maps = Progress("memories", run.report, new), []

  def remember(index: np.ndarray, batch: CellPrompts[np.ndarray]) -> None:
    progress(int(index[0]), len(run.cells))
    embedding = run.encoded.features.embedding
    maps.append(jax.device_get(_remember(run.model, run.params, embedding, rows[index], batch)))

  scores = run.scored(size, remember)
  # Padded to 16 n, so that volumes of similar depth share a compilation; padding is not live.
  deep = [(0, 0), (0, -run.depth % 16)]
  grids = (np.pad(x, deep) for x in (run.live, scores, run.prompts.given))
  max_given = int(run.prompts.given.sum(axis=1).max())
  slots, positions = jax.device_get(_slots(run.stage, *grids, run.depth, max_given))
  # Where a cell's memory lies in the table of memories; empty slots point at row 0.
  place = run.on_grid(np.arange(len(run.cells), dtype=np.int32))

  def slots_of(index: np.ndarray) -> stages_lib.CellSlots[np.ndarray]:
    o, z = run.cells[index].T
    valid = slots.valid[o, z]
    row = np.where(valid, place[o[:, None], np.minimum(slots.slices[o, z], run.depth - 1)], 0)
    return stages_lib.CellSlots(row, slots.rows[o, z], valid, positions[o, z])

  known = joined(maps, len(run.cells)), run.pointers[run.live]
  return table(stages_lib.Memories(*known), total), slots_of


def _run_stream(run: StageRun) -> Cells[np.ndarray]:
  """`stream`: SAM 2's recurrence outward from each organ's anchor, one organ after the other.

  One track at a time keeps the memory small, on one device; slices between its first and its last
  live one that are not live are skipped, not remembered.
  """
  config, live, stage = run.config, run.live, run.stage
  scores, found = run.scored(config.cells_per_batch, lambda *batch: None), []
  progress, organs = Progress("structures", run.report), np.unique(run.cells[:, 0])
  for done, organ in enumerate(organs):
    progress(done, len(organs))
    at = np.flatnonzero(live[organ])
    first, last = int(at[0]), int(at[-1])
    total = bucket(last - first + 1, config.slices_per_batch)
    compiling("the network", _track, (run.model, stage, total, run.depth), run.report)
    span = padded(np.arange(first, last + 1), total)
    cell = jax.tree.map(jnp.asarray, run.to_decode(np.full(total, organ), span))
    rows = run.encoded.rows(np.where(live[organ, span], span, at[0]))
    features = jax.tree.map(lambda x, rows=rows: x[rows], run.encoded.features)
    bias = _bias(run.model, run.params, stage, features.pixels, cell)
    votes = scores[organ] + 2.0 * run.prompts.given[organ]
    start = int(np.argmax(np.where(live[organ], votes, -1)))
    prompts, bias = jax.tree.map(lambda x: x[None], (stages_lib.sam_prompts(cell, stage), bias))
    active = jnp.asarray(np.isin(first + np.arange(total), at))[None]
    begin = jnp.array([start - first], jnp.int32)
    inputs = tracking.TrackInputs(prompts, begin, active, jnp.int32(run.depth), bias)
    out = _track(run.model, run.params, features, inputs)
    found.append(jax.tree.map(lambda x, i=at - first: np.asarray(x)[0, i], out))
  return joined(found, len(run.cells))
