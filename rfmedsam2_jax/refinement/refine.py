"""All stages over one volume: live cells only, gathered into batches of fixed size.

Cost follows the organs and not D x K. Slices and cells of a batch are spread over the host's
devices. Structures are seen in the whole slices or each in a cut of its own, which is then a slice
like any other. In: slices and the stage-0 `VolumePrompts`. Out: `StageResult`s, for
refinement.fusion.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from scipy.special import expit

from rfmedsam2_jax.base.progress import Passing, Report, below, silent
from rfmedsam2_jax.nn import ABSENT_LOGIT, SAM2
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.parallel.spread import device_count, everywhere
from rfmedsam2_jax.refinement import prompts as prompts_lib
from rfmedsam2_jax.refinement.cell_batches import SliceTable, batches, joined
from rfmedsam2_jax.refinement.config import RefinementConfig
from rfmedsam2_jax.refinement.prompts import CellPrompts, VolumePrompts
from rfmedsam2_jax.refinement.stage_run import StageRun, run_stage
from rfmedsam2_jax.tracking import Cells


class StageResult(NamedTuple):
  """What is known after a stage: of cells that it ran, then of those that only earlier ones ran.

  cells: int [N, 2], organ and slice. logits: float16 [N, 4G, 4G], -1024 where the organ is absent.
  iou, presence (a probability): float32 [N]. boxes: float32 [N, 4], x0 y0 x1 y1 in pixels of the
  S x S image, what the cell was prompted with; has_box: bool [N]. stage: int32 [N], from 1, the one
  that ran the cell last. Masks and boxes lie in what was seen of the slice.
  """

  cells: np.ndarray
  logits: np.ndarray
  iou: np.ndarray
  presence: np.ndarray
  boxes: np.ndarray
  has_box: np.ndarray
  stage: np.ndarray


_next = jax.jit(prompts_lib.next_prompts, static_argnums=(2, 3))

# Features of so many slices are held at once, where structures have cuts; at 512 pixels 2 GiB in
# bfloat16.
_HELD = 1024


def refine_volume(
  model: SAM2, params: Params, config: RefinementConfig, slices: Callable[[np.ndarray], np.ndarray],
  prompts: VolumePrompts, progress: Report = silent, views: Sequence[int] | None = None,
) -> list[StageResult]:
  """Runs the stages over one volume; gives a StageResult each, N = 0 where no cell was ever live.

  Args:
    slices: gives float32 [n, S, S, 3] in [0, 1] for slice numbers [n].
    prompts: of stage 0. progress: takes lines about what is done.
    views: of each structure [K], which of several series of slices shows it; slice z of series v
      has the number v D + z. None: all are shown by the slices 0 to D - 1.
  """
  shown = np.zeros(len(prompts.presence), int) if views is None else np.array(views)
  params = everywhere(params)
  parts = []
  for organs in _groups(shown, _live(prompts, config)):
    part = VolumePrompts(*(x[organs] for x in prompts))
    found = _refined(model, params, config, slices, part, progress, shown[organs])
    parts.append([x._replace(cells=np.column_stack([organs[x.cells[:, 0]], x.cells[:, 1]]))
                  for x in found])
  return [StageResult(*map(np.concatenate, zip(*stage, strict=True)))
          for stage in zip(*parts, strict=True)]


def _groups(views: np.ndarray, live: np.ndarray) -> Iterator[np.ndarray]:
  """Structures [n] that are refined together: all of a view, and as many views as can be held."""
  needed = {view: int(live[views == view].any(axis=0).sum()) for view in np.unique(views).tolist()}
  together: list[int] = []
  for view, count in needed.items():
    if together and sum(needed[v] for v in together) + count > _HELD:
      yield np.flatnonzero(np.isin(views, together))
      together = []
    together.append(view)
  yield np.flatnonzero(np.isin(views, together))


def _live(prompts: VolumePrompts, config: RefinementConfig) -> np.ndarray:
  """Cells that a stage runs, bool [K, D]."""
  return prompts_lib.live_cells(prompts.presence > 0, config.live_margin) | prompts.given


def _refined(
  model: SAM2, params: Params, config: RefinementConfig, slices: Callable[[np.ndarray], np.ndarray],
  prompts: VolumePrompts, progress: Report, views: np.ndarray,
) -> list[StageResult]:
  """`refine_volume` of structures whose slices are held at once; they do not know each other."""
  absent = np.asarray(params["no_obj_ptr"], np.float32).reshape(-1)
  encoded = SliceTable(model, params, slices, config.slices_per_batch * device_count())
  pointers = np.broadcast_to(absent, (*prompts.presence.shape, model.config.d_model))
  side, none = 4 * model.config.grid, np.zeros(0, np.float32)
  result = StageResult(
    np.zeros((0, 2), np.int32), np.zeros((0, side, side), np.float16), none, none,
    np.zeros((0, 4), np.float32), np.zeros(0, bool), np.zeros(0, np.int32),
  )
  results = []
  for number, stage in enumerate(config.stages, 1):
    live = _live(prompts, config)
    if not live.any():
      results.append(result)
      continue
    organ, at = np.nonzero(live)
    encoded.need(np.unique(views[organ] * live.shape[1] + at), progress)
    report = below(progress, f"stage {number}, ")
    run = StageRun(model, params, config, stage, encoded, views, prompts, pointers, live, report)
    progress(Passing(f"stage {number}: {len(run.cells)} cells on {len(encoded.row_of)} slices"))
    outputs = run_stage(run)
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
