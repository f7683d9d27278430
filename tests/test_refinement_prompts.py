"""Prompts of the stages: what masks, boxes and presence become before SAM 2 hears of them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_refinement import DEPTH, NEAR, params_of, start_cells
from small_sam2 import MASK_SIDE, MODEL, SIDE

from rfmedsam2_jax.nn.unet import UNet, UNetConfig
from rfmedsam2_jax.refinement import RefinementConfig, StageConfig
from rfmedsam2_jax.refinement.prompts import (
  anchor_score,
  live_cells,
  scaled_boxes,
  stage0_logits,
)
from rfmedsam2_jax.refinement.stages import sam_prompts


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
  """The generator sees every channel; presence and boxes are those of the mask grid."""
  from rfmedsam2_jax.segmentation import segmenter as segmenter_lib

  rng = np.random.default_rng(0)
  height, width = 40, 52  # larger than the 16 x 16 mask prompts
  slab = rng.standard_normal((3, height, width, 3)).astype(np.float32) * 8
  slab[..., 1] -= 60
  slab[0, 10:20, 13:26, 1] = 90
  seen = []
  monkeypatch.setattr(RefinementConfig, "box_margin", 0.0)
  monkeypatch.setattr(
    segmenter_lib, "predict_slabs",
    lambda forward, image, *rest: seen.append(image) or [(slice(0, 3), slab)],
  )
  plan = types.SimpleNamespace(
    labels=types.SimpleNamespace(structures=("a", "b"), regions=False), patch_size=(3, 40, 52)
  )
  unet = UNet(UNetConfig(), 3)
  owner = segmenter_lib.Segmenter(plan, unet, {}, MODEL, None, RefinementConfig())
  image = np.zeros((2, 3, height, width), np.float32)
  prepared = types.SimpleNamespace(image=image)
  log_odds = segmenter_lib.run_generator(owner, prepared)
  assert seen[0] is image
  prompts = segmenter_lib.first_prompts(owner, prepared, log_odds).prompts
  odds = np.moveaxis(np.asarray(stage0_logits(jnp.asarray(slab), False)), -1, 0)
  expected = jax.image.resize(odds, (2, 3, MASK_SIDE, MASK_SIDE), "linear", antialias=True)
  np.testing.assert_allclose(prompts.logits, expected, rtol=2e-3, atol=2e-2)
  np.testing.assert_array_equal(prompts.presence[0], [1, 0, 0])
  rows, columns = np.nonzero(prompts.logits[0, 0] > 0)
  assert (columns.min(), columns.max(), rows.min(), rows.max()) == (4, 7, 4, 7)
  np.testing.assert_array_equal(prompts.boxes[0, 0], [16, 16, 31, 31])


def test_boxes_reach_from_the_first_pixel_to_the_end_of_the_last():
  masks = np.zeros((3, 20, 40), bool)
  masks[0, 5:9, 10:31] = True
  masks[1, 19, 39] = True
  scale = np.array([64 / 40, 64 / 20] * 2)
  for array in (masks, jnp.asarray(masks)):
    boxes, present = scaled_boxes(array, 64, 0.0)
    np.testing.assert_array_equal(present, [True, True, False])
    tight = [10, 5, 31, 9] * scale - [0, 0, 1, 1]
    np.testing.assert_allclose(boxes[0], tight, rtol=1e-6)
    np.testing.assert_allclose(boxes[1], [39 * 1.6, 19 * 3.2, 63, 63], rtol=1e-6)
    np.testing.assert_array_equal(boxes[2], 0)
    wide, _ = scaled_boxes(array, 64, 3.0)
    np.testing.assert_allclose(wide[0], tight + [-3, -3, 3, 3], rtol=1e-6)
    np.testing.assert_allclose(wide[1, 2:], [63, 63])  # clipped to the image
    np.testing.assert_array_equal(scaled_boxes(array, 40, 1.0)[0][0], [9, 9, 31, 18])


@pytest.mark.parametrize("width", [400, 100, 18])
def test_the_box_of_one_pixel_is_that_pixel(width):
  """An image of 100: s = 0.25, 1 and 5.56."""
  masks, s = np.eye(width, dtype=bool)[:, None], 100 / width
  boxes, present = scaled_boxes(masks, 100, 0.0)
  first = np.arange(width) * s
  assert present.all() and (boxes[:, 2:] >= boxes[:, :2]).all()
  np.testing.assert_allclose(boxes[:, 0], first.clip(0, 99), rtol=1e-6)
  np.testing.assert_allclose(boxes[:, 2] + 1, np.clip(first + max(s, 1), 0, 100), rtol=1e-6)
  np.testing.assert_array_equal(boxes[:, [1, 3]], [[0, 99]] * width)


def test_the_prompt_encoder_adds_half_a_pixel_to_corners():
  params = params_of()
  cells = jax.tree.map(lambda x: x[:DEPTH], start_cells())
  encode = lambda model, prompts: model.sam_prompt_encoder(prompts)[0]  # noqa: E731
  tokens = MODEL.apply({"params": params}, sam_prompts(cells, NEAR), method=encode)
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
  labels = lambda *use: np.asarray(sam_prompts(cells, StageConfig(box=use[0], mask=use[1])).labels)  # noqa: E731
  exists = lambda row: [int(x) for x in row if x != -2]  # noqa: E731
  assert [exists(row) for row in labels(True, True)] == [[-1, -1], [2, 3, -1], [2, 3, -1]]
  assert [exists(row) for row in labels(False, True)] == [[-1, -1]] * 3
  np.testing.assert_array_equal(sam_prompts(cells, NEAR).has_mask, [False, True, True])
  assert not sam_prompts(cells, StageConfig(mask=False)).has_mask.any()
  clicks = np.array([[1, -2], [1, 0], [1, -2]])
  cells = cells._replace(points=np.ones((3, 2, 2)), point_labels=clicks)
  assert [exists(row) for row in labels(True, True)] == [
    [1, -1], [2, 3, 1, 0, -1], [2, 3, 1, -1]
  ]


def test_the_anchor_score_is_presence_times_mean_foreground_probability():
  logits = np.full((3, 4, 4), -5.0, np.float32)
  logits[0, 0, :2] = 1.0, 3.0
  logits[1] = logits[0]
  mean = (1 / (1 + np.exp(-1.0)) + 1 / (1 + np.exp(-3.0))) / 2
  score = anchor_score(jnp.array([1.0, 0.5, 1.0]), jnp.asarray(logits))
  np.testing.assert_allclose(score, [mean, mean / 2, 0], rtol=1e-6)
