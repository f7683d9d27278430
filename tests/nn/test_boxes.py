"""Boxes between grids and the square image: no side is lost, none turns round."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rfmedsam2_jax.nn.boxes import boxes_from_square, boxes_to_square

SIDE, HEIGHT = 192, 96
# s = 0.25, 1 and 5.49 columns to the pixel; rows have another scale.
WIDTHS = (768, 192, 35)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_box_covers_its_first_and_its_last_index_and_comes_back(width):
  """All pairs of some first and last columns, one column and the whole width among them."""
  columns = sorted({0, 1, 19, 28, width // 2, width - 2, width - 1})
  x0, x1 = np.array(list(itertools.combinations_with_replacement(columns, 2)), np.float32).T
  boxes = np.stack([x0, np.full_like(x0, 7), x1, np.full_like(x1, 7)], axis=1)
  s = SIDE / width
  for array in (boxes, jnp.asarray(boxes)):
    found = boxes_to_square(array, HEIGHT, width, SIDE)
    assert type(found) is type(array)
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(found[:, 0], x0 * s, rtol=1e-6)
    np.testing.assert_allclose(found[:, 2], np.maximum(x0 * s, (x1 + 1) * s - 1), rtol=1e-6)
    np.testing.assert_allclose(found[:, [1, 3]], [[14, 15]] * len(x0))  # one row of two pixels
    assert (found[:, :2] <= found[:, 2:]).all()
    back = np.asarray(boxes_from_square(found, HEIGHT, width, SIDE))
    # What is narrower than a pixel comes back as wide as one.
    wide = np.maximum(x1, x0 + 1 / s - 1)
    np.testing.assert_allclose(back, np.stack([x0, boxes[:, 1], wide, boxes[:, 3]], 1), atol=1e-4)


def test_at_the_image_s_own_side_boxes_are_those_of_sam_2():
  utils = pytest.importorskip("sam2.modeling.sam2_utils")
  masks = np.zeros((3, 1, SIDE, SIDE), bool)
  masks[0, 0, 19:29, 5:90] = masks[1, 0, 7, 191] = masks[2] = True
  official = utils.mask_to_box(torch.from_numpy(masks))[:, 0].numpy().astype(np.float32)
  np.testing.assert_array_equal(boxes_to_square(official, SIDE, SIDE, SIDE), official)
  np.testing.assert_array_equal(boxes_from_square(official, SIDE, SIDE, SIDE), official)
