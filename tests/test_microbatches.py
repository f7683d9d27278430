"""A batch in microbatches has the loss and the gradient of the whole batch."""

import functools
import importlib
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_refinement import ALONE
from small_sam2 import MASK_SIDE, MODEL, SIDE, drawn

from rfmedsam2_jax.config.training import GeneratorConfig, OptimizerConfig, RefinerConfig
from rfmedsam2_jax.nn import UNet, UNetConfig, losses
from rfmedsam2_jax.refinement import RefinementConfig
from rfmedsam2_jax.training.state import init_state
from rfmedsam2_jax.training.step import Loss, generator_loss_fn, make_step, refiner_loss_fn

ROWS, CELLS, SIZE = 6, 3, 8


def step_of(loss, params, batch, microbatches):
  """Metrics and gradient of one step, whose optimizer keeps what it is given."""
  optimizer = optax.trace(0.0)
  state = init_state(params, ("*",), optimizer, jax.random.key(3))
  step = make_step(loss, optimizer, OptimizerConfig(), microbatches=microbatches)
  new, metrics = jax.jit(step)(state, batch)
  return metrics, new.optimizer.trace


def assert_same(found, whole):
  """To 1e-5 of each array's largest value; a gradient that is zero but for rounding may be any."""
  arrays = jax.tree.leaves(whole)
  rounding = 1e-7 * max(np.abs(x).max() for x in arrays)
  for ours, theirs in zip(jax.tree.leaves(found), arrays, strict=True):
    limit = 1e-5 * np.abs(theirs).max() + rounding
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit)


def cells_batch(seed=0):
  rng = np.random.default_rng(seed)
  shape = ROWS, CELLS
  return {
    "x": rng.standard_normal((*shape, SIZE, SIZE)).astype(np.float32),
    "feature": rng.standard_normal(shape).astype(np.float32),
    "masks": (rng.random((*shape, SIZE, SIZE)) > 0.6).astype(np.float32),
    "present": np.ones(shape, bool),
  }


def cells_loss(live_of):
  """Two numbers and a map as the network, the loss of the refiner, and cells that it calls live."""

  def sums(params, batch, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (CELLS,)))(keys.rows)
    presence = params["presence"] * batch["feature"] + 0.1 * noise
    return losses.refiner_sums(
      params["scale"] * batch["x"] + params["map"], jax.nn.sigmoid(presence), presence,
      losses.CellTruth(batch["masks"], jnp.ones_like(batch["masks"]), batch["present"]),
      live_of(presence))

  return Loss(sums, losses.refiner_loss)


PARAMS = {
  "scale": jnp.float32(1.5), "presence": jnp.float32(0.7),
  "map": jnp.asarray(np.random.default_rng(1).standard_normal((SIZE, SIZE)), jnp.float32),
}


@functools.cache
def official_losses():
  """sam2's training/loss_fns.py, which asks its trainer, and that much else, for one name."""
  pytest.importorskip("torch")
  pytest.importorskip("training.utils.distributed")
  trainer = types.SimpleNamespace(CORE_LOSS_KEY="core_loss")
  with mock.patch.dict(sys.modules, {"training.trainer": trainer}):
    return importlib.import_module("training.loss_fns")


@pytest.mark.parametrize("microbatches", [1, 3])
def test_loss_and_gradient_are_those_of_the_official_code_for_the_whole_batch(microbatches):
  """Every cell is live and present, for which official code and ours divide by the same numbers."""
  official, torch = official_losses(), pytest.importorskip("torch")
  criterion = official.MultiStepMultiMasksAndIous(
    {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1}, iou_use_l1_loss=True,
    pred_obj_scores=True)
  batch = cells_batch()
  loss = cells_loss(lambda presence: jnp.ones(presence.shape, bool))
  metrics, gradient = step_of(loss, PARAMS, batch, microbatches)
  key = jax.random.fold_in(jax.random.key(3), 0)
  noise = np.array([jax.random.normal(jax.random.fold_in(key, r), (CELLS,)) for r in range(ROWS)])
  params = {name: torch.tensor(np.asarray(x), requires_grad=True) for name, x in PARAMS.items()}
  x, feature, noise = map(torch.tensor, (batch["x"], batch["feature"], noise))
  presence = (params["presence"] * feature + 0.1 * noise).flatten()[:, None]
  masks = params["scale"] * x + params["map"]
  outputs = {
    "multistep_pred_multimasks_high_res": [masks.flatten(0, 1)[:, None]],
    "multistep_pred_ious": [presence.sigmoid()],
    "multistep_object_score_logits": [presence],
  }
  theirs = criterion([outputs], torch.tensor(batch["masks"]).reshape(1, -1, SIZE, SIZE))
  theirs["core_loss"].backward()
  found = {"focal": "loss_mask", "dice": "loss_dice", "iou": "loss_iou", "presence": "loss_class"}
  for ours, name in (found | {"loss": "core_loss"}).items():
    np.testing.assert_allclose(metrics[ours], theirs[name].item(), rtol=1e-5, err_msg=name)
  assert_same(gradient, {name: x.grad.numpy() for name, x in params.items()})


def test_cells_count_alike_whatever_part_of_the_batch_they_lie_in():
  """How many are present differs between rows, and which are live only the network says."""
  batch = cells_batch()
  batch["present"][:] = np.arange(ROWS)[:, None] > 2 * np.arange(CELLS)
  batch["present"][3] = False
  loss = cells_loss(lambda presence: presence > -0.3)
  whole = step_of(loss, PARAMS, batch, 1)
  assert all(value > 0 for value in whole[0].values())
  assert_same(step_of(loss, PARAMS, batch, 6), whole)


def test_the_generator_learns_alike_from_microbatches():
  """Deep supervision on two resolutions; rows with more and with less that is ignored."""
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.standard_normal((4, 4, 8, 8, 1), np.float32),
    "target": rng.integers(0, 3, (4, 4, 8, 8)).astype(np.uint8),
  }
  batch["target"][1, :, 2:] = batch["target"][2, 1:] = 255
  batch["target"][3] = 0
  sizes = (4, 4, 4), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), ((1, 3, 3), (3, 3, 3), (1, 1, 1))
  unet = UNet(UNetConfig(*sizes, convs_per_stage=1), 3)
  init = jax.jit(lambda key: unet.init(key, batch["image"][:1], True)["params"])
  params = init(jax.random.key(0))
  membership = np.array([[0, 0], [1, 0], [0, 1]], bool)
  loss = generator_loss_fn(unet, GeneratorConfig(), membership, False)
  assert_same(step_of(loss, params, batch, 2), step_of(loss, params, batch, 1))


@pytest.mark.full
def test_the_refiner_learns_alike_from_microbatches():
  """Boxes are moved alike, and which cells are live in the second stage the first one says."""
  rng = np.random.default_rng(0)
  shape = 4, 2, 3
  logits = 8 * rng.standard_normal((*shape, MASK_SIDE, MASK_SIDE), np.float32)
  logits[::3, 0] = -16
  present = np.ones(shape, bool)
  present[1] = present[2, 0] = False
  batch = {
    "images": rng.random((4, 3, SIDE, SIDE, 3), np.float32), "logits": logits,
    "masks": (logits > 1) * present[..., None, None].astype(np.float32),
    "known": np.ones_like(logits), "present": present, "absent": ~present,
    "inside": np.ones((4, 3), bool), "depth": np.full(4, 9, np.int32),
  }
  refinement = RefinementConfig(stages=(ALONE, ALONE), live_margin=0)
  loss = refiner_loss_fn(MODEL, RefinerConfig(), refinement)
  params = drawn(presence_bias=0.0)
  whole = step_of(loss, params, batch, 1)
  assert_same(step_of(loss, params, batch, 2), whole)
