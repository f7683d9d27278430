"""Losses against PyTorch's functions, and their promises about what must not count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfmedsam2_jax.nn import losses

torch = pytest.importorskip("torch")
F = torch.nn.functional

MEMBERSHIP = np.array([[0, 0], [1, 0], [0, 1], [0, 0]], bool)  # atom 3 was not asked for
REGIONS = np.array([[0, 0], [1, 0], [1, 1]], bool)


def patch(channels, atoms, seed=0):
  rng = np.random.default_rng(seed)
  logits = (3 * rng.standard_normal((2, 4, 6, 4, channels))).astype(np.float32)
  target = rng.integers(0, atoms, (2, 4, 6, 4)).astype(np.uint8)
  target[rng.random(target.shape) < 0.2] = 255
  return logits, target


def torch_dice(p, truth, valid, batch_dice):
  axes = (0, 1, 2, 3) if batch_dice else (1, 2, 3)
  p, truth = p * valid[..., None], truth * valid[..., None]
  return 1 - ((2 * (p * truth).sum(axes) + 1e-5) / ((p + truth).sum(axes) + 1e-5)).mean()


@pytest.mark.parametrize("batch_dice", [True, False])
def test_softmax_loss_is_dice_and_torchs_cross_entropy_without_ignored_voxels(batch_dice):
  logits, target = patch(3, 4)
  config = losses.GeneratorLossConfig(batch_dice=batch_dice)
  sums = losses.segmentation_sums(logits, target, MEMBERSHIP, False, config)
  total, parts = losses.segmentation_loss(sums, config)
  classes = torch.tensor(np.where(target == 3, 0, target).astype(int))
  t = torch.tensor(logits)
  entropy = F.cross_entropy(t.movedim(-1, 1), classes, ignore_index=255)
  valid = classes != 255
  truth = F.one_hot(classes * valid, 3)[..., 1:]
  dice = torch_dice(t.softmax(-1)[..., 1:], truth, valid, batch_dice)
  np.testing.assert_allclose(parts["cross_entropy"], entropy, rtol=1e-5)
  np.testing.assert_allclose(parts["dice"], dice, rtol=1e-5)
  np.testing.assert_allclose(total, entropy + dice, rtol=1e-5)


def test_region_loss_is_dice_and_torchs_binary_cross_entropy_per_region():
  logits, target = patch(2, 3)
  _, parts = losses.segmentation_loss(losses.segmentation_sums(logits, target, REGIONS, True))
  valid = target != 255
  truth = torch.tensor(REGIONS[np.where(valid, target, 0)]).float()
  t, keep = torch.tensor(logits), torch.tensor(valid)
  entropy = F.binary_cross_entropy_with_logits(t[keep], truth[keep])
  np.testing.assert_allclose(parts["cross_entropy"], entropy, rtol=1e-5)
  dice = torch_dice(t.sigmoid(), truth, keep, True)
  np.testing.assert_allclose(parts["dice"], dice, rtol=1e-5)


@pytest.mark.parametrize("regions, batch_dice", [(False, True), (True, True), (True, False)])
def test_sums_of_parts_of_a_batch_add_up_to_those_of_the_whole(regions, batch_dice):
  logits, target = patch(2 if regions else 3, 3)
  target[0, :2] = 255
  config = losses.GeneratorLossConfig(batch_dice=batch_dice)
  sums = functools.partial(losses.segmentation_sums, membership=REGIONS if regions else MEMBERSHIP,
                           regions=regions, config=config)
  rows = [sums(logits[i : i + 1], target[i : i + 1]) for i in range(2)]
  both = jax.tree.map(jnp.add, *rows)
  whole = losses.segmentation_loss(sums(logits, target), config)[0]
  np.testing.assert_allclose(losses.segmentation_loss(both, config)[0], whole, rtol=1e-6)
  apart = np.mean([losses.segmentation_loss(row, config)[0] for row in rows])
  assert abs(apart - whole) > 1e-4 * whole


def test_deep_supervision_halves_weights_and_takes_the_nearest_voxels():
  assert losses.deep_supervision_weights(1) == (1.0,)
  np.testing.assert_allclose(losses.deep_supervision_weights(4), np.array([4, 2, 1, 0]) / 7)
  target = np.arange(2 * 4 * 6 * 8).reshape(2, 4, 6, 8)
  nearest = F.interpolate(torch.tensor(target)[:, None].double(), (4, 3, 2), mode="nearest-exact")
  ours = losses.downsample_target(jnp.asarray(target), (4, 3, 2))
  np.testing.assert_array_equal(ours, nearest[:, 0].numpy())
  logits, target = patch(3, 4)
  levels = [logits, logits[:, 1::2, 1::2, 1::2], logits[:, :1, :1, :1]]
  expected = [
    losses.segmentation_loss(losses.segmentation_sums(x, t, MEMBERSHIP, False))[0]
    for x, t in ((logits, target), (levels[1], target[:, 1::2, 1::2, 1::2]))
  ]
  total, parts = losses.generator_loss(losses.generator_sums(levels, target, MEMBERSHIP))
  np.testing.assert_allclose(total, (2 * expected[0] + expected[1]) / 3, rtol=1e-6)
  np.testing.assert_allclose(parts["dice"] + parts["cross_entropy"], expected[0], rtol=1e-6)


def cells(seed=0, soft=True):
  rng = np.random.default_rng(seed)
  target = rng.random((5, 8, 8)).astype(np.float32)
  return dict(
    mask_logits=(4 * rng.standard_normal((5, 8, 8))).astype(np.float32),
    ious=rng.random(5).astype(np.float32),
    presence=rng.standard_normal(5).astype(np.float32),
    target=target if soft else (target > 0.6).astype(np.float32),
    known=np.ones((5, 8, 8), np.float32),
    present=np.array([1, 1, 0, 1, 1], bool),
    live=np.array([1, 1, 1, 0, 1], bool),
  )


def loss_of(mask_logits, ious, presence, target, known, present, live):
  truth = losses.CellTruth(target, known, present)
  return losses.refiner_loss(losses.refiner_sums(mask_logits, ious, presence, truth, live))


def test_refiner_loss_is_sam2s_on_hard_targets_over_cells_that_count():
  c = cells(soft=False)
  total, parts = loss_of(**c)
  shown = c["present"] & c["live"]
  x, t = torch.tensor(c["mask_logits"][shown]), torch.tensor(c["target"][shown])
  p = x.sigmoid()
  entropy = F.binary_cross_entropy_with_logits(x, t, reduction="none")
  p_t = p * t + (1 - p) * (1 - t)
  focal = ((0.25 * t + 0.75 * (1 - t)) * entropy * (1 - p_t) ** 2).mean()
  dice = 1 - (2 * (p * t).sum((1, 2)) + 1) / ((p + t).sum((1, 2)) + 1)
  iou = ((x > 0) & (t > 0)).sum((1, 2)) / ((x > 0) | (t > 0)).sum((1, 2))
  expected = {
    "focal": focal,
    "dice": dice.mean(),
    "iou": (torch.tensor(c["ious"][shown]) - iou).abs().mean(),
    "presence": F.binary_cross_entropy_with_logits(
      torch.tensor(c["presence"][c["live"]]), torch.tensor(c["present"][c["live"]]).float()
    ),
  }
  for key, value in expected.items():
    np.testing.assert_allclose(parts[key], value, rtol=1e-5, err_msg=key)
  weights = {"focal": 20, "dice": 1, "iou": 1, "presence": 1}
  np.testing.assert_allclose(total, sum(weights[k] * v for k, v in expected.items()), rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_focal_loss_has_a_finite_gradient_where_a_mask_is_exactly_right(gamma):
  """With gamma 0 it is half the cross-entropy, also there."""
  logits, target = jnp.array([[-200.0, 0.3, 200.0]]), jnp.array([[0.0, 1.0, 1.0]])
  loss = lambda x: losses.focal_loss(x, target, jnp.ones((1, 3)), 0.5, gamma)  # noqa: E731
  assert np.isfinite(jax.grad(loss)(logits)).all()
  if gamma == 0:
    np.testing.assert_allclose(loss(logits), np.log1p(np.exp(-0.3)) / 6, rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.focal_loss, losses.mask_dice_loss])
def test_a_soft_target_is_the_optimum_of_its_own_loss(loss):
  c = cells()
  logits = jnp.log(c["target"]) - jnp.log1p(-c["target"])
  best = loss(logits, c["target"], c["known"]).sum()
  for shift in (-0.5, 0.5):
    assert loss(logits + shift, c["target"], c["known"]).sum() > best


def test_dead_cells_and_unknown_pixels_have_no_gradient_and_extreme_values_a_finite_one():
  c = cells()
  c["mask_logits"][3] = np.nan
  c["ious"][3] = c["presence"][3] = np.nan
  c["mask_logits"][0], c["mask_logits"][1, :4] = -1024, 1024
  c["known"][4] = 0

  def loss(logits, ious, presence):
    rest = {k: v for k, v in c.items() if k not in ("mask_logits", "ious", "presence")}
    return loss_of(logits, ious, presence, **rest)[0]

  values = (c["mask_logits"], c["ious"], c["presence"])
  value, (masks, ious, presence) = jax.value_and_grad(loss, (0, 1, 2))(*values)
  assert np.isfinite(value)
  for gradient in (masks, ious, presence):
    assert np.isfinite(gradient).all()
  assert not np.any(masks[2:5]) and np.any(masks[1])
  assert not np.any(ious[2:5]) and not presence[3] and presence[2] and presence[4]
  c["live"][:] = False
  assert loss(*values) == 0


def test_a_patch_without_any_label_gives_zero_gradient():
  logits, target = patch(3, 4)
  target[:] = 255
  value, gradient = jax.value_and_grad(
    lambda x: losses.segmentation_loss(losses.segmentation_sums(x, target, MEMBERSHIP, False))[0]
  )(jnp.asarray(logits))
  assert np.isfinite(value) and not np.any(gradient)


def test_a_structure_thinner_than_a_pixel_is_learnt_as_present():
  """As official code has it at full resolution; its mask counts, but no IoU can be told of it."""
  c = cells(soft=False)
  c["target"][:] = 0
  c["target"][0, 3, 4] = 0.25

  def part(name):
    def loss(logits, ious, presence):
      rest = {k: v for k, v in c.items() if k not in ("mask_logits", "ious", "presence")}
      rest["present"] = np.array([1, 0, 0, 0, 0], bool)
      return loss_of(logits, ious, presence, **rest)[1][name]
    values = c["mask_logits"] - 8, c["ious"], c["presence"]
    return jax.tree.map(np.asarray, jax.grad(loss, (0, 1, 2))(*values))

  presence = part("presence")[2]
  assert presence[0] < 0 and (presence[[1, 2, 4]] > 0).all()
  assert part("focal")[0][0, 3, 4] < 0 and part("dice")[0][0, 3, 4] < 0
  assert not part("iou")[1].any()
