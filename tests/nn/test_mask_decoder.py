"""Prompts and the mask decoder against sam2 1.1.0 (PyTorch) with the same weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_sam2
from torch_sam2 import TINY, nchw, relative_error

from rfmedsam2_jax.nn.prompt_encoder import ABSENT, Prompts, box_prompts, no_prompts
from rfmedsam2_jax.nn.sam2 import ABSENT_LOGIT, SAM2

torch = torch_sam2.torch
TOLERANCE = 5e-6  # about ten times what is seen
N, G, C = 3, TINY.grid, TINY.d_model


def random(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


EMBEDDING = random(1, N, G, G, C)
HIGH_RES = (random(2, N, 4 * G, 4 * G, C // 8), random(3, N, 2 * G, 2 * G, C // 4))
MASK = 4 * random(4, N, 4 * G, 4 * G)
BOXES = np.array([[3, 5, 70, 101], [0, 0, 127, 127], [40.5, 8, 41, 9]], np.float32)
POINTS = np.array([[[3, 5], [9, 99]], [[0, 127], [64, 64]], [[31.5, 2], [8, 77]]], np.float32)


@pytest.fixture(scope="module")
def models():
  model = torch_sam2.official(TINY)
  return model, torch_sam2.params_of(model, TINY)


@functools.partial(jax.jit, static_argnames=("multimask", "dynamic_multimask"))
def decode(params, prompts, **options):
  return SAM2(TINY).apply(
    {"params": params}, EMBEDDING, HIGH_RES, prompts, **options, method="decode"
  )


def official_decode(model, points=None, labels=None, mask=None, multimask=False):
  """What the official tracker makes of the features: masks, IoUs, presence, pointer, all gated."""
  inputs = None
  if points is not None:
    inputs = dict(point_coords=torch.tensor(points), point_labels=torch.tensor(labels))
  with torch.no_grad():
    masks, _, ious, _, _, pointer, presence = model._forward_sam_heads(
      nchw(EMBEDDING), inputs, None if mask is None else nchw(mask[..., None]),
      [nchw(x) for x in HIGH_RES], multimask,
    )
  return masks, ious, presence[:, 0], pointer


def assert_same(ours, theirs, tolerance=TOLERANCE):
  for name, reference in zip(("masks", "ious", "presence", "pointer"), theirs, strict=True):
    error = relative_error(getattr(ours, name), reference)
    assert error < tolerance, f"{name}: {error:.2g}"


def with_not_a_point(points, labels):
  """The token that the official encoder adds itself."""
  n = len(points)
  points = np.concatenate([points, np.zeros((n, 1, 2), np.float32)], axis=1)
  labels = np.concatenate([labels, np.full((n, 1), -1, np.int32)], axis=1)
  return Prompts(jnp.asarray(points), jnp.asarray(labels))


def box_labels(n=N):
  return np.tile(np.array([2, 3], np.int32), (n, 1))


def test_box_and_mask_decode_as_in_the_official_model(models):
  model, params = models
  expected = official_decode(model, BOXES.reshape(N, 2, 2), box_labels(), MASK)
  assert_same(decode(params, box_prompts(BOXES, mask=MASK)), expected)


@pytest.mark.parametrize("multimask", [False, True])
def test_points_decode_as_in_the_official_model(models, multimask):
  model, params = models
  labels = np.array([[1, 0], [0, 0], [1, 1]], np.int32)
  ours = decode(params, with_not_a_point(POINTS, labels), multimask=multimask)
  assert ours.masks.shape[1] == (3 if multimask else 1)
  assert_same(ours, official_decode(model, POINTS, labels, multimask=multimask))


def test_unprompted_cells_decode_as_in_the_official_tracker(models):
  model, params = models
  assert_same(decode(params, no_prompts(N), multimask=True), official_decode(model, multimask=True))


def test_what_a_cell_lacks_is_hidden_from_it_alone(models):
  """One batch of box, mask or neither equals the official model cell by cell."""
  model, params = models
  has_box, has_mask = np.array([True, False, True]), np.array([False, False, True])
  mask = np.where(has_mask[:, None, None], MASK, np.nan)
  ours = decode(params, box_prompts(BOXES, jnp.asarray(has_box), mask, jnp.asarray(has_mask)))
  boxed = official_decode(model, BOXES.reshape(N, 2, 2), box_labels())
  bare = official_decode(model)
  masked = official_decode(model, BOXES.reshape(N, 2, 2), box_labels(), MASK)
  assert_same(ours, [torch.stack([a[0], b[1], c[2]])
                     for a, b, c in zip(boxed, bare, masked, strict=True)])


def test_absent_tokens_change_nothing(models):
  _, params = models
  labels = np.array([[1, 0], [0, 0], [1, 1]], np.int32)
  prompts = with_not_a_point(POINTS, labels)
  padded = Prompts(
    jnp.concatenate([prompts.points, jnp.full((N, 4, 2), 50.0)], axis=1),
    jnp.concatenate([prompts.labels, jnp.full((N, 4), ABSENT)], axis=1),
  )
  for a, b in zip(decode(params, padded), decode(params, prompts), strict=True):
    assert relative_error(a, b) < 1e-5


def test_the_not_a_point_token_matters(models):
  """The official paths have it behind a box; a port that leaves it out is far off."""
  _, params = models
  full = box_prompts(BOXES)
  without = Prompts(full.points[:, :2], full.labels[:, :2])
  assert relative_error(decode(params, without).masks, decode(params, full).masks) > 0.01


def test_unstable_masks_give_way_to_the_best_of_three_and_pointers_do_not(models, monkeypatch):
  model, params = models
  prompts = box_prompts(BOXES, mask=MASK)
  single = decode(params, prompts)
  from rfmedsam2_jax.nn import mask_decoder

  # A threshold between the cells' stabilities, so that some are stable and some are not.
  scores = np.sort(np.asarray(mask_decoder.stability(single.masks[:, 0])))
  assert scores[0] < scores[-1] < 1
  threshold = float(scores[-2:].mean())
  monkeypatch.setattr(mask_decoder, "STABILITY_THRESHOLD", threshold)
  official = model.sam_mask_decoder
  monkeypatch.setattr(official, "dynamic_multimask_via_stability", True)
  monkeypatch.setattr(official, "dynamic_multimask_stability_thresh", threshold)
  ours = decode(params, prompts, dynamic_multimask=True)
  assert_same(ours, official_decode(model, BOXES.reshape(N, 2, 2), box_labels(), MASK))
  kept = (np.asarray(ours.masks) == np.asarray(single.masks)).all(axis=(1, 2, 3))
  assert kept.sum() == 1
  np.testing.assert_array_equal(ours.pointer, single.pointer)


def test_stability_threshold_and_delta_are_those_of_the_video_predictor():
  import inspect

  from sam2 import build_sam

  from rfmedsam2_jax.nn import mask_decoder

  source = inspect.getsource(build_sam.build_sam2_video_predictor)
  assert f"stability_delta={mask_decoder.STABILITY_DELTA}" in source
  assert f"stability_thresh={mask_decoder.STABILITY_THRESHOLD}" in source


def test_gate_hides_absent_objects_and_decode_does_not(models):
  model = torch_sam2.official(TINY, presence_bias=0.0)
  params = torch_sam2.params_of(model, TINY)
  raw = decode(params, box_prompts(BOXES))
  # Presence logits on both sides of zero.
  shift = -float(np.sort(np.asarray(raw.presence))[:2].mean())
  model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(shift)
  params = torch_sam2.params_of(model, TINY)
  raw = decode(params, box_prompts(BOXES))
  assert (raw.presence > 0).any() and (raw.presence < 0).any()
  assert float(raw.masks.min()) > ABSENT_LOGIT / 2
  gated = SAM2(TINY).apply({"params": params}, raw, method="gate")
  assert_same(gated, official_decode(model, BOXES.reshape(N, 2, 2), box_labels()))


def test_a_given_mask_becomes_a_mask_prompt_as_in_the_official_model(models):
  model, params = models
  given = (random(9, N, 16 * G, 16 * G) > 0).astype(np.float32)
  ours = SAM2(TINY).apply({"params": params}, given, method="mask_prompt")
  with torch.no_grad():
    theirs = model.mask_downsample(torch.from_numpy(given)[:, None])[:, 0]
  assert relative_error(ours, theirs) < TOLERANCE


def test_gradients_are_finite_without_prompts_and_spare_the_random_fourier_matrix(models):
  _, params = models
  nothing = box_prompts(BOXES, jnp.zeros(N, bool), jnp.full(MASK.shape, jnp.nan),
                        jnp.zeros(N, bool))
  gradient = jax.jit(jax.grad(lambda params: decode(params, nothing).masks.sum()))(params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
  matrix = gradient["sam_prompt_encoder"]["pe_layer"]["positional_encoding_gaussian_matrix"]
  assert not matrix.any()
