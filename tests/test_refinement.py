"""Stages of refinement against the same computation written cell by cell, and what is pinned."""

import dataclasses
import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sam2 import (
  MASK_SIDE,
  MODEL,
  SIDE,
  SMALL,
  drawn,
  images,
  relative,
  volume_prompts,
  with_presence,
)

from rfmedsam2_jax.losses import RefinerLossConfig
from rfmedsam2_jax.nn import SAM2, AdapterConfig, MemorySlots, box_prompts
from rfmedsam2_jax.nn.adapters import MaskAdapter
from rfmedsam2_jax.nn.unet import UNet, UNetConfig
from rfmedsam2_jax.refinement import RefinementConfig, StageConfig, refine_volume, volume
from rfmedsam2_jax.refinement import stages as stages_lib
from rfmedsam2_jax.refinement.prompts import (
  CellPrompts,
  anchor_score,
  boxes_of,
  live_cells,
  next_prompts,
  sam_prompts,
  scaled_boxes,
  stage0_logits,
)
from rfmedsam2_jax.training.config import RefinerConfig
from rfmedsam2_jax.training.state import silenced_decoder
from rfmedsam2_jax.training.step import refiner_loss_fn

NEAR = StageConfig(reach=2)
POINTERS = StageConfig(reach=2, pointers=True)
ALONE = StageConfig(memory="none")
# Two organs on ten slices; cells without the organ beside cells with it, a gap wider than the
# margin, both ends of the volume.
PRESENT = np.array([[0, 1, 1, 0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]], bool)
DEPTH = PRESENT.shape[1]
CONFIG = RefinementConfig(
  stages=(NEAR, POINTERS), live_margin=2, cells_per_batch=8, slices_per_batch=4
)


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
    {(track, slice): CellOutputs of one cell} of live cells, and what each of them remembered.
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
      here = [(t, abs(z - t) - 1) for t in live if 1 <= abs(z - t) <= stage.reach]
      here += [(best, 6)] if stage.anchors and best != z else []
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
      outputs[k, z] = stages_lib.CellOutputs(
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


def following(params, outputs, tracks, depth=DEPTH):
  """Prompts and pointers that the reference's outputs make for the next stage."""
  cells = {name: [] for name in CellPrompts._fields if name != "nearby"}
  pointers = []
  for k in range(tracks):
    for z in range(depth):
      out = outputs.get((k, z))
      ran = out is not None
      logits = np.asarray(out.logits) if ran else np.zeros((MASK_SIDE, MASK_SIDE), np.float32)
      rows, columns = np.nonzero(logits > 0)
      shown = ran and len(rows) > 0 and float(out.presence) > 0
      cells["presence"].append(1 / (1 + np.exp(-float(out.presence))) if shown else 0.0)
      box = np.zeros(4)
      if shown:
        # Four pixels of the image per pixel of the mask.
        box = 4.0 * np.array([columns.min(), rows.min(), columns.max(), rows.max()])
        box = np.clip(box + CONFIG.box_margin * np.array([-1, -1, 1, 1]), 0, SIDE - 1)
      cells["boxes"].append(box)
      cells["has_box"].append(shown)
      cells["has_mask"].append(shown)
      cells["logits"].append(np.clip(logits, -32, 32))
      pointers.append(out.pointer if ran else params["no_obj_ptr"].reshape(-1))
  count = tracks * depth
  cells["points"], cells["point_labels"] = np.zeros((count, 0, 2)), np.zeros((count, 0))
  dtypes = {"has_box": bool, "has_mask": bool, "point_labels": np.int32}
  cells = {name: np.array(x, dtypes.get(name, np.float32)) for name, x in cells.items()}
  return CellPrompts(**cells), np.array(pointers)


def assert_same(outputs, live, expected, tolerance=1e-5):
  live = np.asarray(live)
  assert sorted(expected) == [divmod(int(i), DEPTH) for i in np.flatnonzero(live)]
  for name in stages_lib.CellOutputs._fields:
    ours = np.asarray(getattr(outputs, name))[live]
    theirs = np.stack([getattr(expected[cell], name) for cell in sorted(expected)])
    error = relative(ours, theirs)
    assert error < tolerance, (name, error)


def test_masked_neighbours_equal_the_neighbours_that_exist():
  """Two stages; pinned points 1 to 5 and 8 to 10 as a plain loop over cells."""
  params, cells = params_of(), start_cells()
  features = features_of(params)
  expected, memories = reference(params, NEAR, features, cells, None, CONFIG, DEPTH)
  first, second = grid_results()
  assert_same(*first, expected)
  gated = np.array([out.presence < 0 for out in expected.values()])
  assert 0 < gated.sum() < len(gated)  # both kinds go into the second stage
  assert {len(slots) for slots in memories.values()} > {3, 5}
  next_cells, pointers = following(params, expected, 2)
  expected, memories = reference(
    params, POINTERS, features, next_cells, pointers, CONFIG, DEPTH
  )
  assert_same(*second, expected, tolerance=3e-5)


def test_without_memory_every_slice_stands_for_itself():
  params, cells = params_of(), start_cells()
  config = RefinementConfig(stages=(ALONE,), live_margin=2)
  expected, _ = reference(params, ALONE, features_of(params), cells, None, config, DEPTH)
  assert_same(*on_grid(params, config, cells)[0], expected)


def test_ten_slices_in_a_bucket_of_sixteen_equal_ten_slices():
  """Padding holds other images, and the network may well see organs in it."""
  params = params_of()
  pad = lambda x: np.pad(  # noqa: E731
    np.asarray(x).reshape(2, DEPTH, *x.shape[1:]), [(0, 0), (0, 6)] + [(0, 0)] * (x.ndim - 1),
    mode="wrap",
  ).reshape(32, *x.shape[1:])
  cells = jax.tree.map(pad, start_cells())
  inside = np.arange(16)[None] < DEPTH
  padded = on_grid(params, CONFIG, cells, inside=inside, count=16)
  for (outputs, live), (exact, exact_live) in zip(padded, grid_results(), strict=True):
    trimmed = lambda x: np.asarray(x).reshape(2, 16, *x.shape[1:])[:, :DEPTH].reshape(  # noqa: E731
      2 * DEPTH, *x.shape[1:]
    )
    np.testing.assert_array_equal(trimmed(live), exact_live)
    assert not np.asarray(live).reshape(2, 16)[:, DEPTH:].any()
    for ours, theirs in zip(outputs, exact, strict=True):
      keep = np.asarray(exact_live)
      assert relative(trimmed(ours)[keep], np.asarray(theirs)[keep]) < 1e-5


def one_stage_inputs(empty=()):
  """refine_cells on the cells of track 0, whose empty slots point at NaN."""
  params, features = params_of(), features_of(params_of())
  cells = jax.tree.map(lambda x: x[:DEPTH], start_cells())
  rng = np.random.default_rng(5)
  maps = rng.standard_normal((DEPTH, SMALL.grid, SMALL.grid, SMALL.mem_dim)).astype(np.float32)
  pointers = rng.standard_normal((DEPTH, SMALL.d_model)).astype(np.float32)
  maps[0], pointers[0] = np.nan, np.nan
  valid = rng.random((DEPTH, 4)) < 0.5
  valid[list(empty)] = False
  slots = stages_lib.CellSlots(
    place=np.where(valid, rng.integers(1, DEPTH, (DEPTH, 4)), 0).astype(np.int32),
    rows=rng.integers(0, 7, (DEPTH, 4)).astype(np.int32),
    valid=valid,
    positions=rng.uniform(-1, 1, (DEPTH, 4)).astype(np.float32),
  )
  return params, features, cells, maps, pointers, slots


def test_a_batch_of_cells_equals_one_cell_at_a_time():
  params, features, cells, maps, pointers, slots = one_stage_inputs(empty=(3,))
  run = jax.jit(stages_lib.refine_cells, static_argnums=(0, 2))
  batch = run(MODEL, params, POINTERS, features, cells, maps, pointers, slots)
  for i in range(0, DEPTH, 3):
    one = lambda tree: jax.tree.map(lambda x: x[i : i + 1], tree)  # noqa: E731,B023
    alone = run(MODEL, params, POINTERS, one(features), one(cells), maps, pointers, one(slots))
    for ours, theirs, everything in zip(one(batch), alone, batch, strict=True):
      # One cell's number may be a small sum of large terms: the scale is that of all cells.
      assert np.abs(ours - theirs).max() < 1e-5 * np.abs(everything).max()


def test_gradients_through_empty_slots_are_finite():
  """Also of a cell that has nothing but empty slots, which is decoded without memory."""
  params, features, cells, maps, pointers, slots = one_stage_inputs(empty=(3,))

  @jax.jit
  def gradient(params, embedding, maps, pointers):
    def loss(params, embedding, maps, pointers):
      out = stages_lib.refine_cells(
        MODEL, params, POINTERS, features._replace(embedding=embedding), cells, maps, pointers,
        slots,
      )
      return sum(jnp.square(x).mean() for x in out), out

    return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(params, embedding, maps, pointers)

  gradients, out = gradient(params, features.embedding, maps, pointers)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
  assert not np.asarray(gradients[2])[0].any() and np.asarray(gradients[2]).any()
  assert np.asarray(gradients[3]).any()  # pointers carry a gradient
  alone = jax.jit(stages_lib.decode_cells, static_argnums=(0, 2))(
    MODEL, params, ALONE, features.embedding + params["no_mem_embed"], features, cells
  )
  assert relative(out.logits[3], alone.logits[3]) < 1e-5
  assert relative(out.logits[2], alone.logits[2]) > 1e-3


def run_volume(params, config, prompts=None, count=DEPTH, model=MODEL):
  slices = images(count)
  return refine_volume(
    model, params, config, lambda z: slices[z], prompts or volume_prompts(PRESENT)
  )


def test_a_volume_of_gathered_cells_equals_the_grid():
  """Prediction and training are one computation."""
  results = run_volume(params_of(), CONFIG)
  ran = np.zeros(PRESENT.shape, bool)
  for number, (result, (outputs, live)) in enumerate(zip(results, grid_results(), strict=True)):
    live = np.asarray(live).reshape(PRESENT.shape)
    ran |= live
    now = live[tuple(result.cells.T)]
    np.testing.assert_array_equal(result.cells[now], np.argwhere(live))
    assert sorted(map(tuple, result.cells)) == sorted(map(tuple, np.argwhere(ran)))
    index = result.cells[now] @ [DEPTH, 1]
    # Masks between stages are kept as float16.
    tolerance = 2e-3 if number else 1e-5
    assert relative(result.iou[now], np.asarray(outputs.iou)[index]) < tolerance
    presence = np.asarray(outputs.presence)[index]
    assert relative(result.presence[now], 1 / (1 + np.exp(-presence))) < tolerance
    if not number:
      shown = np.where((presence > 0)[:, None, None], np.asarray(outputs.logits)[index], -1024)
      np.testing.assert_allclose(result.logits, shown, rtol=1e-3, atol=1e-3)


CORRECTED = SAM2(dataclasses.replace(SMALL, adapters=AdapterConfig(False, False, mask=True)))


def without_mask_adapter(params):
  decoder = {name: x for name, x in params["sam_mask_decoder"].items() if name != "adapter"}
  return params | {"sam_mask_decoder": decoder}


def corrected_features(params):
  return jax.jit(lambda x: stages_lib.encode_slices(CORRECTED, params, x))(images(DEPTH))


def test_a_mask_adapter_adds_what_it_makes_of_the_masks_of_the_slices_around():
  """Nearby masks by a plain loop; absent organs are -8, slices beyond the volume 0."""
  params = drawn(CORRECTED.config)
  without = without_mask_adapter(params)
  config, cells = dataclasses.replace(CONFIG, stages=(NEAR,)), start_cells()
  features = corrected_features(params)
  with_it, _ = on_grid(params, config, cells, model=CORRECTED, features=features)[0]
  plain, _ = on_grid(without, config, cells)[0]
  nearby = np.zeros((2, DEPTH, 5, MASK_SIDE, MASK_SIDE), np.float32)
  for k, z, r in np.ndindex(2, DEPTH, 5):
    there = z + r - 2
    if 0 <= there < DEPTH:
      shown = cells.logits[k * DEPTH + there].clip(-8, 8) if PRESENT[k, there] else -8.0
      nearby[k, z, r] = shown
  pixels = (images(DEPTH) - stages_lib.IMAGE_MEAN) / stages_lib.IMAGE_STD
  pixels = pixels.reshape(DEPTH, MASK_SIDE, 4, MASK_SIDE, 4, 3).mean((2, 4))
  pixels = np.tile(pixels, (2, 1, 1, 1)).astype(np.float32)
  nearby = nearby.reshape(-1, *nearby.shape[2:])
  trained = {"params": params["sam_mask_decoder"]["adapter"]}
  expected = MaskAdapter().apply(trained, pixels, nearby)
  assert np.abs(expected).max() > 0.1
  assert relative(with_it.logits - plain.logits, expected) < 1e-4  # a difference of larger numbers
  np.testing.assert_array_equal(with_it.presence, plain.presence)
  fresh = MaskAdapter().init(jax.random.key(0), pixels, nearby)
  assert not MaskAdapter().apply(fresh, pixels, nearby).any()


@pytest.mark.parametrize("memory", ["neighbours", "none"])
def test_a_volume_with_a_mask_adapter_equals_the_grid(memory):
  params = drawn(CORRECTED.config)
  config = dataclasses.replace(CONFIG, stages=(dataclasses.replace(NEAR, memory=memory),) * 2)
  found = run_volume(params, config, model=CORRECTED)
  features = corrected_features(params)
  expected = on_grid(params, config, start_cells(), model=CORRECTED, features=features)
  for number, (result, (outputs, live)) in enumerate(zip(found, expected, strict=True)):
    now = np.asarray(live).reshape(PRESENT.shape)[tuple(result.cells.T)]
    index = result.cells[now] @ [DEPTH, 1]
    shown = np.asarray(outputs.presence)[index] > 0
    # Masks between stages are kept as float16.
    ours, theirs = result.logits[now][shown], np.asarray(outputs.logits)[index][shown]
    assert relative(ours, theirs) < (5e-3 if number else 1e-3)


def test_a_mask_adapter_alone_corrects_as_beside_a_decoder_that_is_silent():
  params = silenced_decoder(drawn(CORRECTED.config))
  stages = tuple(dataclasses.replace(s, residual=True) for s in CONFIG.stages)
  config, cells = dataclasses.replace(CONFIG, stages=stages), start_cells()
  arguments = (cells, np.ones((1, DEPTH), bool), np.array([DEPTH]))
  alone = jax.jit(functools.partial(stages_lib.masks_on_grid, CORRECTED, params, config))
  features = corrected_features(params)
  beside = on_grid(params, config, cells, model=CORRECTED, features=features)
  for (ours, live), (theirs, lives) in zip(
    alone(images(DEPTH), *arguments), beside, strict=True
  ):
    np.testing.assert_array_equal(live, lives)
    np.testing.assert_array_equal(np.asarray(ours.presence) > 0, np.asarray(theirs.presence) > 0)
    assert relative(ours.logits[live], theirs.logits[live]) < 1e-5


def test_a_stream_hears_its_mask_adapter():
  """Trained as `neighbours`, it adds the same to its masks."""
  params = drawn(CORRECTED.config)
  config = dataclasses.replace(CONFIG, stages=(dataclasses.replace(NEAR, memory="stream"),) * 2)
  found = run_volume(params, config, model=CORRECTED)
  plain = run_volume(without_mask_adapter(params), config)
  assert relative(found[0].logits, plain[0].logits) > 1e-2


def test_what_stages_hand_on_of_cells_that_they_did_not_run(monkeypatch):
  """The generator's vote does not come back for what a stage has ruled out, and no pointer lasts
  longer than one stage: a cell that was not run is one without the object."""
  seen = []

  def only_slice_1_of_organ_0(*arguments):
    pointers, live, cells = arguments[-4:-1]
    seen.append((live, pointers))
    present = (cells == [0, 1]).all(axis=1)
    score = np.where(present, 5.0, -5.0).astype(np.float32)
    logits = np.broadcast_to(score[:, None, None], (len(cells), MASK_SIDE, MASK_SIDE))
    pointer = np.full((len(cells), SMALL.d_model), 7.0, np.float32)
    return stages_lib.CellOutputs(logits, score, score, pointer)

  monkeypatch.setattr(volume, "_run_cells", only_slice_1_of_organ_0)
  config = dataclasses.replace(CONFIG, stages=(NEAR, POINTERS, POINTERS))
  params = params_of()
  results = run_volume(params, config)
  lives, pointers = zip(*seen, strict=True)
  assert np.argwhere(lives[1]).tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
  for result in results:
    assert sorted(map(tuple, result.cells)) == sorted(map(tuple, np.argwhere(lives[0])))
    present = (result.cells == [0, 1]).all(axis=1)
    np.testing.assert_array_equal((result.logits > 0).all(axis=(1, 2)), present)
    assert (result.logits[~present] == -1024).all()
  absent = np.reshape(params["no_obj_ptr"], -1)
  for ran, found in zip((np.zeros_like(lives[0]), *lives), pointers, strict=False):
    np.testing.assert_array_equal(found, np.where(ran[..., None], 7.0, absent))


def test_a_volume_without_organs_runs_nothing():
  prompts = volume_prompts(np.zeros((2, 4), bool))
  results = refine_volume(MODEL, params_of(), CONFIG, lambda z: 1 / 0, prompts)
  assert [len(result.cells) for result in results] == [0, 0]


def test_each_live_cell_is_remembered_once_per_stage(monkeypatch):
  rows = []
  remember = volume._remember
  monkeypatch.setattr(
    volume, "_remember",
    lambda model, params, embedding, at, cells: rows.append(at)
    or remember(model, params, embedding, at, cells),
  )
  encoded = []
  slices = images(DEPTH)
  config = dataclasses.replace(CONFIG, stages=(NEAR,))
  (result,) = refine_volume(
    MODEL, params_of(), config, lambda z: encoded.append(z) or slices[z], volume_prompts(PRESENT)
  )
  assert len(rows) == -(-len(result.cells) // 8)
  live = {int(z) for z in result.cells[:, 1]}
  assert {int(z) for batch in encoded for z in batch} == live
  assert len(encoded) == -(-len(live) // 4)


def test_live_cells_lie_within_the_margin_of_present_ones():
  present = np.array([[0, 0, 0, 0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]], bool)
  expected = np.array([[0, 1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 1, 1, 1, 1]], bool)
  for array in (present, jnp.asarray(present)):
    np.testing.assert_array_equal(live_cells(array, RefinementConfig().live_margin), expected)
  np.testing.assert_array_equal(live_cells(present, 0), present)


def test_stage_0_logits_are_log_odds_within_32():
  rng = np.random.default_rng(0)
  logits = (rng.standard_normal((500, 5)) * 10).astype(np.float32)
  logits[0] = 0, 200, -200, 100, 99
  logits[1] = 3, 3, 3, 3, 3
  exact = logits.astype(np.float64)
  expected = np.empty((500, 4))
  for k in range(1, 5):
    others = np.delete(exact, k, axis=1)
    expected[:, k - 1] = exact[:, k] - np.logaddexp.reduce(others, axis=1)
  found = stage0_logits(jnp.asarray(logits), False)
  np.testing.assert_allclose(found, expected.clip(-32, 32), rtol=1e-5, atol=1e-5)
  regions = stage0_logits(jnp.asarray(logits), True)
  np.testing.assert_array_equal(regions, logits.clip(-32, 32))


def test_generator_prompts_are_antialiased_log_odds_of_all_channels(monkeypatch):
  """The generator sees every channel; presence and boxes are those of its arg-max."""
  from rfmedsam2_jax.inference import segmenter as segmenter_lib

  rng = np.random.default_rng(0)
  height, width = 40, 52  # larger than the 16 x 16 mask prompts
  slab = rng.standard_normal((3, height, width, 3)).astype(np.float32) * 8
  slab[..., 1] -= 60
  slab[0, 10:20, 13:26, 1] = 90
  seen = []
  monkeypatch.setattr(
    segmenter_lib, "predict_slabs",
    lambda forward, image, *rest: seen.append(image) or [(slice(0, 3), slab)],
  )
  plan = types.SimpleNamespace(
    labels=types.SimpleNamespace(structures=("a", "b"), regions=False), patch_size=(3, 40, 52)
  )
  unet = UNet(UNetConfig(), 3)
  owner = segmenter_lib.Segmenter(plan, unet, {}, MODEL, None, RefinementConfig(box_margin=0.0))
  image = np.zeros((2, 3, height, width), np.float32)
  made = segmenter_lib.run_generator(owner, types.SimpleNamespace(image=image))
  assert seen[0] is image
  prompts = made.prompts
  odds = np.moveaxis(np.asarray(stage0_logits(jnp.asarray(slab), False)), -1, 0)
  expected = jax.image.resize(odds, (2, 3, MASK_SIDE, MASK_SIDE), "linear", antialias=True)
  np.testing.assert_allclose(prompts.logits, expected, rtol=2e-3, atol=2e-2)
  np.testing.assert_array_equal(prompts.presence[0], [1, 0, 0])
  scale = np.array([SIDE / width, SIDE / height] * 2)
  np.testing.assert_allclose(prompts.boxes[0, 0], [13, 10, 25, 19] * scale, rtol=1e-6)


def test_boxes_are_inclusive_indices_scaled_by_the_sides():
  masks = np.zeros((3, 20, 40), bool)
  masks[0, 5:9, 10:31] = True
  masks[1, 19, 39] = True
  scale = np.array([64 / 40, 64 / 20] * 2)
  for array in (masks, jnp.asarray(masks)):
    boxes, present = scaled_boxes(array, 64, 0.0)
    np.testing.assert_array_equal(present, [True, True, False])
    np.testing.assert_allclose(boxes[0], [10, 5, 30, 8] * scale, rtol=1e-6)
    np.testing.assert_allclose(boxes[1], [39, 19, 39, 19] * scale, rtol=1e-6)
    np.testing.assert_array_equal(boxes[2], 0)
    wide, _ = scaled_boxes(array, 64, 3.0)
    np.testing.assert_allclose(wide[0], [10, 5, 30, 8] * scale + [-3, -3, 3, 3], rtol=1e-6)
    np.testing.assert_allclose(wide[1, 2:], [63, 63])  # clipped to the image
    np.testing.assert_array_equal(boxes_of(array, 1.0)[0][0], [9, 4, 31, 9])


def test_the_prompt_encoder_adds_half_a_pixel_to_corners():
  params = params_of()
  cells = jax.tree.map(lambda x: x[:DEPTH], start_cells())
  encode = lambda model, prompts: model.sam_prompt_encoder(prompts)[0]  # noqa: E731
  tokens = MODEL.apply({"params": params}, sam_prompts(cells, True, True), method=encode)
  encoder = params["sam_prompt_encoder"]
  matrix = encoder["pe_layer"]["positional_encoding_gaussian_matrix"]
  for corner in range(2):
    place = 2 * np.pi * (2 * (cells.boxes[1].reshape(2, 2)[corner] + 0.5) / SIDE - 1) @ matrix
    expected = np.concatenate([np.sin(place), np.cos(place)])
    expected = expected + encoder[f"point_embeddings_{2 + corner}"][0]
    np.testing.assert_allclose(tokens[1, corner], expected, atol=1e-4)


def test_prompts_hold_the_tokens_of_the_correction_path():
  """One not-a-point token behind boxes and clicks, two where there is neither."""
  cells = jax.tree.map(lambda x: x[:3], start_cells())
  labels = lambda *use: np.asarray(sam_prompts(cells, *use).labels)  # noqa: E731
  exists = lambda row: [int(x) for x in row if x != -2]  # noqa: E731
  assert [exists(row) for row in labels(True, True)] == [[-1, -1], [2, 3, -1], [2, 3, -1]]
  assert [exists(row) for row in labels(False, True)] == [[-1, -1]] * 3
  np.testing.assert_array_equal(sam_prompts(cells, True, True).has_mask, [False, True, True])
  assert not sam_prompts(cells, True, False).has_mask.any()
  clicks = np.array([[1, -2], [1, 0], [1, -2]])
  cells = cells._replace(points=np.ones((3, 2, 2)), point_labels=clicks)
  assert [exists(row) for row in labels(True, True)] == [
    [1, -1], [2, 3, 1, 0, -1], [2, 3, 1, -1]
  ]


def test_memory_is_not_binarised_and_absent_cells_are_marked():
  params, features = params_of(), features_of(params_of())
  cells = jax.tree.map(lambda x: x[:DEPTH], start_cells())
  cells = cells._replace(logits=cells.logits / 8)  # soft
  ours = stages_lib.remember_cells(MODEL, params, features.embedding, cells)
  present = PRESENT[0][:, None, None]
  soft = jax.image.resize(np.where(present, cells.logits, -1024), (DEPTH, SIDE, SIDE), "linear")
  mask = 20 * jax.nn.sigmoid(soft)[..., None] - 10
  encode = lambda model, *inputs: model.memory_encoder(*inputs)  # noqa: E731
  maps = MODEL.apply({"params": params}, features.embedding, mask, method=encode)
  expected = maps + np.where(present[..., None], 0, params["no_obj_embed_spatial"].reshape(-1))
  assert relative(ours, expected) < 1e-5


def test_the_anchor_score_is_presence_times_mean_foreground_probability():
  logits = np.full((3, 4, 4), -5.0, np.float32)
  logits[0, 0, :2] = 1.0, 3.0
  logits[1] = logits[0]
  mean = (1 / (1 + np.exp(-1.0)) + 1 / (1 + np.exp(-3.0))) / 2
  score = anchor_score(jnp.array([1.0, 0.5, 1.0]), jnp.asarray(logits))
  np.testing.assert_allclose(score, [mean, mean / 2, 0], rtol=1e-6)


def test_sam_sees_slices_by_the_statistics_of_imagenet():
  params = params_of()
  x = images(2)
  normal = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  expected = sam(params, "encode_image", normal.astype(np.float32))
  assert relative(features_of(params).embedding[:2], expected.embedding) < 1e-5


def training_batch():
  prompts = volume_prompts(PRESENT)
  logits = prompts.logits.astype(np.float32)[None]
  return {
    "images": images(DEPTH)[None],
    "logits": logits,
    "masks": (logits > 1).astype(np.float32),
    "known": np.ones_like(logits),
    "inside": np.ones((1, DEPTH), bool),
    "depth": np.array([DEPTH], np.int32),
  }


def test_the_presence_gate_stays_out_of_the_loss_and_ignored_slices_too():
  config = RefinementConfig(stages=(ALONE,), live_margin=2)
  train = RefinerConfig(loss=RefinerLossConfig(presence=0.0), box_jitter=0.0)
  loss = jax.jit(refiner_loss_fn(MODEL, train, config))
  key = jax.random.key(0)
  shown, parts = loss(with_presence(drawn(), 50.0), training_batch(), key)
  hidden, _ = loss(with_presence(drawn(), -50.0), training_batch(), key)
  assert float(shown) > 0 and float(hidden) == pytest.approx(float(shown), rel=1e-6)
  # Nobody knows whether an organ is in a slice that is ignored: its presence is not judged.
  ignored = training_batch()
  ignored["masks"][:, :, 4:] = ignored["known"][:, :, 4:] = 0
  kept = training_batch()
  kept["inside"][:, 4:] = False
  kept["masks"][:, :, 4:] = 0
  found = [float(loss(drawn(), batch, key)[1]["stage1/presence"]) for batch in (ignored, kept)]
  assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_masks_and_boxes_carry_no_gradient_between_stages():
  logits = jnp.asarray(volume_prompts(PRESENT).logits[0], jnp.float32)

  def loss(logits, presence):
    cells = next_prompts(logits, presence, SIDE, 2.0)
    return cells.logits.sum() + cells.presence.sum() + cells.boxes.sum()

  for gradient in jax.grad(loss, (0, 1))(logits, jnp.ones(DEPTH)):
    assert not np.asarray(gradient).any()


def test_pointers_and_the_memory_encoder_carry_gradients_between_stages():
  params, cells = drawn(), start_cells()
  config = RefinementConfig(stages=(ALONE, POINTERS), live_margin=2)

  def of_second_stage(params):
    outputs, live = on_grid(params, config, cells, features=features)[1]
    return jnp.where(live[:, None, None], outputs.logits, 0).var()

  features = features_of(params)
  gradient = jax.grad(of_second_stage)(params)
  largest = lambda part: max(np.abs(g).max() for g in jax.tree.leaves(gradient[part]))  # noqa: E731
  assert largest("memory_encoder") > 1e-5
  # Of this projection a later stage hears through the pointers alone.
  assert largest("obj_ptr_proj") > 1e-5


@pytest.mark.parametrize("limit", [8.0, 3.0])
def test_a_residual_stage_that_decodes_nothing_repeats_the_stage_before(limit):
  """At the start of training from scratch: masks within the limit, presence as it was."""
  params = silenced_decoder(drawn())
  cells = start_cells()
  residual = dataclasses.replace(NEAR, residual=True, residual_limit=limit)
  outputs, _ = on_grid(params, dataclasses.replace(CONFIG, stages=(residual,)), cells)[0]
  shown = np.asarray(cells.has_mask)[:, None, None]
  np.testing.assert_allclose(
    outputs.logits, np.where(shown, np.clip(cells.logits, -limit, limit), 0), atol=1e-6
  )
  np.testing.assert_array_equal(np.sign(outputs.presence), np.where(cells.presence > 0, 1, -1))
  without = on_grid(params, dataclasses.replace(CONFIG, stages=(NEAR,)), cells)[0][0]
  assert not np.any(without.logits)
