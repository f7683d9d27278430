"""Adapters: the identity when fresh, trainable from there, and where the paper puts them."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from rfmedsam2_jax.config import Config, DataConfig, config_yaml
from rfmedsam2_jax.nn import PRESETS, MemorySlots, apply, init_params, row_bands
from rfmedsam2_jax.nn.adapters import AdapterConfig, CNNAdapter, DWConvAdapter
from rfmedsam2_jax.nn.fpn import FpnNeck, ImageEncoder
from rfmedsam2_jax.nn.hiera import Hiera
from rfmedsam2_jax.weights.checkpoint import config_json, with_adapters

TINY = dict(embed_dim=16, num_heads=1, stages=(1, 1, 2, 1), global_att_blocks=(3,),
            window_pos_embed_bkg_spatial_size=(7, 7))

SMALL = dataclasses.replace(PRESETS["nano"], image_size=64)


def encoder(adapters):
  return ImageEncoder(Hiera(**TINY, adapters=adapters), FpnNeck(24, adapters=adapters))


@pytest.fixture(scope="module")
def images():
  return jax.random.normal(jax.random.key(0), (1, 64, 64, 3))


@pytest.fixture(scope="module")
def adapted(images):
  """Weights drawn by numpy (compiling the initialisers takes longer); adapters end in zeros."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(encoder(AdapterConfig()).init, jax.random.key(1), images)["params"]

  def draw(path, leaf):
    fresh = "adapter" in path and "up" in path
    scale = 0.0 if fresh else 0.6 / np.prod(leaf.shape[:-1]) ** 0.5
    return jnp.asarray(rng.standard_normal(leaf.shape) * scale, jnp.float32)

  flat = traverse_util.flatten_dict(shapes)
  return traverse_util.unflatten_dict({path: draw(path, leaf) for path, leaf in flat.items()})


def split(params):
  """Parameters of the network and of the adapters, by path."""
  flat = traverse_util.flatten_dict(params, sep="/")
  own = {path: leaf for path, leaf in flat.items() if "adapter" not in path}
  return own, {path: leaf for path, leaf in flat.items() if path not in own}


@pytest.mark.parametrize("piece", [row_bands.BAND, 8 * 16 * 48])  # whole, and bands of windows
def test_fresh_adapters_leave_the_encoder_unchanged_bit_for_bit(
  adapted, images, piece, monkeypatch
):
  monkeypatch.setattr(row_bands, "BAND", piece)
  own, _ = split(adapted)
  plain = {"params": traverse_util.unflatten_dict(own, sep="/")}
  expected = jax.jit(encoder(AdapterConfig(dwconv=False, cnn=False)).apply)(plain, images)
  outputs = jax.jit(encoder(AdapterConfig()).apply)({"params": adapted}, images)
  for out, reference in zip(outputs, expected, strict=True):
    np.testing.assert_array_equal(out, reference)


def test_adapters_stand_in_every_block_and_after_every_convolution_of_the_neck(adapted):
  places = {path.split("/adapter/")[0] for path in split(adapted)[1]}
  blocks = {f"trunk/blocks_{i}" for i in range(sum(TINY["stages"]))}
  laterals = {f"neck/convs_{i}" for i in range(4)}
  assert places == blocks | laterals


@pytest.mark.parametrize("config, place", [(AdapterConfig(cnn=False), "trunk"),
                                           (AdapterConfig(dwconv=False), "neck")])
def test_each_kind_of_adapter_can_be_switched_off(config, place, images):
  params = jax.eval_shape(encoder(config).init, jax.random.key(1), images)["params"]
  assert {path.split("/")[0] for path in split(params)[1]} == {place}


@pytest.mark.parametrize("adapter", [DWConvAdapter(4), CNNAdapter(4)])
def test_fresh_adapter_is_the_identity(adapter):
  x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
  np.testing.assert_array_equal(adapter.apply(adapter.init(jax.random.key(1), x), x), x)


@pytest.mark.parametrize("adapter", [DWConvAdapter(4), CNNAdapter(4)])
def test_training_moves_every_parameter_of_an_adapter(adapter):
  """The zero layer stops the others' gradients for the first step only."""
  x, target = jax.random.normal(jax.random.key(0), (2, 1, 4, 4, 8))
  start = params = adapter.init(jax.random.key(1), x)

  @jax.jit
  def step(params):
    loss = lambda p: ((adapter.apply(p, x) - target) ** 2).mean()  # noqa: E731
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

  for _ in range(3):
    params = step(params)
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), start, params)
  assert all(jax.tree.leaves(moved))
  assert bool(jnp.any(adapter.apply(params, x) != x))


def test_adapter_sees_its_neighbours_and_no_further():
  """3x3 depth-wise: a pixel's change reaches the pixels around it."""
  x = jnp.zeros((1, 7, 7, 8))
  adapter = DWConvAdapter(4)
  # Not zero, and not the same in every channel, which the norm would take away.
  params = jax.tree.map(lambda p: p + 0.1 * jnp.arange(p.size).reshape(p.shape) % 0.7,
                        adapter.init(jax.random.key(1), x))
  change = adapter.apply(params, x.at[0, 3, 3, :4].set(1.0)) - adapter.apply(params, x)
  reached = np.argwhere(np.abs(np.asarray(change[0])).max(axis=-1) > 1e-6)
  assert reached.min() == 2 and reached.max() == 4


class LowRank(nn.Module):
  """Somebody's own adapter: low rank, with a gate that starts at zero."""

  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="down")(x)
    y = nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="back")(y)
    return x + self.param("gate", nn.initializers.zeros, (x.shape[-1],)) * y


class LowRankAdapters(AdapterConfig):
  after_attention = LowRank


@pytest.mark.slow
def test_an_adapter_of_ones_own_stands_in_the_places_of_ours_starts_as_itself_and_is_trained():
  plain = dataclasses.replace(SMALL, adapters=AdapterConfig(dwconv=False, cnn=False))
  own = dataclasses.replace(SMALL, adapters=LowRankAdapters(cnn=False, width=2))
  ours = dataclasses.replace(SMALL, adapters=AdapterConfig(cnn=False, width=2))
  key = jax.random.key(0)
  base = init_params(plain, key)
  params = with_adapters(base, own, key)
  adapters = split(params)[1]
  assert {p.rsplit("/adapter/")[0] for p in adapters} == {
    p.rsplit("/adapter/")[0] for p in split(jax.eval_shape(
      lambda k: init_params(ours, k), key))[1]}
  # Its own initialisers, not rules by name: `gate` is zero, `back` is not.
  assert {p.rsplit("/", 2)[1 if p.endswith("kernel") else 2] for p in adapters} == {
    "down", "back", "gate"}
  assert all(bool(jnp.any(x)) != p.endswith("gate") for p, x in adapters.items())

  # One layer of memory attention stands for the rest: it compiles fast.
  slots = MemorySlots(
    jax.random.normal(jax.random.key(2), (1, 2, 4, 4, SMALL.mem_dim)), jnp.zeros((1, 2), int),
    jnp.ones((1, 2), bool), jnp.zeros((1, 0, SMALL.d_model)), jnp.zeros((1, 0)),
    jnp.zeros((1, 0), bool))
  embedding = jax.random.normal(jax.random.key(1), (1, 4, 4, SMALL.d_model))

  @jax.jit
  def both(base, params):
    run = lambda config, p: apply(config, p, embedding, slots, method="condition")  # noqa: E731
    return run(plain, base), jax.value_and_grad(
      lambda p: ((y := run(own, p)).std(), y), has_aux=True)(params)

  expected, ((_, found), gradient) = both(base, params)
  np.testing.assert_array_equal(found, expected)
  assert jnp.any(gradient["memory_attention"]["layers_0"]["adapter"]["gate"])


def test_no_file_pretends_to_describe_an_adapter_of_ones_own():
  own = dataclasses.replace(SMALL, adapters=LowRankAdapters())
  with pytest.raises(ValueError, match="LowRankAdapters"):
    config_json(own)
  with pytest.raises(ValueError, match="LowRankAdapters"):
    config_yaml(dataclasses.replace(Config(data=DataConfig(dataset="d")), sam2=own))
