"""SAM 2 as a whole: presets, parameters, adapters, and one pass through every part."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_sam2
from flax.traverse_util import flatten_dict, unflatten_dict
from torch_sam2 import TINY, nchw, relative_error

from rfmedsam2_jax.nn import (
  BUFFERS,
  PRESETS,
  SAM2,
  AdapterConfig,
  MemorySlots,
  box_prompts,
  init_params,
  initialisation,
)
from rfmedsam2_jax.weights.checkpoint import with_adapters

torch = torch_sam2.torch
OFFICIAL_FILES = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}


def shapes_of(config):
  tree = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
  return flatten_dict(tree, sep="/")


def count(shapes, only=""):
  return sum(int(np.prod(x.shape)) for path, x in shapes.items() if only in path)


def test_presets_are_the_official_configurations():
  import sam2
  import yaml

  folder = Path(sam2.__file__).parent / "configs"
  for version in ("sam2", "sam2.1"):
    for size, letter in OFFICIAL_FILES.items():
      official = yaml.safe_load((folder / version / f"{version}_hiera_{letter}.yaml").read_text())
      model, ours = official["model"], PRESETS[f"{version}_hiera_{size}"]
      trunk = dict(model["image_encoder"]["trunk"])
      assert trunk.pop("_target_").endswith("hieradet.Hiera")
      assert ours.trunk_heads == trunk.pop("num_heads")
      # What base+ leaves out is the default of the official class, and of ours.
      for name, value in trunk.items():
        value = tuple(value) if isinstance(value, list) else value
        assert getattr(ours, name) == value, (version, size, name)
      attention = model["memory_attention"]
      assert ours.image_size == model["image_size"]
      assert ours.d_model == model["image_encoder"]["neck"]["d_model"]
      assert ours.mem_dim == model["memory_encoder"]["out_dim"]
      assert ours.fuser_layers == model["memory_encoder"]["fuser"]["num_layers"]
      assert ours.memory_layers == attention["num_layers"]
      assert ours.memory_ffn == attention["layer"]["dim_feedforward"]
      assert ours.num_maskmem == model["num_maskmem"]
      assert ours.absent_embedding == model.get("no_obj_embed_spatial", False)
      assert ours.pointer_positions == model.get("proj_tpos_enc_in_obj_ptrs", False)


def test_defaults_of_the_official_trunk_are_ours():
  import inspect

  from sam2.modeling.backbones.hieradet import Hiera

  official = inspect.signature(Hiera).parameters
  for name in ("stages", "window_spec", "global_att_blocks", "window_pos_embed_bkg_spatial_size"):
    assert getattr(PRESETS["sam2.1_hiera_base_plus"], name) == official[name].default


def test_adapters_are_under_one_percent_of_base_plus():
  shapes = shapes_of(PRESETS["sam2.1_hiera_base_plus"])
  adapters, total = count(shapes, "/adapter/"), count(shapes)
  print(f"adapters: {adapters} of {total} parameters, {adapters / (total - adapters):.2%} of SAM 2")
  # 80.85 M are published, and they count the random Fourier matrix.
  assert round((total - adapters) / 1e6, 2) == 80.85
  assert 0.003 < adapters / (total - adapters) < 0.01


def test_adapters_stand_where_the_paper_puts_them():
  places = {path.split("/adapter/")[0] for path in shapes_of(dataclasses.replace(
    TINY, adapters=AdapterConfig())) if "/adapter/" in path}
  assert places == {
    *(f"image_encoder/trunk/blocks_{i}" for i in range(sum(TINY.stages))),
    *(f"image_encoder/neck/convs_{i}" for i in range(4)),
    *(f"memory_attention/layers_{i}" for i in range(TINY.memory_layers)),
    *(f"sam_mask_decoder/transformer/layers_{i}" for i in range(TINY.decoder_depth)),
  }


def test_no_adapter_is_made_where_they_are_switched_off():
  assert not count(shapes_of(TINY), "adapter")


def test_buffers_are_among_the_parameters():
  assert set(BUFFERS) <= shapes_of(TINY).keys()


@pytest.fixture(scope="module")
def models():
  model = torch_sam2.official(TINY)
  return model, torch_sam2.params_of(model, TINY)


def images(n=2, side=TINY.image_size):
  return np.random.default_rng(7).standard_normal((n, side, side, 3)).astype(np.float32)


def whole(config):
  """Image to mask through every part, the memory of a slice being that of its own first mask."""
  return jax.jit(lambda params, x: SAM2(config).apply({"params": params}, x))


def test_image_features_are_the_official_ones(models):
  model, params = models
  x = images()
  ours = jax.jit(
    lambda params: SAM2(TINY).apply({"params": params}, x, method="encode_image")
  )(params)
  with torch.no_grad():
    theirs = model.forward_image(nchw(x))["backbone_fpn"]
  for name, a, b in zip(("s0", "s1", "embedding"), (*ours.high_res, ours.embedding), theirs,
                        strict=True):
    error = relative_error(a, b.permute(0, 2, 3, 1))
    assert error < 2e-5, f"{name}: {error:.2g}"


@pytest.mark.slow
def test_fresh_adapters_leave_sam2_unchanged_bit_for_bit(models):
  """With converted weights, the adapted network at step 0 is SAM 2."""
  _, params = models
  adapted = dataclasses.replace(TINY, adapters=AdapterConfig())
  merged = with_adapters(params, adapted, jax.random.key(0))
  assert any("adapter" in path for path in flatten_dict(merged))
  for a, b in zip(whole(adapted)(merged, images()), whole(TINY)(params, images()), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_every_adapter_takes_part(models, quickly):
  """Gradients reach the last layer of each; the others follow once that is not zero."""
  _, params = models
  config = dataclasses.replace(TINY, adapters=AdapterConfig())
  fresh = flatten_dict(init_params(config, jax.random.key(0)))
  merged = unflatten_dict({**fresh, **flatten_dict(params)})
  loss = lambda p: (SAM2(config).apply({"params": p}, images(1)).masks ** 2).mean()  # noqa: E731
  gradient = flatten_dict(jax.jit(jax.grad(loss))(merged), sep="/")
  silent = {path for path, g in gradient.items() if "/adapter/up/kernel" in path and not g.any()}
  # The coarsest level serves only the top-down path, the finer ones the decoder: all are used.
  assert not silent


def test_images_of_another_size_are_refused(models):
  _, params = models
  with pytest.raises(ValueError, match="128, 128, 3"):
    SAM2(TINY).apply({"params": params}, images(1, 64), method="encode_image")


@pytest.mark.slow
def test_nano_takes_about_a_gigaflop_forward_and_backward():
  """Of one slice and one structure: features, memory, conditioning on it, decoding."""
  config = PRESETS["nano"]
  params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
  side, grid = config.image_size, config.grid
  logits = jnp.zeros((1, 4 * grid, 4 * grid))

  def loss(params):
    apply = functools.partial(SAM2(config).apply, {"params": params})
    features = apply(jnp.zeros((1, side, side, 3)), method="encode_image")
    present = jnp.ones((1, 1), bool)
    maps = apply(features.embedding, logits, present[0], method="remember")
    slots = MemorySlots(
      maps[:, None], jnp.zeros((1, 1), jnp.int32), present,
      jnp.zeros((1, 0, config.d_model)), jnp.zeros((1, 0)), jnp.zeros((1, 0), bool),
    )
    assert maps.shape == (1, grid, grid, config.mem_dim)
    prompts = box_prompts(jnp.zeros((1, 4)), mask=logits)
    conditioned = apply(features.embedding, slots, method="condition")
    return (apply(conditioned, features.high_res, prompts, method="decode").masks ** 2).mean()

  cost = jax.jit(jax.grad(loss)).lower(params).cost_analysis()
  print(f"nano: {cost['flops'] / 1e9:.2f} GFLOP forward and backward, "
        f"{count(flatten_dict(params, sep='/')) / 1e6:.2f} M parameters")
  assert cost["flops"] < 1.2e9


def test_initialisation_depends_on_the_key_alone():
  config = dataclasses.replace(TINY, adapters=AdapterConfig())
  a, b, c = (flatten_dict(init_params(config, jax.random.key(seed))) for seed in (0, 0, 1))
  for path in a:
    np.testing.assert_array_equal(a[path], b[path])
    assert a[path].dtype == np.float32
  assert any((a[path] != c[path]).any() for path in a)


@pytest.mark.slow
def test_initialisation_has_the_distributions_of_the_modules(quickly):
  """numpy's draws against Linen's own, tensor by tensor."""
  config = dataclasses.replace(TINY, adapters=AdapterConfig())
  ours = flatten_dict(init_params(config, jax.random.key(0)))
  theirs = flatten_dict(
    jax.jit(lambda key: initialisation._linen_params(config, key))(jax.random.key(0)))
  assert ours.keys() == theirs.keys()
  for path, x in theirs.items():
    y = np.asarray(ours[path])
    assert y.shape == x.shape
    spread = float(x.std())
    if np.ptp(x) == 0:
      np.testing.assert_array_equal(y, x, err_msg=str(path))
    else:
      bound = spread * (0.05 + 5 / np.sqrt(x.size))
      assert abs(y.std() - spread) < bound, path
      assert abs(y.mean() - x.mean()) < bound, path


def test_box_prompts_end_with_the_token_that_is_not_a_point():
  prompts = box_prompts(jnp.ones((2, 4)), jnp.array([True, False]))
  # -2 is no token at all.
  assert [[x for x in row if x != -2] for row in prompts.labels.tolist()] == [[2, 3, -1], [-1, -1]]
  np.testing.assert_array_equal(prompts.points[:, 2:], 0)
