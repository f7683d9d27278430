"""What is traced for GPUs and TPUs, on a machine that needs neither: the forms that are taken."""

import contextlib
import dataclasses
import functools
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from tiny_config import TINY

from rfmedsam2_jax.config.reading import parse_config
from rfmedsam2_jax.nn import (
  PRESETS,
  SAM2,
  AdapterConfig,
  MemorySlots,
  Platform,
  UNet,
  UNetConfig,
  apply,
  attention,
  box_prompts,
  convolutions,
  param_shapes,
)
from rfmedsam2_jax.nn import platform as platforms
from rfmedsam2_jax.nn.attention import dot_product_attention, fits_cudnn
from rfmedsam2_jax.nn.remat import compiler_options
from rfmedsam2_jax.parallel import mesh as meshes
from rfmedsam2_jax.parallel.mesh import AXES, MeshConfig, batch_shapes, make_mesh, mesh_platform
from rfmedsam2_jax.parallel.rules import over_mesh, shardings
from rfmedsam2_jax.programs.lowering import as_if_there, lowered
from rfmedsam2_jax.tracking.image import encode_images
from rfmedsam2_jax.training.phases import PHASES
from rfmedsam2_jax.training.shard import _plan_of_shapes

TPU = Platform("tpu")
AMPERE, ADA, HOPPER, BLACKWELL = (Platform("gpu", x) for x in ((8, 0), (8, 9), (9, 0), (10, 0)))
# A box makes an odd number of tokens (6 + 3), and a pooled window of 6 an odd number of queries.
CONFIG = dataclasses.replace(
  PRESETS["nano"], image_size=64, embed_dim=16, stages=(1, 1, 1, 1), global_att_blocks=(2,),
  decoder_depth=1)
GRID, CELLS = CONFIG.grid, 2


def shaped(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


@contextlib.contextmanager
def traced_for(platform):
  """What JAX asks of a GPU is answered as `platform` would; that the program here asks for the
  default platform is a mistake."""

  def refused(device):
    raise AssertionError("a part of the network does not know its platform")

  with pytest.MonkeyPatch.context() as patch, as_if_there(platform):
    patch.setattr(platforms, "platform_of", refused)
    yield


def program(function, platform, *arguments):
  """StableHLO of a function that is jitted, for a platform."""
  with traced_for(platform):
    return lowered(function, platform, *arguments).mlir_module()


def fused(text):
  """How often cuDNN's attention is called: forward without and with a mask, backward likewise."""
  found = re.findall(r"@__cudnn\$fmha(\w+)\(", text)
  names = "Softmax", "ScaleBiasSoftmax", "SoftmaxBackward", "ScaleBiasSoftmaxBackward"
  assert set(found) <= set(names)
  return tuple(map(found.count, names))


def part(method, config):
  """A loss of one part of SAM 2, for a model, and the shapes of what it takes."""
  channels, dtype = config.d_model, jnp.dtype(config.dtype)
  embedding = shaped(CELLS, GRID, GRID, channels, dtype=dtype)
  logits = shaped(CELLS, 4 * GRID, 4 * GRID)
  if method == "encode_image":
    inputs = [shaped(CELLS, config.image_size, config.image_size, 3)]
  elif method == "remember":
    inputs = [embedding, logits, shaped(CELLS, dtype=bool)]
  elif method == "condition":
    two = CELLS, 2
    inputs = [embedding, MemorySlots(
      shaped(*two, GRID, GRID, config.mem_dim, dtype=dtype), shaped(*two, dtype=jnp.int32),
      shaped(*two, dtype=bool), shaped(*two, channels, dtype=dtype), shaped(*two),
      shaped(*two, dtype=bool))]
  else:
    high_res = [shaped(CELLS, side * GRID, side * GRID, channels * 2 // side // 4, dtype=dtype)
                for side in (4, 2)]
    inputs = [embedding, tuple(high_res), shaped(CELLS, 4)]

  def loss(model, params, *inputs):
    if method == "encode_image":
      out = encode_images(model, params, *inputs)
    elif method == "decode":
      *features, boxes = inputs
      out = apply(model, params, *features, box_prompts(boxes), method=method)
    else:
      out = apply(model, params, *inputs, method=method)
    return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(out))

  return loss, inputs


# Attention without and with a mask of keys. Hiera: one per block. Memory attention: to itself, to
# memories. Decoder: tokens to themselves (masked), to the image, the image to them (masked), tokens
# to the image once more.
ATTENTIONS = {"encode_image": (4, 0), "remember": (0, 0), "condition": (1, 1), "decode": (2, 2)}


# As configs/btcv.yaml is in half precision; plain in full precision.
PRECISIONS: dict[str, dict[str, Any]] = {
  "float32": {"adapters": AdapterConfig(dwconv=False, cnn=False)}, "bfloat16": {"remat": "block"}}
EVERYWHERE = [pytest.param(HOPPER, id="cuda"), pytest.param(TPU, id="tpu")]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("platform", EVERYWHERE)
@pytest.mark.parametrize("method", ATTENTIONS)
def test_every_part_of_sam2_lowers_with_fused_attention_in_half_precision_on_a_gpu(
  method, platform, dtype
):
  config = dataclasses.replace(CONFIG, dtype=dtype, **PRECISIONS[dtype])
  params, (loss, inputs) = param_shapes(CONFIG), part(method, config)
  forward = jax.jit(functools.partial(loss, SAM2(config, platform)))
  gradient = program(jax.jit(jax.value_and_grad(forward)), platform, params, *inputs)
  if (platform, dtype) != (HOPPER, "bfloat16"):
    assert fused(gradient) == (0, 0, 0, 0)
  else:  # what is computed again for the gradient may stand there twice
    assert fused(gradient)[2:] == ATTENTIONS[method]
    assert fused(program(forward, platform, params, *inputs)) == (*ATTENTIONS[method], 0, 0)
  if method == "remember" or config.adapters.dwconv:  # accelerators' own depth-wise convolutions
    assert max(map(int, re.findall(r"feature_group_count = (\d+)", gradient))) >= 16


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("platform", EVERYWHERE)
def test_the_unet_lowers_with_convolutions_in_three_dimensions(platform, dtype):
  sizes = UNetConfig((8, 16), ((1, 1, 1), (2, 2, 2)), ((3, 3, 3),) * 2, 1, dtype)
  unet, x = UNet(sizes, 3, platform), shaped(2, 8, 8, 8, 1)
  params = jax.eval_shape(lambda x: unet.init(jax.random.key(0), x)["params"], x)
  loss = jax.jit(lambda params, x: (unet.apply({"params": params}, x) ** 2).sum())
  gradient = program(jax.jit(jax.value_and_grad(loss)), platform, params, x)
  # As many for every convolution forward as are left for its two gradients; the first has one.
  for text in program(loss, platform, params, x), gradient:
    found = re.findall(r"dim_numbers = \[([^\]]+)\]x", text)
    assert len(found) >= 3 and all("2" in x for x in found)


@pytest.mark.parametrize("name, expected", [
  ("generator", (0, 0)),
  # The trunk's blocks once; memory attention and the decoder in one stage.
  ("refiner", (4 + 1 + 2, 1 + 2)),
])
def test_a_training_step_has_the_form_for_the_devices_of_its_mesh(name, expected, monkeypatch):
  config = parse_config(TINY | {
    "generator": TINY["generator"] | {"dtype": "bfloat16"},
    "refiner": TINY["refiner"] | {"slices": 2, "structures": 1},
    "refinement": {"stages": [{"residual": True}]},
  })
  config = dataclasses.replace(config, sam2=dataclasses.replace(CONFIG, dtype="bfloat16"))
  phase = PHASES[name](config, _plan_of_shapes(config.plan, 1, 1))
  mesh, key = make_mesh(MeshConfig(data=1)), jax.random.key(0)
  shapes = jax.eval_shape(phase.init, key) if name == "generator" else param_shapes(config.sam2)
  state = jax.eval_shape(phase.start, shapes, key)
  monkeypatch.setattr(meshes, "platform_of", lambda device: HOPPER)
  placed = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    state, shardings(state, mesh))
  text = program(phase.step(state, mesh), HOPPER, placed, batch_shapes(phase.batch, mesh))
  assert fused(text) == 2 * expected
  if name == "generator":
    assert re.search(r"dim_numbers = \[b, 0, 1, 2, f\]x", text)


@pytest.mark.parametrize("platform, widest", [
  (AMPERE, 128), (ADA, 128), (HOPPER, 256), (BLACKWELL, 128), (Platform("gpu", (7, 5)), 0),
  (Platform("gpu"), 0), (TPU, 0), (Platform("cpu"), 0),
])
def test_cudnn_is_asked_for_no_more_than_it_takes(platform, widest):
  def fits(width, queries=8, keys=9, dtype=jnp.bfloat16):
    q, k = (shaped(2, n, 1, width, dtype=dtype) for n in (queries, keys))
    if not fits_cudnn(q, k, platform):
      return False
    attend = jax.jit(lambda q, k: dot_product_attention(q, k, k, platform=platform).sum())
    program(jax.jit(jax.grad(attend)), platform, q, k)  # JAX's own checks
    return True

  assert [width for width in (8, 12, 128, 136, 256, 264) if fits(width)] == [
    width for width in (8, 128, 136, 256) if width <= widest]
  assert not fits(64, dtype=jnp.float32)
  # Its backward pass does not take one score.
  assert not fits(64, 1, 1) and fits(64, 1, 2) == (widest > 0)


@pytest.mark.parametrize("platform, expected", [(HOPPER, (1, 1)), (AMPERE, (0, 0))])
def test_memory_attention_as_wide_as_official_is_fused_on_hopper_alone(platform, expected):
  config = dataclasses.replace(CONFIG, dtype="bfloat16", d_model=256, mem_dim=64)
  loss, inputs = part("condition", config)
  model = SAM2(config, platform)
  with traced_for(platform):
    params = jax.eval_shape(
      functools.partial(model.init, method="condition"), jax.random.key(0), *inputs)["params"]
  forward = jax.jit(functools.partial(loss, model))
  assert fused(program(forward, platform, params, *inputs)) == (*expected, 0, 0)


def test_the_mask_is_one_for_all_heads_and_devices_call_cudnn_themselves():
  def attended(q, batch, keys):
    x = batch @ q
    out = dot_product_attention(x, x, x, batch[:, :, 0, 0] > 0, HOPPER)
    return out.astype(jnp.float32).sum()

  spread = over_mesh(attended, AbstractMesh((2, 2, 1), AXES))
  half = functools.partial(shaped, dtype=jnp.bfloat16)
  keys = jax.random.split(jax.random.key(0), 8)
  run = jax.jit(jax.value_and_grad(lambda q, x: spread(q, x, keys)))
  text = program(run, HOPPER, half(16, 16), half(8, 9, 4, 16))
  assert fused(text) == (0, 1, 0, 1)
  # Nine queries and keys are filled up to ten; of four heads there is one mask.
  biases = re.findall(r"tensor<\d+x(\d+)x10x10xbf16>", text)
  assert set(biases) == {"1"}


@pytest.mark.parametrize("queries, keys, masked", [(9, 9, True), (6, 7, False)])
def test_the_way_through_cudnn_gives_what_the_plain_computation_gives(
  queries, keys, masked, monkeypatch
):
  reference = functools.partial(jax.nn.dot_product_attention, implementation="xla")
  monkeypatch.setattr(attention, "fits_cudnn", lambda q, k, platform: platform == HOPPER)
  monkeypatch.setattr(jax.nn, "dot_product_attention",
                      lambda *x, mask, implementation: reference(*x, mask=mask))
  mask = jnp.arange(keys) < jnp.array([[0], [3], [keys]]) if masked else None

  @jax.jit
  def run(q, k, v, weights):
    def with_gradients(platform):
      def loss(*x):
        y = dot_product_attention(*x, mask, platform)
        return (y * weights).sum() + (y**2).sum(), y
      return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    everywhere = None if mask is None else jnp.broadcast_to(
      mask[:, None, None], (3, 1, queries, keys))
    return (with_gradients(Platform("cpu")), with_gradients(HOPPER),
            reference(q, k, v, mask=everywhere))

  shapes = [(3, n, 2, 8) for n in (queries, keys, keys, queries)]
  rng = np.random.default_rng(0)
  plain, through, direct = run(*(rng.standard_normal(shape, np.float32) for shape in shapes))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, through, plain)
  # The first row has no keys, which is nothing here.
  close(plain[0][1][1:], direct[1:])


def test_a_platform_is_that_of_the_devices_which_need_not_be_here():
  def mesh(kind, capability, model=1):
    device = types.SimpleNamespace(platform=kind)
    if capability:
      device.compute_capability = capability
    return types.SimpleNamespace(
      devices=np.array([[[device]]]), shape={"data": 1, "fsdp": 1, "model": model})

  assert mesh_platform(mesh("gpu", "9.0")) == HOPPER
  # The compiler cannot cut cuDNN's attention where it divides widths.
  assert mesh_platform(mesh("gpu", "9.0", model=2)) == Platform("gpu")
  assert mesh_platform(mesh("gpu", "gfx90a")) == Platform("gpu")
  assert mesh_platform(mesh("tpu", None)) == TPU
  assert compiler_options(TPU) == {} != compiler_options(Platform("cpu"))


def test_a_network_without_a_platform_is_traced_for_the_devices_that_jax_uses(monkeypatch):
  def form():
    x, kernel = shaped(1, 4, 4, 4, 1), shaped(3, 3, 3, 1, 1)
    run = jax.jit(lambda x, kernel: convolutions.conv3d(x, kernel))
    return str(run.trace(x, kernel).jaxpr).count("conv_general_dilated")

  assert jax.default_backend() != "cpu" or form() == 3  # one for every tap of the depth
  with jax.default_device("cpu"):
    assert form() == 3
  monkeypatch.setattr(platforms, "platform_of", lambda device: TPU)
  assert form() == 1
