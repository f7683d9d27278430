"""Slab-wise sliding windows against the all-at-once computation."""

import itertools

import numpy as np
import pytest

from rfmedsam2_jax.segmentation.sliding_window import importance, predict_slabs, window_starts


def all_at_once(forward, image, patch, overlap):
  """The definition: sums and weights of the whole volume in one array each."""
  channels = forward(np.zeros((1, *patch, image.shape[0]), np.float32)).shape[-1]
  sums, weights = np.zeros((*image.shape[1:], channels)), np.zeros(image.shape[1:])
  gauss = np.einsum("i,j,k->ijk", *(importance(p).astype(float) for p in patch))
  starts = (window_starts(n, p, overlap) for n, p in zip(image.shape[1:], patch, strict=True))
  for corner in itertools.product(*starts):
    box = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
    logits = forward(image[(slice(None), *box)].transpose(1, 2, 3, 0)[None])[0]
    sums[box] += logits * gauss[..., None]
    weights[box] += gauss
  return sums / weights[..., None]


def forward(x):
  """Depends on the place in the window, so that a wrong weight or place shows."""
  place = np.linspace(0, 1, x[0, ..., 0].size).reshape(x.shape[1:4])
  return np.stack([x.sum(-1), x[..., 0] * place, place + 0 * x[..., 0]], -1).astype(np.float32)


@pytest.mark.parametrize(
  "shape, batch_size, overlap",
  [((19, 13, 22), 1, 0.5), ((19, 13, 22), 4, 0.5), ((8, 6, 10), 3, 0.5), ((23, 9, 10), 2, 0.25)],
)
def test_slabs_equal_the_all_at_once_computation(shape, batch_size, overlap):
  patch = (8, 6, 10)
  image = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
  expected = all_at_once(forward, image, patch, overlap)
  calls = []

  def counted(x):
    calls.append(x.shape)
    return forward(x)

  end = 0
  for where, logits in predict_slabs(counted, image, patch, overlap, batch_size):
    assert where.start == end and len(logits) == where.stop - where.start <= patch[0]
    end = where.stop
    np.testing.assert_allclose(logits, expected[where], rtol=1e-4, atol=1e-5)
  assert end == shape[0]
  assert set(calls) == {(batch_size, *patch, 2)}


def test_a_volume_smaller_than_the_patch_is_padded_and_cut_again():
  image = np.random.default_rng(0).standard_normal((1, 5, 9, 4)).astype(np.float32)
  ((where, logits),) = predict_slabs(lambda x: 2 * x, image, (8, 6, 10))
  assert where == slice(0, 5)
  np.testing.assert_allclose(logits[..., 0], 2 * image[0], rtol=1e-5)


def test_mirroring_averages_over_all_flips_and_flips_back():
  image = np.random.default_rng(0).standard_normal((1, 8, 6, 10)).astype(np.float32)
  ramp = np.arange(8.0)[:, None, None, None]
  ((_, logits),) = predict_slabs(lambda x: x * ramp, image, (8, 6, 10), mirror_axes=(0, 2))
  np.testing.assert_allclose(logits[..., 0], image[0] * 3.5, rtol=1e-4, atol=1e-6)


def test_windows_start_where_those_of_nnunet_do():
  # compute_steps_for_sliding_window of nnU-Net 2 for (size, tile) at a step of half a tile
  assert window_starts(162, 30, 0.5) == [0, 15, 29, 44, 59, 73, 88, 103, 117, 132]
  assert window_starts(529, 224, 0.5) == [0, 102, 203, 305]
  assert window_starts(224, 224, 0.5) == [0]


@pytest.mark.parametrize("shape", [(9, 13, 6), (5, 5, 3)])
def test_reversed_axes_are_the_mirrored_volumes_windows(shape):
  image = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)

  def place(x):  # depends on where the window lies, also on where it is padded
    return np.cumsum(np.cumsum(np.cumsum(x, 1), 2), 3)

  def mirrored(x):
    return np.flip(place(np.flip(x, (1, 2))), (1, 2))

  def joined(*arguments):
    return np.concatenate([slab for _, slab in predict_slabs(*arguments)])

  patch = (6, 6, 4)
  expected = joined(place, np.flip(image, (1, 2)), patch)
  ours = joined(mirrored, image, patch, 0.5, 1, (), (0, 1))
  np.testing.assert_allclose(ours, np.flip(expected, (0, 1)), atol=1e-5)
