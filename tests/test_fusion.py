"""One label map from per-organ probabilities, and the first prompts of the truth and of people."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rfmedsam2_jax.data.cuts import whole
from rfmedsam2_jax.data.sam_slices import resize_linear
from rfmedsam2_jax.refinement import RefinementConfig, StageConfig, StageResult, blended, fuse
from rfmedsam2_jax.refinement.first_prompts import GivenPrompt, generated, with_given, with_oracle
from rfmedsam2_jax.segmentation.segmenter import label_map

SHAPE = (1, 1, 4)
# What fusion does not look at, of three cells: predicted IoU, presence, boxes. Then their stage.
OTHERS = np.ones(3), np.ones(3), np.zeros((3, 4)), np.ones(3, bool), np.ones(3, np.int32)


def source(*organs):
  """Probabilities by organ, [1, 1, n]."""
  arrays = [np.array(organ, np.float32).reshape(1, 1, -1) for organ in organs]
  return lambda organ: arrays[organ]


def test_background_where_no_organ_is_above_the_threshold_else_the_likeliest():
  given = source([0.4, 0.6, 0.7, 0.5], [0.45, 0.55, 0.8, 0.1])
  assert fuse([given], (3, 7), SHAPE).labels.ravel().tolist() == [0, 3, 7, 0]
  assert fuse([given], (3, 7), SHAPE, threshold=0.42).labels.ravel().tolist() == [7, 3, 7, 3]
  assert fuse([given], (3, 7), SHAPE).labels.dtype == np.uint8
  assert fuse([given], (3, 700), SHAPE).labels.ravel().tolist() == [0, 3, 700, 0]


def test_later_regions_are_written_over_earlier_ones():
  given = source([0.9, 0.9, 0.4, 0.6], [0.1, 0.6, 0.6, 0.5])
  assert fuse([given], (1, 2), SHAPE, regions=True).labels.ravel().tolist() == [1, 2, 2, 1]


def test_the_winning_probability_is_that_of_the_label_that_was_written():
  given, seen = source([0.9, 0.6, 0.2, 0.6], [0.1, 0.7, 0.3, 0.8]), {}
  for regions in (False, True):
    found = fuse([given], (3, 7), SHAPE, regions=regions, watch=seen.__setitem__)
    assert found.labels.ravel().tolist() == [3, 7, 0, 7]
    np.testing.assert_allclose(found.winning.ravel()[[0, 1, 3]], [0.9, 0.7, 0.8])
    assert list(seen) == [0, 1] and np.array_equal(seen[1], given(1))


def test_runs_are_averaged_and_their_arrays_left_alone():
  first, second = source([0.9, 0.2, 0.6, 0.0]), source([0.3, 0.6, 0.6, 0.9])
  before = first(0).copy()
  assert fuse([first, second], (1,), SHAPE).labels.ravel().tolist() == [1, 0, 1, 0]
  np.testing.assert_array_equal(first(0), before)


def test_the_generator_alone_is_the_arg_max_of_its_softmax():
  logits = np.random.default_rng(0).standard_normal((4, 6, 5, 3)).astype(np.float32)
  softmax = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  labels = fuse(
    [lambda organ: softmax[..., organ + 1]], (1, 2), softmax.shape[:-1], exclusive=True
  ).labels
  np.testing.assert_array_equal(labels, logits.argmax(axis=-1))
  assert (softmax.max(axis=-1) < 0.5).any()


@pytest.mark.parametrize("background, expected", [
  ("threshold", [0, 0, 0, 2]), ("rest", [1, 0, 0, 2]),
])
def test_background_as_the_rest_leaves_no_gap_between_neighbours_that_are_unsure(
  background, expected
):
  """Both are below the threshold, but together they rule background out."""
  unsure = source([0.45, 0.45, 0.2, 0.3], [0.4, 0.1, 0.2, 0.6])
  segmenter = SimpleNamespace(
    plan=SimpleNamespace(labels=SimpleNamespace(output_values=(1, 2), regions=False)),
    refinement=RefinementConfig(background=background),
  )
  found: Any = SimpleNamespace(
    segmenter=segmenter, prepared=SimpleNamespace(restore=SimpleNamespace(native_shape=SHAPE)),
    probability=lambda stage, organ: unsure(organ))
  assert label_map([found], 0).ravel().tolist() == [1, 0, 0, 2]  # a softmax's
  assert label_map([found], 1).ravel().tolist() == expected


def test_cells_that_were_not_run_keep_the_vote_of_the_generator():
  odds = np.full((3, 2, 2), 2.0, np.float16)
  logits = np.stack([np.full((2, 2), x, np.float16) for x in (-1024, 1, 3)])
  cells = np.array([[0, 0], [0, 2], [1, 1]])
  result = StageResult(cells, logits, *OTHERS)
  vote = 1 / (1 + np.exp(-2.0))

  def mine(weight):
    config = RefinementConfig(generator_weight=weight)
    return blended(odds, odds, result, 0, config, lambda x, _: x, whole((2, 2)))[:, 0, 0]

  np.testing.assert_allclose(mine(0.0), [0, vote, 1 / (1 + np.exp(-1))], atol=1e-4)
  both = [0.25 * vote, vote, 0.25 * vote + 0.75 / (1 + np.exp(-1))]
  np.testing.assert_allclose(mine(0.25), both, atol=1e-4)
  alone = blended(odds, odds, None, 0, RefinementConfig(), None, whole((2, 2)))
  np.testing.assert_allclose(alone, vote, atol=1e-4)


@pytest.mark.parametrize("limit", [3.0, 8.0])
def test_changes_of_the_stages_are_added_to_the_detail_of_the_generator(limit):
  """What no stage changed, within its limit, is the generator's, to the voxel; absence and large
  changes win."""
  rng = np.random.default_rng(0)
  odds = (6 * rng.standard_normal((4, 12, 12))).astype(np.float16)
  seen = resize_linear(odds, 8).astype(np.float16)
  changed = seen.clip(-limit, limit)
  changed[1], changed[2, 2:6, 2:6] = -1024, 20
  cells = np.array([[0, 0], [0, 1], [0, 2]])
  result = StageResult(cells, changed[:3], *OTHERS)
  resize = lambda x, shape: resize_linear(x, shape[0])  # noqa: E731
  stage = StageConfig(residual=True, residual_limit=limit)
  config = RefinementConfig((stage, stage), fusion="changes")
  labels = blended(odds, seen, result, 0, config, resize, whole((12, 12))) > 0.5
  np.testing.assert_array_equal(labels[[0, 3]], odds[[0, 3]] > 0)
  assert not labels[1].any() and labels[2, 4:8, 4:8].all()
  masks = RefinementConfig()
  replaced = blended(odds, seen, result, 0, masks, resize, whole((12, 12))) > 0.5
  assert (replaced[0] != (odds[0] > 0)).any(), "the mask grid alone is too coarse for this"


@pytest.mark.parametrize("limits", [(8.0, 3.0), (3.0, 8.0)])
def test_stages_of_unlike_limits_that_change_nothing_leave_the_generator(limits):
  """A cell has passed the limits of the stages up to the last one that ran it, not only one."""
  odds = (6 * np.random.default_rng(0).standard_normal((3, 12, 12))).astype(np.float16)
  seen = resize_linear(odds, 8).astype(np.float16)
  stages = tuple(StageConfig(residual=True, residual_limit=limit) for limit in limits)
  config = RefinementConfig(stages, fusion="changes")
  first = seen.clip(-limits[0], limits[0])
  second = first.clip(-limits[1], limits[1])
  cells, stage = np.array([[0, 0], [0, 1], [0, 2]]), np.array([2, 1, 2])
  result = StageResult(cells, np.stack([second[0], first[1], second[2]]), *OTHERS[:-1], stage)
  resize = lambda x, shape: resize_linear(x, shape[0])  # noqa: E731
  found = blended(odds, seen, result, 0, config, resize, whole((12, 12)))
  limit = np.minimum.accumulate(limits)[stage - 1][:, None, None]
  expected = 1 / (1 + np.exp(-odds.astype(np.float64).clip(-limit, limit)))
  np.testing.assert_allclose(found, expected, atol=1e-6)


def prompts_of_a_generator():
  """Two organs, three slices, 16 x 16 masks of a 64 x 64 image; the second slice has organ 0."""
  logits = np.full((2, 3, 16, 16), -5, np.float16)
  logits[0, 1, 4:12, 4:12] = 5
  return generated(logits, 64, 2.0)


def test_oracle_prompts_take_presence_and_boxes_from_the_truth_but_no_mask():
  prompts = prompts_of_a_generator()
  truth = np.zeros((2, 3, 4), np.float32)
  present = np.zeros((2, 3), bool)
  # A part of what the generator found, and an organ that it missed.
  truth[0, 1], present[0, 1] = (16, 16, 28, 24), True
  truth[1, 2], present[1, 2] = (8, 8, 20, 20), True
  oracle = with_oracle(prompts, truth, present, 64)
  np.testing.assert_array_equal(oracle.presence, present)
  np.testing.assert_array_equal(oracle.has_box, present)
  np.testing.assert_array_equal(oracle.boxes, truth)
  assert oracle.fixed_boxes.all() and not oracle.given.any()
  np.testing.assert_array_equal(oracle.has_mask, present & (np.arange(3) == 1))
  # Rows 16 to 24 and columns 16 to 28 of 64 are in pixels 4 to 6 and 4 to 7 of 16, inclusive.
  rows, columns = np.nonzero(oracle.logits[0, 1] > 0)
  assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 6, 4, 7)
  assert oracle.logits[0, 1, 0, 0] == -32 and oracle.logits.dtype == np.float16
  assert prompts.logits[0, 1, 11, 11] == 5  # the generator's stay as they were


def test_given_prompts_correct_the_generator_and_become_anchors():
  prompts = prompts_of_a_generator()
  mask = np.zeros((32, 32), bool)
  mask[10:20, 6:12] = True
  given = [
    GivenPrompt(0, 1, box=(8, 8, 14.5, 14.5)),
    GivenPrompt(0, 2, points=((5, 6, True), (25, 25.5, False))),
    GivenPrompt(0, 2, points=((5.5, 6.5, True),)),
    GivenPrompt(1, 0, mask=mask),
  ]
  found = with_given(prompts, given, [whole((32, 32))] * 2, 64, 16, resize_linear)
  expected = np.zeros((2, 3), bool)
  expected[[0, 0, 1], [1, 2, 0]] = True
  np.testing.assert_array_equal(found.given, expected)
  np.testing.assert_array_equal(found.presence > 0, expected)
  # The box replaces the generator's, whose mask stays inside of it.
  np.testing.assert_array_equal(found.boxes[0, 1], [16, 16, 30, 30])
  assert found.fixed_boxes[0, 1] and found.has_mask[0, 1]
  rows, columns = np.nonzero(found.logits[0, 1] > 0)
  assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 7, 4, 7)
  # Clicks: all of them, a token each, no box of their own, and where the generator found nothing
  # no mask either.
  assert found.point_labels[0, 2].tolist() == [1, 0, 1]
  assert found.points[0, 2].tolist() == [[10, 12], [50, 51], [11, 13]]
  assert not found.has_box[0, 2] and not found.has_mask[0, 2] and not found.fixed_boxes[0, 2]
  assert (found.point_labels[0, 1] == -2).all()
  # A mask is its own prompt and makes the box.
  share = resize_linear(mask.astype(np.float32)[None], 16)[0]
  np.testing.assert_array_equal(found.logits[1, 0] > 0, share > 0.5)
  assert found.logits[1, 0].max() == 32 and found.has_mask[1, 0]
  np.testing.assert_array_equal(found.boxes[1, 0], [12, 20, 23, 39])
  assert not prompts.given.any() and not prompts.has_mask[1, 0]
