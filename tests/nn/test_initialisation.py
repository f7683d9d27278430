"""Fresh parameters are the same with and without jit, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sam2 import SMALL

from rfmedsam2_jax.nn import AdapterConfig, hiera, init_params
from rfmedsam2_jax.nn.convolutions import Conv3D
from rfmedsam2_jax.nn.platform import Platform
from rfmedsam2_jax.nn.unet import TransposedConv3D

KEY = jax.random.key(3)
VOLUME = jnp.zeros((1, 2, 2, 2, 8))


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("init", [
  lambda key: Conv3D(16, (3, 3, 3), (1, 1, 1), jnp.float32, Platform("cpu")).init(key, VOLUME),
  lambda key: TransposedConv3D(16, (2, 2, 2), jnp.float32).init(key, VOLUME),
  lambda key: hiera._POSITIONS(key, (1, 7, 7, 32)),
], ids=["conv", "transposed conv", "positions"])
def test_layers_start_alike_with_and_without_jit(init):
  assert_same(jax.jit(init)(KEY), init(KEY))


def test_sam2_starts_alike_with_and_without_jit_and_in_vmap():
  config = dataclasses.replace(SMALL, adapters=AdapterConfig(mask=True))
  keys = jax.random.split(KEY, 2)

  def init(key):
    return init_params(config, key)

  plain = [init(key) for key in keys]
  assert not np.array_equal(*(x["maskmem_tpos_enc"] for x in plain))
  assert_same(jax.jit(init)(keys[0]), plain[0])
  assert_same(jax.vmap(init)(keys), jax.tree.map(lambda *x: np.stack(x), *plain))
  assert jax.eval_shape(init, KEY)["no_obj_ptr"].shape == plain[0]["no_obj_ptr"].shape
