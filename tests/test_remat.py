"""Rematerialisation: less memory in the backward pass, and nothing else that could be seen."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sam2 import SMALL, drawn

from rfmedsam2_jax.nn import SAM2, AdapterConfig, MemorySlots, UNet, UNetConfig, box_prompts
from rfmedsam2_jax.nn.initialisation import init_params
from rfmedsam2_jax.nn.remat import compiler_options
from rfmedsam2_jax.weights.checkpoint import config_json, first_difference

SAM = dataclasses.replace(SMALL, memory_layers=2, decoder_depth=1, adapters=AdapterConfig())


def random(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def sam2(remat):
  return SAM2(dataclasses.replace(SAM, remat=remat))


def unet(remat, blocks=None):
  strides, kernels = ((1, 1, 1), (2, 2, 2)), ((3, 3, 3), (3, 3, 3))
  return UNet(UNetConfig((6, 12), strides, kernels, 3, remat=remat, blocks=blocks), 3)


def of_images(remat):
  """The image encoder: (function of parameters, parameters)."""
  run = lambda params: sam2(remat).apply(  # noqa: E731
    {"params": params}, random(0, 2, 64, 64, 3), method="encode_image"
  )
  return run, drawn(SAM)


def of_cells(remat):
  """Memory encoder, memory attention and mask decoder of four cells."""
  n, grid, width = 4, SAM.grid, SAM.d_model
  side4, side8 = 4 * grid, 2 * grid
  high_res = random(3, n, side4, side4, width // 8), random(4, n, side8, side8, width // 4)
  embedding, logits = random(0, n, grid, grid, width), 9 * random(1, n, side4, side4)
  present = np.ones((n, 1), bool)

  def run(params):
    apply = lambda *x, method: sam2(remat).apply({"params": params}, *x, method=method)  # noqa: E731
    maps = apply(embedding, logits, present[:, 0], method="remember")
    rows, no_pointers = np.zeros((n, 1), np.int32), np.zeros((n, 0))
    slots = MemorySlots(
      maps[:, None], rows, present, np.zeros((n, 0, width)), no_pointers, no_pointers > 0
    )
    conditioned = apply(embedding, slots, method="condition")
    prompts = box_prompts(10 * jnp.ones((n, 4)), mask=logits)
    return apply(conditioned, high_res, prompts, method="decode")

  return run, drawn(SAM)


def of_patches(remat, blocks=None):
  """The U-Net."""
  x = random(0, 1, 16, 32, 32, 1)
  model = unet(remat, blocks)
  params = jax.jit(lambda key: model.init(key, x, True)["params"])(jax.random.key(0))
  return lambda params: model.apply({"params": params}, x, True), params


def of_residual_patches(remat):
  """The U-Net with a residual encoder."""
  return of_patches(remat, (2, 2))


NETWORKS = [of_images, of_cells, of_patches, of_residual_patches]


def gradient(network, remat):
  """Outputs, gradients, and the bytes that these need besides arguments and results."""
  run, params = network(remat)

  def loss(params):
    outputs = run(params)
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(outputs)), outputs

  of_loss = jax.jit(jax.grad(loss, has_aux=True), compiler_options=compiler_options())
  compiled = of_loss.lower(params).compile()
  gradients, outputs = compiled(params)
  return outputs, gradients, compiled.memory_analysis().temp_size_in_bytes


def assert_same(found, expected):
  """Within rounding of the largest value anywhere."""
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), found, expected)


# Of cells: the same kind of blocks once more; what they keep is counted for all networks below.
@pytest.mark.slow
@pytest.mark.parametrize(
  "network", [of_images, pytest.param(of_cells, marks=pytest.mark.full), of_patches,
              of_residual_patches]
)
def test_blocks_that_are_computed_again_need_less_memory_and_give_the_same_gradients(network):
  (outputs, gradients, most), (*found, least) = (gradient(network, r) for r in ("none", "block"))
  print(f"{network.__name__}: {most / 2**20:.2f} MiB, {least / 2**20:.2f} by block")
  assert least < 0.8 * most
  assert_same(found[0], outputs)
  assert_same(found[1], gradients)


def operations(network, remat):
  """How often the program that runs a network forwards has each line, names of values apart."""
  run, params = network(remat)
  text = jax.jit(run).lower(params).as_text()
  return collections.Counter(re.sub(r"[%@]\w+(:\w+)?(#\d+)?", "", text).split("\n"))


@pytest.mark.parametrize("network", NETWORKS)
def test_running_forwards_is_the_same_program(network):
  plain = operations(network, "none")
  for remat in ("block", "dots"):
    assert operations(network, remat) == plain


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_the_parameters_are_the_same(remat):
  def shapes(remat):
    return jax.eval_shape(lambda key: init_params(sam2(remat).config, key), jax.random.key(0))

  assert shapes(remat) == shapes("none")
  # The U-Net is initialised by Linen itself: the same values too.
  jax.tree.map(np.testing.assert_array_equal, of_patches(remat)[1], of_patches("none")[1])


def kept(network, remat):
  """Bytes of what the forward pass hands to the backward pass, the parameters among it."""
  run, params = network(remat)
  backward = jax.eval_shape(lambda params: jax.vjp(run, params)[1], params)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))


@pytest.mark.parametrize("network", NETWORKS)
def test_keeping_products_too_lies_between_the_two(network):
  none, dots, block = (kept(network, remat) for remat in ("none", "dots", "block"))
  print(f"{network.__name__}: {none / 2**20:.2f}, {dots / 2**20:.2f}, {block / 2**20:.2f} MiB kept")
  assert block < 0.9 * dots and dots < 0.9 * none


def test_a_checkpoint_does_not_know_how_its_gradients_were_computed():
  block = dataclasses.replace(SAM, remat="block")
  assert config_json(block) == config_json(SAM)
  assert first_difference(block, SAM) is None
