"""What the refiner's loss sees, and which way its gradients go."""

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
  on_grid,
  start_cells,
)
from small_sam2 import MODEL, SIDE, drawn, images, volume_prompts, with_presence

from rfmedsam2_jax.config.training import RefinerConfig
from rfmedsam2_jax.nn.losses import RefinerLossConfig
from rfmedsam2_jax.refinement import RefinementConfig
from rfmedsam2_jax.refinement.prompts import next_prompts
from rfmedsam2_jax.training.state import silenced_decoder
from rfmedsam2_jax.training.step import refiner_loss_fn


def training_batch():
  prompts = volume_prompts(PRESENT)
  logits = prompts.logits.astype(np.float32)[None]
  present = (logits > 1).any((3, 4))
  return {
    "images": images(DEPTH)[None],
    "logits": logits,
    "masks": (logits > 1).astype(np.float32),
    "known": np.ones_like(logits),
    "present": present,
    "absent": ~present,
    "inside": np.ones((1, DEPTH), bool),
    "depth": np.array([DEPTH], np.int32),
  }


def test_the_presence_gate_stays_out_of_the_loss_and_ignored_slices_too(monkeypatch):
  monkeypatch.setattr(RefinerConfig, "box_jitter", 0.0)
  config = RefinementConfig(stages=(ALONE,), live_margin=2)
  train = RefinerConfig(loss=RefinerLossConfig(presence=0.0))
  loss = jax.jit(refiner_loss_fn(MODEL, train, config))
  key = jax.random.key(0)
  shown, parts = loss(with_presence(drawn(), 50.0), training_batch(), key)
  hidden, _ = loss(with_presence(drawn(), -50.0), training_batch(), key)
  assert float(shown) > 0 and float(hidden) == pytest.approx(float(shown), rel=1e-6)
  # Nobody knows whether an organ is in a slice that is ignored: its presence is not judged.
  ignored = training_batch()
  for name in ("masks", "known", "present", "absent"):
    ignored[name][:, :, 4:] = 0
  kept = training_batch()
  kept["inside"][:, 4:] = False
  kept["masks"][:, :, 4:] = kept["present"][:, :, 4:] = 0
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
