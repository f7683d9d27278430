"""What the refiner's loss sees, and which way its gradients go."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import ndimage
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
from rfmedsam2_jax.data import pipeline
from rfmedsam2_jax.data.augmentation import AugmentationConfig
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.preprocessing import Prepared, Restore, save_case
from rfmedsam2_jax.data.prompt_mistakes import PromptCorruptionConfig
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.nn.losses import RefinerLossConfig
from rfmedsam2_jax.nn.unet import UNet, UNetConfig
from rfmedsam2_jax.refinement import RefinementConfig
from rfmedsam2_jax.refinement.prompts import next_prompts
from rfmedsam2_jax.segmentation import segmenter
from rfmedsam2_jax.training import step, train_networks
from rfmedsam2_jax.training.state import silenced_decoder
from rfmedsam2_jax.training.step import refiner_loss_fn, row_keys


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


class Still(AugmentationConfig):
  rotation_probability = scaling_probability = noise_probability = blur_probability = 0.0
  brightness_probability = contrast_probability = 0.0
  gamma_probability = gamma_inverted_probability = 0.0


class Stopped(Exception):
  pass


@pytest.fixture
def first_cells(monkeypatch):
  """A function of a batch and a key: the cells with which training begins its first stage."""
  def cells_of(batch, key):
    found = []

    def stop(model, params, config, slices, cells, inside, depth):
      found.append(jax.tree.map(np.asarray, cells))
      raise Stopped

    monkeypatch.setattr(step, "all_stages_on_grid", stop)
    with pytest.raises(Stopped):
      refiner_loss_fn(MODEL, RefinerConfig(), CONFIG)({}, batch, key)
    return found[0]

  return cells_of


@pytest.mark.parametrize("zoom", [0.0, 1.25])
def test_training_and_prediction_begin_with_the_same_prompts(
  monkeypatch, tmp_path, first_cells, zoom
):
  """One volume through both: what is stored for training, drawn as a batch, and what is refined;
  on whole slices and in the cut of a structure."""
  rng = np.random.default_rng(0)
  depth, height, width, structures = 4, 40, 52, 3
  slab = ndimage.gaussian_filter(rng.standard_normal((depth, height, width, 4)), (0, 4, 4, 0)) * 60
  slab[:, 26:, :, 0] = slab[..., 28:, 0] = 99  # nothing there
  slab[:, 16:, :, 1] = slab[:, :8, :, 3] = -99
  slab[1, ..., 2] = -9
  slab[1, 5, 7, 2] = 90  # a voxel between the pixels of the mask grid
  monkeypatch.setattr(segmenter, "predict_slabs", lambda *_: [(slice(0, depth), slab.copy())])
  labels = Labels(tuple(Structure(x, (n,)) for n, x in enumerate("abc", 1)), False, (1, 2, 3))
  plan = SimpleNamespace(labels=labels, patch_size=(depth, height, width),
                         generator_spacing=None)
  unet = UNet(UNetConfig(), 4)
  owner = segmenter.Segmenter(
    plan, unet, {}, MODEL, None, dataclasses.replace(CONFIG, zoom=zoom))
  shape = depth, height, width
  restore = Restore(shape, (1.0, 1.0, 1.0), (0, 0, 0), shape, (0, 1, 2), shape)
  image = rng.standard_normal((1, *shape)).astype(np.float32)
  prepared = Prepared(image, np.array([[0, 1]], np.float32), restore)
  made = segmenter.first_prompts(owner, prepared, segmenter.run_generator(owner, prepared))
  predicted = made.prompts

  run = RunFolder(tmp_path)
  save_case(run / "preprocessed", "case", prepared, np.zeros(shape, np.uint8), labels)
  train_networks.write_prompts(run, owner, ["case"], lambda line: None)
  nothing = {field.name: 0 for field in dataclasses.fields(PromptCorruptionConfig)
             if field.name.endswith("_probability")}
  cases = pipeline.Cases(run / "preprocessed", ["case"], 0, run / "prompts")
  batches = pipeline.refiner_batches(
    cases, pipeline.RunConfig(SIDE, depth, 1 if zoom else structures, cuts=bool(zoom)),
    labels.membership,
    Still(flips=()), PromptCorruptionConfig(**nothing), pipeline.BatchConfig(1))
  batch = next(batches)
  monkeypatch.setattr(RefinerConfig, "box_jitter", 0.0)
  trained = first_cells(batch, jax.random.key(0))
  order = batch["structures"][0]
  if zoom:
    views = list(dict.fromkeys(made.cuts))
    view = views.index(made.cuts[order[0]])
    assert len(views) > 1 and views[view].height < height
    seen = segmenter.sam_slices(owner, prepared, views, view * depth + np.arange(depth))
    np.testing.assert_allclose(batch["images"][0], seen, atol=1e-6)
  assert 0 < predicted.has_box.sum() < predicted.has_box.size
  for name in ("logits", "presence", "boxes", "has_box", "has_mask"):
    expected = getattr(predicted, name)[order]
    np.testing.assert_array_equal(
      getattr(trained, name), expected.reshape(-1, *expected.shape[2:]), err_msg=name)


def test_boxes_are_jittered_as_in_sam_2_within_its_bound(monkeypatch, first_cells):
  """A tenth of the box, and at most 20 of 1024 pixels; the draws are given to both."""
  utils, key = pytest.importorskip("sam2.modeling.sam2_utils"), jax.random.key(3)
  batch = training_batch()
  moved = first_cells(batch, key)
  monkeypatch.setattr(RefinerConfig, "box_jitter", 0.0)
  still = first_cells(batch, key)
  there = still.has_box
  rows = row_keys(key, batch).rows
  draws = [jax.random.uniform(row, (len(there) // len(rows), 4), minval=-1.0, maxval=1.0)
           for row in rows]
  draws = np.concatenate(draws)[there]
  x0, y0, x1, y1 = still.boxes[there].T[:, :, None, None]
  y, x = np.mgrid[:SIDE, :SIDE]
  masks = torch.from_numpy((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1))[:, None]
  monkeypatch.setattr(torch, "rand", lambda *_, device: torch.from_numpy(draws[:, None] + 1) / 2)
  official, _ = utils.sample_box_points(masks, noise=0.1, noise_bound=20 * SIDE / 1024)
  np.testing.assert_allclose(moved.boxes[there], official.reshape(-1, 4), atol=1e-5)
  size = still.boxes[there][:, 2:] - still.boxes[there][:, :2]
  assert (0.1 * size > 20 * SIDE / 1024).any() and (np.abs(moved.boxes - still.boxes) < 1.26).all()


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
