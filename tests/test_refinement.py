"""Stages of refinement against the same computation written cell by cell, and what is pinned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_refinement import (
  ALONE,
  CONFIG,
  DEPTH,
  NEAR,
  POINTERS,
  PRESENT,
  features_of,
  grid_results,
  on_grid,
  params_of,
  reference,
  run_volume,
  sam,
  start_cells,
)
from small_sam2 import MASK_SIDE, MODEL, SIDE, SMALL, images, relative, volume_prompts

from rfmedsam2_jax.refinement import RefinementConfig, refine_volume, stage_run
from rfmedsam2_jax.refinement import stages as stages_lib
from rfmedsam2_jax.refinement.prompts import CellPrompts
from rfmedsam2_jax.tracking import Cells
from rfmedsam2_jax.tracking.recurrence import remember_cells


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
        # Four pixels of the image per pixel of the mask, from the first to the last.
        box = 4.0 * np.array([columns.min(), rows.min(), columns.max(), rows.max()]) + [0, 0, 3, 3]
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
  for name in Cells._fields:
    ours = np.asarray(getattr(outputs, name))[live]
    theirs = np.stack([getattr(expected[cell], name) for cell in sorted(expected)])
    error = relative(ours, theirs)
    assert error < tolerance, (name, error)


@pytest.mark.slow
def test_masked_neighbours_equal_the_neighbours_that_exist():
  """Two stages; pinned points 1 to 5 and 8 to 10 as a plain loop over cells."""
  params, cells = params_of(), start_cells()
  features = features_of(params)
  expected, memories = reference(params, NEAR, features, cells, None, CONFIG, DEPTH)
  first, second = grid_results()
  assert_same(*first, expected)
  gated = np.array([out.presence < 0 for out in expected.values()])
  assert 0 < gated.sum() < len(gated)  # both kinds go into the second stage
  assert {len(slots) for slots in memories.values()} >= {2, 3, 4}
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
  return params, features, cells, stages_lib.Memories(maps, pointers), slots


def test_a_batch_of_cells_equals_one_cell_at_a_time():
  params, features, cells, memories, slots = one_stage_inputs(empty=(3,))
  run = jax.jit(stages_lib.refine_cells, static_argnums=(0, 2))
  batch = run(MODEL, params, POINTERS, features, cells, memories, slots)
  for i in range(0, DEPTH, 3):
    one = lambda tree: jax.tree.map(lambda x: x[i : i + 1], tree)  # noqa: E731,B023
    alone = run(MODEL, params, POINTERS, one(features), one(cells), memories, one(slots))
    for ours, theirs, everything in zip(one(batch), alone, batch, strict=True):
      # One cell's number may be a small sum of large terms: the scale is that of all cells.
      assert np.abs(ours - theirs).max() < 1e-5 * np.abs(everything).max()


def test_gradients_through_empty_slots_are_finite():
  """Also of a cell that has nothing but empty slots, which is decoded without memory."""
  params, features, cells, memories, slots = one_stage_inputs(empty=(3,))

  @jax.jit
  def gradient(params, embedding, maps, pointers):
    def loss(params, embedding, maps, pointers):
      out = stages_lib.refine_cells(
        MODEL, params, POINTERS, features._replace(embedding=embedding), cells,
        stages_lib.Memories(maps, pointers), slots,
      )
      return sum(jnp.square(x).mean() for x in out), out

    return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(params, embedding, maps, pointers)

  gradients, out = gradient(params, features.embedding, *memories)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
  assert not np.asarray(gradients[2])[0].any() and np.asarray(gradients[2]).any()
  assert np.asarray(gradients[3]).any()  # pointers carry a gradient
  alone = jax.jit(stages_lib.decode_stage, static_argnums=(0, 2))(
    MODEL, params, ALONE, features.embedding + params["no_mem_embed"], features, cells
  )
  assert relative(out.logits[3], alone.logits[3]) < 1e-5
  assert relative(out.logits[2], alone.logits[2]) > 1e-3


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


def test_what_stages_hand_on_of_cells_that_they_did_not_run(monkeypatch):
  """The generator's vote does not come back for what a stage has ruled out, and no pointer lasts
  longer than one stage: a cell that was not run is one without the object."""
  seen = []

  def only_slice_1_of_organ_0(run):
    cells = run.cells
    seen.append((run.live, run.pointers))
    present = (cells == [0, 1]).all(axis=1)
    score = np.where(present, 5.0, -5.0).astype(np.float32)
    logits = np.broadcast_to(score[:, None, None], (len(cells), MASK_SIDE, MASK_SIDE))
    pointer = np.full((len(cells), SMALL.d_model), 7.0, np.float32)
    return Cells(logits, score, score, pointer)

  monkeypatch.setattr(stage_run, "_run_cells", only_slice_1_of_organ_0)
  config = dataclasses.replace(CONFIG, stages=(NEAR, POINTERS, POINTERS))
  params = params_of()
  results = run_volume(params, config)
  lives, pointers = zip(*seen, strict=True)
  assert np.argwhere(lives[1]).tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
  for number, result in enumerate(results, 1):
    assert sorted(map(tuple, result.cells)) == sorted(map(tuple, np.argwhere(lives[0])))
    # Here no stage runs again what one before it left out.
    ran = np.sum(lives[:number], axis=0)
    np.testing.assert_array_equal(result.stage, ran[tuple(result.cells.T)])
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
  remember = stage_run._remember
  monkeypatch.setattr(
    stage_run, "_remember",
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


def test_memory_is_not_binarised_and_absent_cells_are_marked():
  params, features = params_of(), features_of(params_of())
  cells = jax.tree.map(lambda x: x[:DEPTH], start_cells())
  cells = cells._replace(logits=cells.logits / 8)  # soft
  ours = remember_cells(MODEL, params, features.embedding, cells.logits, cells.presence)
  present = PRESENT[0][:, None, None]
  soft = jax.image.resize(np.where(present, cells.logits, -1024), (DEPTH, SIDE, SIDE), "linear")
  mask = 20 * jax.nn.sigmoid(soft)[..., None] - 10
  encode = lambda model, *inputs: model.memory_encoder(*inputs)  # noqa: E731
  maps = MODEL.apply({"params": params}, features.embedding, mask, method=encode)
  expected = maps + np.where(present[..., None], 0, params["no_obj_embed_spatial"].reshape(-1))
  assert relative(ours, expected) < 1e-5


def test_sam_sees_slices_by_the_statistics_of_imagenet():
  params = params_of()
  x = images(2)
  normal = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  expected = sam(params, "encode_image", normal.astype(np.float32))
  assert relative(features_of(params).embedding[:2], expected.embedding) < 1e-5
