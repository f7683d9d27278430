"""One stage over one volume: its live cells, gathered into batches of fixed size.

In: features of slices and what the stage before said. Out: `Cells`, one for each live cell.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax import tracking
from rfmedsam2_jax.base.progress import Progress, Report, compiling
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.parallel.spread import device_count, spread
from rfmedsam2_jax.refinement import prompts as prompts_lib
from rfmedsam2_jax.refinement import stages as stages_lib
from rfmedsam2_jax.refinement.cell_batches import SliceTable, batches, bucket, joined, padded, table
from rfmedsam2_jax.refinement.config import RefinementConfig, StageConfig
from rfmedsam2_jax.refinement.prompts import CellPrompts, VolumePrompts
from rfmedsam2_jax.tracking import Cells
from rfmedsam2_jax.tracking.recurrence import remember_cells


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
_score = jax.jit(prompts_lib.anchor_score)
_slots = jax.jit(stages_lib.grid_slots, static_argnums=(0, 5))


@dataclasses.dataclass(frozen=True, eq=False)
class StageRun:
  """One stage over one volume: its cells, and what the stage before said of them.

  views: int [K], see `refine_volume`. live: bool [K, D], the cells to run.
  pointers: [K, D, C], of the stage before.
  """

  model: SAM2
  params: Params
  config: RefinementConfig
  stage: StageConfig
  encoded: SliceTable
  views: np.ndarray
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

  def rows(self, organ: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Where the features of cells lie in the table."""
    return self.encoded.rows(self.views[organ] * self.depth + at)

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


def run_stage(run: StageRun) -> Cells[np.ndarray]:
  """What the stage says of its cells [N]."""
  return _run_stream(run) if run.stage.memory == "stream" else _run_cells(run)


def _run_cells(run: StageRun) -> Cells[np.ndarray]:
  """`neighbours` and `none`: every cell for itself, given the previous stage."""
  size = run.config.cells_per_batch * device_count()
  count = len(run.cells)
  rows, total = run.rows(*run.cells.T), bucket(count, size)
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
    rows = run.rows(np.full(total, organ), np.where(live[organ, span], span, at[0]))
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
