"""Tracking over slices: SAM 2's own recurrence, against a plain loop and the official package."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sam2 import (
  MODEL,
  SIDE,
  SMALL,
  drawn,
  images,
  relative,
  volume_prompts,
  with_presence,
)

from rfmedsam2_jax import tracking
from rfmedsam2_jax.nn import SAM2, MemorySlots, Prompts
from rfmedsam2_jax.refinement import RefinementConfig, StageConfig, refine_volume
from rfmedsam2_jax.refinement.stages import encode_slices

DEPTH, START = 6, 2
BOX = np.array([10, 12, 40, 37], np.float32)
track = jax.jit(tracking.track, static_argnums=0)


def prompts_of_box(starts, depth):
  """One box per track on its first slice; two not-a-point tokens on all others."""
  points = np.zeros((len(starts), depth, 3, 2), np.float32)
  labels = np.tile(np.array([-1, -1, -2], np.int32), (len(starts), depth, 1))
  for number, start in enumerate(starts):
    points[number, start, :2] = BOX.reshape(2, 2)
    labels[number, start] = 2, 3, -1
  grid = SIDE // 4
  mask = np.zeros((len(starts), depth, grid, grid), np.float32)
  return Prompts(points, labels, mask, np.zeros((len(starts), depth), bool))


def inputs_of(starts, depth=DEPTH, active=None):
  active = np.ones((len(starts), depth), bool) if active is None else active
  return tracking.TrackInputs(
    prompts_of_box(starts, depth), np.array(starts, np.int32), active, np.int32(DEPTH)
  )


@functools.partial(jax.jit, static_argnames="method")
def sam(params, method, *inputs):
  return MODEL.apply({"params": params}, *inputs, method=method)


@functools.lru_cache
def setting():
  params = drawn()
  features = jax.jit(lambda p, x: encode_slices(MODEL, p, x))(params, images(DEPTH))
  return params, features


def python_loop(params, features, start, prompts, active):
  """One track, slice by slice, with dictionaries and as many memories as there are."""
  maps, pointers, outputs = {}, {}, {}
  order = [(z, 1) for z in range(start, DEPTH)] + [(z, -1) for z in range(start - 1, -1, -1)]
  for z, direction in order:
    if not active[z]:
      continue
    embedding = features.embedding[z][None]
    if z == start:
      conditioned = embedding + params["no_mem_embed"]
    else:
      behind = {t: (z - t) * direction for t in maps}
      spatial = [t for t in maps if t == start or 1 <= behind[t] <= 6]
      heard = [t for t in pointers if (t == start or behind[t] <= 15) and behind[t] > 0]
      conditioned = sam(params, "condition", embedding, MemorySlots(
        maps=np.stack([maps[t] for t in spatial], 1),
        rows=np.array([[6 if t == start else behind[t] - 1 for t in spatial]], np.int32),
        valid=np.ones((1, len(spatial)), bool),
        pointers=np.stack([pointers[t] for t in heard], 1),
        pointer_positions=np.array([[behind[t] / (DEPTH - 1) for t in heard]], np.float32),
        pointer_valid=np.ones((1, len(heard)), bool),
      ))
    here = jax.tree.map(lambda x, z=z: x[0, z][None], prompts)
    high_res = tuple(x[z][None] for x in features.high_res)
    raw = sam(params, "decode", conditioned, high_res, here)
    gated = sam(params, "gate", raw)
    present = np.asarray(raw.presence > 0)
    maps[z] = sam(params, "remember", embedding, gated.masks[:, 0], present)
    pointers[z] = np.asarray(gated.pointer)
    outputs[z] = raw
  return outputs, pointers


def test_a_track_equals_a_plain_loop_over_slices():
  """Forward from the start, then back with the forward memories; one slice is left out."""
  params, features = setting()
  active = np.arange(DEPTH) != 4
  ours = track(MODEL, params, features, inputs_of([START], active=active[None]))
  expected, pointers = python_loop(
    params, features, START, prompts_of_box([START], DEPTH), active
  )
  for z, raw in expected.items():
    assert relative(ours.logits[0, z], raw.masks[0, 0]) < 3e-5, z
    assert relative(ours.presence[0, z], raw.presence[0]) < 3e-5
    assert relative(ours.iou[0, z], raw.ious[0, 0]) < 3e-5
    assert relative(ours.pointer[0, z], pointers[z][0]) < 3e-5
  assert (np.asarray(ours.logits)[0, 4] == -1024).all() and ours.presence[0, 4] == -1024


def test_tracks_side_by_side_equal_each_alone_and_padding_changes_nothing():
  params, features = setting()
  starts = [START, DEPTH - 1]
  deep = jax.tree.map(lambda x: np.concatenate([x, x[:2] + 1]), features)
  active = np.tile(np.arange(DEPTH + 2) < DEPTH, (2, 1))
  together = track(MODEL, params, deep, inputs_of(starts, DEPTH + 2, active))
  for number, start in enumerate(starts):
    alone = track(MODEL, params, features, inputs_of([start]))
    for ours, theirs in zip(together, alone, strict=True):
      assert relative(np.asarray(ours)[number, :DEPTH], np.asarray(theirs)[0]) < 1e-5
  assert (np.asarray(together.logits)[:, DEPTH:] == -1024).all()


def test_a_stream_stage_is_a_track_from_the_best_slice_of_each_organ():
  params = with_presence(drawn(), 3.0)
  slices = images(DEPTH)
  present = np.zeros((2, DEPTH), bool)
  present[0, 1:4] = present[1, 3:] = True
  prompts = volume_prompts(present)
  prompts.logits[0, 2] *= 4  # surer than its neighbours: here the track starts
  stage = StageConfig(memory="stream")
  config = RefinementConfig(stages=(stage,), live_margin=1, cells_per_batch=8)
  (result,) = refine_volume(MODEL, params, config, lambda z: slices[z], prompts)
  _, features = setting()
  live = {z for k, z in result.cells if k == 0}
  assert live == {0, 1, 2, 3, 4}
  boxes = prompts.boxes[0].reshape(DEPTH, 2, 2)
  labels = np.where(present[0][:, None], [2, 3, -1], [-1, -1, -2]).astype(np.int32)
  points = np.concatenate([boxes, np.zeros((DEPTH, 1, 2), np.float32)], 1)
  given = Prompts(
    points[None], labels[None], prompts.logits[:1].astype(np.float32), prompts.has_mask[:1]
  )
  active = np.isin(np.arange(DEPTH), list(live))
  expected, _ = python_loop(params, features, 2, given, active)
  for (organ, z), logits, iou in zip(result.cells, result.logits, result.iou, strict=True):
    if organ == 0:
      assert iou == pytest.approx(float(expected[z].ious[0, 0]), rel=1e-4)
      assert relative(logits, expected[z].masks[0, 0]) < 1e-3  # float16


def test_a_track_is_the_official_one():
  """SAM2Base.track_step over both directions, one box on a middle slice.

  Single masks on tracked slices too: what this package leaves out is SAM 2's choice of three.
  """
  torch_sam2 = pytest.importorskip("torch_sam2")
  torch = torch_sam2.torch
  config = dataclasses.replace(
    torch_sam2.TINY, image_size=SIDE, memory_layers=1, fuser_layers=1, window_spec=(4, 4, 4, 2)
  )
  official = torch_sam2.official(config, multimask_output_for_tracking=False)
  params = torch_sam2.params_of(official, config)
  slices = np.random.default_rng(3).standard_normal((DEPTH, SIDE, SIDE, 3)).astype(np.float32)
  known = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
  order = [(z, False) for z in range(START, DEPTH)] + [(z, True) for z in reversed(range(START))]
  found = {}
  with torch.no_grad():
    for z, reverse in order:
      image = official.forward_image(torch_sam2.nchw(slices[z : z + 1]))
      _, features, positions, sizes = official._prepare_backbone_features(image)
      first = z == START
      box = dict(
        point_coords=torch.from_numpy(BOX.reshape(1, 2, 2)), point_labels=torch.tensor([[2, 3]])
      )
      out = official.track_step(
        z, first, features, positions, sizes, box if first else None, None, known, DEPTH, reverse
      )
      known["cond_frame_outputs" if first else "non_cond_frame_outputs"][z] = out
      found[z] = out
  model = SAM2(config)
  encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode_image"))
  ours = track(model, params, encode(params, jnp.asarray(slices)), inputs_of([START]))
  for z, out in found.items():
    assert out["object_score_logits"].item() > 0
    assert relative(ours.logits[0, z], out["pred_masks"][0, 0].numpy()) < 1e-4, z
    assert relative(ours.pointer[0, z], out["obj_ptr"][0].numpy()) < 1e-4, z
    assert relative(ours.presence[0, z], out["object_score_logits"][0, 0].numpy()) < 1e-4, z


def test_the_bank_is_as_large_for_a_deep_volume_as_for_a_flat_one():
  """What the scan carries of memories does not grow with the number of slices."""
  params, features = setting()

  def carried(depth):
    deep = jax.tree.map(lambda x: jnp.zeros((depth, *x.shape[1:])), features)
    given, weights = jax.tree.map(jnp.asarray, (inputs_of([0], depth), params))
    jaxpr = jax.make_jaxpr(lambda f: tracking.track(MODEL, weights, f, given))(deep)
    sizes = []
    for equation in jaxpr.eqns:
      if equation.primitive.name == "scan":
        sizes.append(sum(
          v.aval.size for v in equation.outvars if v.aval.shape[2:] and depth not in v.aval.shape
        ))
    return sizes

  grid = SMALL.grid
  assert carried(5) == carried(37) and min(carried(5)) >= 13 * grid * grid * SMALL.mem_dim


def test_between_prompts_alone_a_track_is_what_it_is_and_beyond_them_nothing():
  params = drawn()
  sides = [tracking.SlicePrompt(0, z, box=tuple(BOX.tolist())) for z in (1, 4)]
  whole, between = (
    tracking.VolumeTracker(MODEL, params, tracking.TrackingConfig(between=between),
                           lambda numbers: images(DEPTH)[numbers], DEPTH).track(sides).cells
    for between in (False, True))
  for ours, expected in zip(between, whole, strict=True):
    np.testing.assert_array_equal(ours[:, 1:5], expected[:, 1:5])
  assert (between.presence[:, [0, 5]] < 0).all() and (between.logits[:, [0, 5]] < -100).all()
