"""Two organs on ten slices, refined by a very small SAM 2, and one stage cell by cell."""

import functools
from unittest import mock

import jax
import numpy as np
from small_sam2 import MASK_SIDE, MODEL, SMALL, drawn, images, volume_prompts, with_presence

from rfmedsam2_jax.nn import MemorySlots, box_prompts
from rfmedsam2_jax.refinement import RefinementConfig, StageConfig, refine_volume
from rfmedsam2_jax.refinement import stages as stages_lib
from rfmedsam2_jax.refinement.prompts import CellPrompts
from rfmedsam2_jax.tracking import Cells

NEAR = StageConfig(reach=2)
POINTERS = StageConfig(reach=2, pointers=True)
ALONE = StageConfig(memory="none")
# Two organs on ten slices; cells without the organ beside cells with it, a gap wider than the
# margin, both ends of the volume.
PRESENT = np.array([[0, 1, 1, 0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]], bool)
DEPTH = PRESENT.shape[1]


class _FewSlices(RefinementConfig):
  slices_per_batch = 4


CONFIG = _FewSlices(stages=(NEAR, POINTERS), live_margin=2, cells_per_batch=8)


@functools.lru_cache
def params_of():
  """Presence logits that lie around zero on these cells, so that some are gated."""
  params = drawn(presence_bias=0.0)
  out = reference(params, StageConfig(), features_of(params), start_cells(), None, CONFIG, DEPTH)[0]
  return with_presence(params, -float(np.median([o.presence for o in out.values()])))


@functools.lru_cache
def features_in_jit():
  return jax.jit(lambda params, x: stages_lib.encode_slices(MODEL, params, x))


def features_of(params, count=DEPTH):
  return features_in_jit()(params, images(count))


def start_cells(present=PRESENT):
  """CellPrompts with leading axis K * D."""
  prompts = volume_prompts(present)
  flat = {name: getattr(prompts, name).reshape(present.size, *getattr(prompts, name).shape[2:])
          for name in CellPrompts._fields if name != "nearby"}
  return CellPrompts(**flat | {"logits": flat["logits"].astype(np.float32)})


@functools.partial(jax.jit, static_argnames="method")
def sam(params, method, *inputs):
  return MODEL.apply({"params": params}, *inputs, method=method)


def reference(params, stage, features, cells, pointers, config, depth):
  """One stage over two tracks in plain Python, with exactly the neighbours that exist.

  Returns:
    {(track, slice): Cells of one cell} of live cells, and what each of them remembered.
  """
  tracks = len(cells.presence) // depth
  presence = np.asarray(cells.presence).reshape(tracks, depth)
  outputs, memories = {}, {}
  for k in range(tracks):
    found = [z for z in range(depth) if presence[k, z] > 0]
    live = [z for z in range(depth) if any(abs(z - p) <= config.live_margin for p in found)]
    maps, score = {}, {}
    for z in live:
      i = k * depth + z
      present = presence[k, z] > 0
      mask = cells.logits[i] if present else np.full((MASK_SIDE, MASK_SIDE), -1024.0, np.float32)
      maps[z] = sam(
        params, "remember", features.embedding[z][None], mask[None], np.array([present])
      )
      odds = np.asarray(cells.logits[i], np.float64)
      inside = 1 / (1 + np.exp(-odds[odds > 0]))
      score[z] = presence[k, z] * (inside.mean() if inside.size else 0.0)
    best = max(live, key=lambda z: score[z]) if live else None
    for z in live:
      i = k * depth + z
      anchor = [best] if stage.anchors else []
      here = [(t, abs(z - t) - 1) for t in live
              if 1 <= abs(z - t) <= stage.reach and t not in anchor]
      here += [(t, 6) for t in anchor if t != z]
      here = [] if stage.memory == "none" else here
      embedding = features.embedding[z][None]
      if here:
        with_pointers = [t for t, _ in here] if stage.pointers else []
        span = min(depth, 16) - 1
        slots = MemorySlots(
          maps=np.stack([maps[t] for t, _ in here], 1),
          rows=np.array([[row for _, row in here]], np.int32),
          valid=np.ones((1, len(here)), bool),
          pointers=np.array([[pointers[k * depth + t] for t in with_pointers]], np.float32).reshape(
            1, len(with_pointers), SMALL.d_model
          ),
          pointer_positions=np.array([[(z - t) / span for t in with_pointers]], np.float32),
          pointer_valid=np.ones((1, len(with_pointers)), bool),
        )
        conditioned = sam(params, "condition", embedding, slots)
      else:
        conditioned = embedding + params["no_mem_embed"]
      prompts = box_prompts(
        cells.boxes[i][None], np.array([cells.has_box[i]]), cells.logits[i][None],
        np.array([cells.has_mask[i]]),
      )
      high_res = tuple(x[z][None] for x in features.high_res)
      decoded = sam(params, "decode", conditioned, high_res, prompts)
      pointer = decoded.pointer[0] if decoded.presence[0] > 0 else params["no_obj_ptr"]
      outputs[k, z] = Cells(
        decoded.masks[0, 0], decoded.ious[0, 0], decoded.presence[0], np.reshape(pointer, -1)
      )
      memories[k, z] = here
  return outputs, memories


def on_grid(
  params, config, cells, depth=DEPTH, inside=None, count=DEPTH, features=None, model=MODEL
):
  """All stages over one run, on features made beforehand, since the trunk compiles slowly."""
  inside = np.ones((1, count), bool) if inside is None else inside

  @jax.jit
  def run(params, features, cells):
    with mock.patch.object(stages_lib, "encode_slices", lambda *_: features):
      return stages_lib.all_stages_on_grid(
        model, params, config, None, cells, inside, np.array([depth])
      )

  return run(params, features_of(params, count) if features is None else features, cells)


@functools.lru_cache
def grid_results():
  return on_grid(params_of(), CONFIG, start_cells())


def run_volume(params, config, prompts=None, count=DEPTH, model=MODEL):
  slices = images(count)
  return refine_volume(
    model, params, config, lambda z: slices[z], prompts or volume_prompts(PRESENT)
  )
