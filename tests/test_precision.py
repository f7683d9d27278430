"""bfloat16 computes and float32 remembers: what a training step does in half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_config import TINY

from rfmedsam2_jax.cli import main
from rfmedsam2_jax.config import parse_config
from rfmedsam2_jax.model import load
from rfmedsam2_jax.nn import BUFFERS, SAM2, UNet, UNetConfig, init_params
from rfmedsam2_jax.nn.layers import layer_norm
from rfmedsam2_jax.nn.unet import InstanceNorm
from rfmedsam2_jax.training.state import init_state, make_optimizer, partition, with_frozen_as
from rfmedsam2_jax.training.step import generator_loss_fn, make_step, refiner_loss_fn
from rfmedsam2_jax.weights.checkpoint import load_checkpoint, save_checkpoint
from rfmedsam2_jax.weights.orbax import load_params, save_params

HALF = {"dtype": "bfloat16"}
CONFIG = parse_config(TINY | {
  "sam2": TINY["sam2"] | HALF,
  "generator": TINY["generator"] | HALF,
  "refiner": TINY["refiner"] | {"trainable": ["*adapter*"]},
})
ADAPTERS = CONFIG.refiner.trainable


def shaped(shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def generator():
  """Loss, parameters, a batch and settings; arrays are shapes only."""
  sizes = ((8, 16), ((1, 1, 1), (2, 2, 2)), ((3, 3, 3), (3, 3, 3)))
  model = UNet(UNetConfig(*sizes, dtype="bfloat16"), 3)
  loss = generator_loss_fn(model, CONFIG.generator, np.eye(3, 2, -1, dtype=bool), False)
  x = shaped((2, 16, 32, 32, 1))
  params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, True)["params"], x)
  return loss, params, {"image": x, "target": shaped(x.shape[:-1], jnp.uint8)}, CONFIG.generator


def refiner():
  sam2 = CONFIG.sam2
  loss = refiner_loss_fn(SAM2(sam2), CONFIG.refiner, CONFIG.refinement)
  params = jax.eval_shape(lambda key: init_params(sam2, key), jax.random.key(0))
  masks = shaped((1, 2, 4, 4 * sam2.grid, 4 * sam2.grid))
  batch = {
    "images": shaped((1, 4, sam2.image_size, sam2.image_size, 3)),
    "logits": masks, "masks": masks, "known": masks,
    "present": shaped((1, 2, 4), bool), "absent": shaped((1, 2, 4), bool),
    "inside": shaped((1, 4), bool), "depth": shaped((1,), jnp.int32),
  }
  return loss, params, batch, CONFIG.refiner


@pytest.mark.parametrize(
  "network, trained", [(generator, "*"), (refiner, "*"), (refiner, ADAPTERS)]
)
def test_all_that_a_step_hands_on_is_float32(network, trained):
  """Parameters, their average, the optimizer's moments, gradients, losses."""
  loss, params, batch, settings = network()
  optimizer = make_optimizer(settings.optimizer, 10)

  def step(params, batch):
    state = init_state(params, trained, optimizer, jax.random.key(0))
    gradients = jax.grad(lambda p: loss(p, batch, state.key)[0])(state.params)
    return gradients, make_step(loss, optimizer, settings.optimizer)(state, batch)

  found = jax.tree.leaves(jax.eval_shape(step, params, batch))
  floats = {x.dtype for x in found if jnp.issubdtype(x.dtype, jnp.inexact)}
  assert floats == {jnp.dtype("float32")}


# A sum over many, or what blows an error up. Products accumulate in float32 by themselves.
DELICATE = {
  "exp", "exp2", "log", "log1p", "logistic", "tanh", "sqrt", "rsqrt", "integer_pow", "div", "sin",
  "cos", "reduce_sum", "reduce_prod", "cumsum", "cumlogsumexp",
}


def operations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation.primitive.name, [x.aval.dtype for x in equation.invars]
    for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(parameter, "jaxpr", parameter)
      if hasattr(inner, "eqns"):
        yield from operations(inner)


@pytest.mark.parametrize("network", [generator, refiner])
def test_softmax_statistics_of_norms_and_losses_are_float32(network):
  loss, params, batch, _ = network()
  jaxpr = jax.make_jaxpr(lambda p, b: loss(p, b, jax.random.key(0)))(params, batch)
  found = list(operations(jaxpr.jaxpr))
  half = {name for name, dtypes in found if jnp.dtype("bfloat16") in dtypes}
  assert {"dot_general", "conv_general_dilated"} & half, "nothing is computed in bfloat16"
  assert DELICATE & {name for name, _ in found} >= {"exp", "rsqrt", "reduce_sum"}
  assert not DELICATE & half


@pytest.mark.parametrize(
  "norm, axes", [(layer_norm(dtype=jnp.bfloat16), -1), (InstanceNorm(), (1, 2, 3))]
)
def test_norms_see_a_small_deviation_beside_a_large_mean(norm, axes):
  """In bfloat16 the mean alone would be wrong by more than the deviation."""
  x = np.random.default_rng(0).normal(100, 1, (1, 1, 4, 64, 64)).astype(jnp.bfloat16)
  exact = x.astype(np.float64)
  exact = exact - exact.mean(axes, keepdims=True)
  exact /= exact.std(axes, keepdims=True)
  found = norm.apply(norm.init(jax.random.key(0), x), x)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(found), exact, rtol=2**-7, atol=1e-3)


@pytest.fixture(scope="module")
def params():
  return init_params(CONFIG.sam2, jax.random.key(0))


def test_frozen_kernels_are_held_in_bfloat16_and_nothing_else(params):
  held = flatten_dict(with_frozen_as("bfloat16", params, ADAPTERS), sep="/")
  trained, _ = (flatten_dict(tree, sep="/") for tree in partition(params, ADAPTERS))
  before = flatten_dict(params, sep="/")
  assert held.keys() == before.keys()
  for path, x in held.items():
    half = path not in trained and path.endswith("kernel")
    assert x.dtype == (jnp.bfloat16 if half else jnp.float32), path
    np.testing.assert_array_equal(x, before[path].astype(x.dtype))
  assert held[BUFFERS[0]].dtype == jnp.float32
  small = sum(x.size for x in held.values() if x.dtype != jnp.bfloat16) / sum(
    x.size for x in before.values()
  )
  print(f"{small:.1%} of the parameters are not held in bfloat16")


def test_a_step_leaves_frozen_weights_as_they_are_held():
  loss, params, batch, settings = refiner()
  optimizer = make_optimizer(settings.optimizer, 10)

  def step(params, batch):
    params = with_frozen_as("bfloat16", params, ADAPTERS)
    state = init_state(params, ADAPTERS, optimizer, jax.random.key(0))
    return state, make_step(loss, optimizer, settings.optimizer)(state, batch)[0]

  before, after = jax.eval_shape(step, params, batch)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
    lambda x: (x.shape, x.dtype), after
  )
  half = jnp.dtype("bfloat16")
  for tree in (after.trained, after.ema, after.optimizer):
    assert half not in {x.dtype for x in jax.tree.leaves(tree)}
  assert half in {x.dtype for x in jax.tree.leaves(after.frozen)}


def test_what_is_saved_is_float32_and_can_be_read_by_all(params, tmp_path):
  held = with_frozen_as("bfloat16", params, ADAPTERS)
  save_params(tmp_path / "params", held, {})
  # Read with the shapes of the network, which are float32.
  jax.tree.map(
    lambda found, x: np.testing.assert_array_equal(found, x.astype(np.float32)),
    load_params(tmp_path / "params", params), held,
  )


@pytest.mark.full
def test_a_run_in_half_precision_computed_again_by_blocks_ends_as_any_other(
  params, tiny_config, tmp_path
):
  save_checkpoint(tmp_path / "start", CONFIG.sam2, params, {})
  loop = "loop={steps: 2, log_every: 1, checkpoint_every: 1}"
  assert main([
    "train", str(tiny_config), "--out", str(tmp_path / "run"), f"generator.{loop}",
    f"refiner.{loop}", "generator.dtype=bfloat16", "sam2.dtype=bfloat16", "generator.remat=block",
    "sam2.remat=dots", "refiner.frozen_dtype=bfloat16", "refiner.trainable=['*adapter*']",
    f"refiner.init_from={tmp_path / 'start'}",
  ]) == 0
  found = load(tmp_path / "run")
  assert found.sam2.config.remat == "dots" and found.unet.config.remat == "block"
  config, saved, about = load_checkpoint(tmp_path / "run" / "refiner" / "params")
  assert "remat" not in about["sam2"] and config.remat == "none"
  saved, start = flatten_dict(saved, sep="/"), flatten_dict(params, sep="/")
  for path, x in saved.items():
    assert x.dtype == np.float32
    if "/adapter/" not in path:
      held = start[path].astype(jnp.bfloat16) if path.endswith("kernel") else start[path]
      np.testing.assert_array_equal(x, held.astype(np.float32), err_msg=path)
