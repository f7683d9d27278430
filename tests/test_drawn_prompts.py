"""Boxes and points that are drawn into the mask prompt: one definition, for tracker and stages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sam2 import MASK_SIDE, SMALL, drawn

from rfmedsam2_jax.base.constants import LOGIT_LIMIT
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.nn.mask_decoder import beside_prototype
from rfmedsam2_jax.nn.prompt_encoder import ABSENT, pack_prompts
from rfmedsam2_jax.nn.prompt_encoder import drawn as draw
from rfmedsam2_jax.nn.sam2 import ImageFeatures
from rfmedsam2_jax.refinement import StageConfig
from rfmedsam2_jax.refinement.prompts import CellPrompts
from rfmedsam2_jax.refinement.stages import decode_stage
from rfmedsam2_jax.tracking import SlicePrompt, point_prompts
from rfmedsam2_jax.tracking.recurrence import Decoding, decode_cells
from rfmedsam2_jax.weights.checkpoint import check_starting_point, save_checkpoint

DRAWS = dataclasses.replace(SMALL, drawn_prompts=True)


def by_hand(box=None, points=(), mask=None):
  """The mask prompt pixel by pixel, boxes and points in pixels of the image."""
  out = np.zeros((MASK_SIDE, MASK_SIDE), np.float32) if mask is None else np.array(mask)
  for (y, x), _ in np.ndenumerate(out):
    if box is not None and mask is None:
      x0, y0, x1, y1 = box
      pixels = [(4 * x + i, 4 * y + j) for i in range(4) for j in range(4)]
      share = np.mean([x0 <= px <= x1 and y0 <= py <= y1 for px, py in pixels])
      out[y, x] = 20 * share - 10
    for px, py, inside in points:
      if np.hypot(4 * x + 1.5 - px, 4 * y + 1.5 - py) <= 5:
        out[y, x] = 10 if inside else -10
  return out


LOGITS = np.random.default_rng(0).normal(0, 4, (MASK_SIDE, MASK_SIDE)).astype(np.float32)
CASES = [
  dict(box=(9, 17, 30, 40)),
  dict(points=((20, 33, 1), (24, 33, 0), (50, 8, 1))),
  dict(box=(9, 17, 30, 40), points=((12, 20, 0), (13, 24, 1))),
  dict(mask=LOGITS),
  dict(mask=LOGITS, points=((12, 20, 1),)),
  dict(mask=LOGITS, box=(9, 17, 30, 40), points=((40, 50, 0),)),
  dict(),
]


def packed(cases):
  """The cases as a stage and training have them: a place for all that may be."""
  box = [c.get("box", (0, 0, 0, 0)) for c in cases]
  points, labels = np.zeros((len(cases), 3, 2), np.float32), np.full((len(cases), 3), ABSENT)
  for row, case in enumerate(cases):
    for slot, (x, y, inside) in enumerate(case.get("points", ())):
      points[row, slot], labels[row, slot] = (x, y), inside
  mask = np.stack([c.get("mask", 7 * np.ones_like(LOGITS)) for c in cases])
  has_box, has_mask = (np.array([name in c for c in cases]) for name in ("box", "mask"))
  return CellPrompts(mask, np.ones(len(cases)), np.array(box, np.float32), has_box, has_mask,
                     points, labels)


def test_previous_logits_else_the_box_and_discs_of_points_over_both():
  cells = packed(CASES)
  found = draw(pack_prompts(cells.boxes, cells.has_box, cells.points, cells.point_labels,
                            cells.logits, cells.has_mask), MASK_SIDE)
  np.testing.assert_array_equal(found.has_mask, [bool(case) for case in CASES])
  for number, case in enumerate(CASES[:-1]):
    np.testing.assert_allclose(found.mask[number], by_hand(**case), atol=1e-5, err_msg=str(case))
  # As a person's prompts come to the tracker: packed to the left, here without masks.
  some = [case for case in CASES if case and "mask" not in case]
  given = [SlicePrompt(0, 0, np.array([p[:2] for p in case.get("points", ())], np.float32)
                       .reshape(-1, 2), np.array([p[2] for p in case.get("points", ())], np.int32),
                       case.get("box")) for case in some]
  found = draw(point_prompts(given), MASK_SIDE)
  for number, case in enumerate(some):
    np.testing.assert_allclose(found.mask[number], by_hand(**case), atol=1e-5, err_msg=str(case))


@pytest.mark.slow
def test_tracker_and_stages_decode_what_is_drawn_alike_and_others_draw_nothing(monkeypatch):
  params, cells = drawn(DRAWS), packed(CASES)
  rng, count, grid, width = np.random.default_rng(1), len(CASES), SMALL.grid, SMALL.d_model
  embedding = rng.standard_normal((count, grid, grid, width), np.float32)
  high_res = tuple(rng.standard_normal((count, side, side, width // part), np.float32)
                   for side, part in ((4 * grid, 8), (2 * grid, 4)))
  prompts = pack_prompts(cells.boxes, cells.has_box, cells.points, cells.point_labels,
                         cells.logits, cells.has_mask)

  def tracker(config, prompts, params=params):
    return jax.jit(lambda: decode_cells(SAM2(config), params, embedding, high_res, prompts))()

  stage = jax.jit(lambda: decode_stage(
    SAM2(DRAWS), params, StageConfig(), embedding, ImageFeatures(embedding, high_res), cells))()
  masks = np.stack([by_hand(**case) for case in CASES])
  by_mask = tracker(DRAWS, prompts._replace(
    mask=jnp.asarray(masks), has_mask=np.array([bool(case) for case in CASES])))
  ours = tracker(DRAWS, prompts)
  for a, b, c in zip(ours, stage, by_mask, strict=True):  # programs of their own, so float32's bits
    np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(a, c, atol=1e-4)
  # The finest layers see it, too.
  for layer in ("drawn_s0", "drawn_s1", "mix_0", "mix_1"):
    blind = jax.tree.map(np.array, params)
    blind["sam_mask_decoder"][layer]["kernel"][:] = 0
    assert np.abs(np.asarray(tracker(DRAWS, prompts, blind).logits - ours.logits)).max() > 0.01
  # A second look is a first one that has what was found as its mask.
  found = jnp.where(ours.presence[:, None, None] > 0, ours.logits, -LOGIT_LIMIT)
  twice = jax.jit(lambda: decode_cells(
    SAM2(DRAWS), params, embedding, high_res, prompts, Decoding(looks=2)))()
  again = tracker(DRAWS, prompts._replace(
    mask=jnp.clip(found, -LOGIT_LIMIT, LOGIT_LIMIT), has_mask=np.ones(count, bool)))
  for a, b in zip(twice, again, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  assert np.abs(np.asarray(twice.logits - ours.logits)).max() > 0.01
  monkeypatch.setattr("rfmedsam2_jax.nn.sam2.drawn", None)
  official = tracker(SMALL, prompts)
  assert np.abs(np.asarray(official.logits - ours.logits)[:3]).max() > 0.1


def test_the_decoder_sees_how_unlike_a_place_is_to_the_mean_of_what_is_drawn():
  rng = np.random.default_rng(0)
  features = rng.standard_normal((2, 6, 6, 3)).astype(np.float32)
  shown = rng.uniform(-1, 1, (2, 6, 6, 1)).astype(np.float32)
  shown[1] = -1  # nothing is the object
  seen = np.asarray(beside_prototype(shown, features))
  mean = np.average(features[0].reshape(-1, 3), axis=0, weights=shown[0].clip(0).ravel())
  np.testing.assert_array_equal(seen[..., :1], shown)
  np.testing.assert_allclose(seen[0, ..., 1:], (features[0] - mean) ** 2, atol=1e-5)
  assert not seen[1, ..., 1:].any()


def test_a_checkpoint_says_that_its_prompts_are_drawn(tmp_path):
  save_checkpoint(tmp_path / "drawn", DRAWS, drawn(DRAWS), {})
  check_starting_point(tmp_path / "drawn", DRAWS)
  with pytest.raises(UserError, match="drawn_prompts=True"):
    check_starting_point(tmp_path / "drawn", SMALL)
  pytest.importorskip("torch")
  from convert.to_torch import to_torch

  with pytest.raises(UserError, match=r"sam2\.drawn_prompts"):
    to_torch(tmp_path / "drawn", tmp_path / "out.pt", print)
  assert not (tmp_path / "out.pt").exists()
