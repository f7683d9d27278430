"""Fresh parameters, drawn by numpy from the distributions of Linen's `init`, which draws each
tensor in its own piece of compiled code: half a minute on a CPU for the 500 of `nano`, and longer
for a U-Net.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rfmedsam2_jax.nn.layers import AnyArray, Array, Params
from rfmedsam2_jax.nn.sam2 import SAM2, SAM2Config
from rfmedsam2_jax.nn.unet import UNet

# The deviation of a unit normal cut at +-2, by which the draws are widened again as in JAX.
_CUT = 0.87962566103423978


def param_shapes(config: SAM2Config) -> Params:
  """The tree of SAM 2's parameters as jax.ShapeDtypeStruct; made once per network and process."""
  free = dataclasses.replace(config, dtype="float32", remat="none")
  return jax.tree.map(lambda x: x, _shapes(free))  # dicts of the caller's own


@functools.cache
def _shapes(config: SAM2Config) -> Params:
  return jax.eval_shape(functools.partial(_linen_params, config), jax.random.key(0))


def _linen_params(config: SAM2Config, key: Array) -> Params:
  images = jnp.zeros((1, config.image_size, config.image_size, 3))
  return SAM2(config).init(key, images)["params"]


def init_params(config: SAM2Config, key: Array) -> Params:
  """Fresh parameters, a nested dict of float32 arrays; the same for the same key.

  So they are within `jax.jit`, too, whose program asks the host for them.
  """
  params = _drawn(param_shapes(config), _draw, key)
  if not config.adapters.own:
    return params
  # Only the modules know how theirs start. The compiler drops all draws that nobody asks for.
  own = jax.jit(lambda key: {
    path: x for path, x in flatten_dict(_linen_params(config, key)).items() if "adapter" in path
  })(key)
  return unflatten_dict(flatten_dict(params) | own)


def init_generator(unet: UNet, channels: int, key: Array) -> Params:
  """As `init_params`, of the generator of a run, for images of so many channels."""
  # Fully convolutional: the smallest patch will do.
  image = jax.ShapeDtypeStruct((1, *unet.config.divisor, channels), jnp.float32)
  shapes = jax.eval_shape(functools.partial(unet.init, deep_supervision=True), key, image)
  return _drawn(shapes["params"], _draw_unet, key)


def _drawn(
  shapes: Params, draw: Callable[[np.random.Generator, list[str], tuple[int, ...]], np.ndarray],
  key: Array,
) -> Params:
  """A tree of these shapes, each tensor from `draw`; under `jax.jit` by a call to the host."""
  data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key

  def draw_all(data: AnyArray) -> Params:
    rng = np.random.default_rng(np.asarray(data))
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: draw(rng, [k.key for k in path], leaf.shape), shapes)

  return (jax.pure_callback(draw_all, shapes, data, vmap_method="sequential")
          if isinstance(data, jax.core.Tracer) else jax.tree.map(jnp.asarray, draw_all(data)))


def _draw_unet(rng: np.random.Generator, path: list[str], shape: tuple[int, ...]) -> np.ndarray:
  """One tensor of a U-Net, float32, by its name; the rules are those of nn.unet."""
  leaf, parent = path[-1], path[-2]
  if leaf == "bias" or (leaf == "scale" and "conv2" in path):  # the end of a residual block
    return np.zeros(shape, np.float32)
  if leaf == "scale":
    return np.ones(shape, np.float32)
  # A transposed convolution is [Cin, sd, sh, sw, Cout]; every other kernel has its inputs in front.
  transposed = parent.startswith("transpconvs")
  fan_in = shape[0] if transposed else np.prod(shape[:-1])
  if parent.startswith("seg_layers"):
    return _truncated(rng, shape, 1 / _CUT / np.sqrt(fan_in))
  return np.float32(np.sqrt(2 / fan_in)) * rng.standard_normal(shape, np.float32)


def _draw(rng: np.random.Generator, path: list[str], shape: tuple[int, ...]) -> np.ndarray:
  """One tensor, float32, by its name; the rules are those of the modules' initializers."""
  *scopes, leaf = path
  parent = scopes[-1] if scopes else ""
  constant = {"bias": 0, "scale": 1, "gamma": 1e-6}.get(leaf)
  if leaf == "kernel" and parent == "up" and "adapter" in scopes:
    constant = 0
  if constant is not None:
    return np.full(shape, constant, np.float32)
  if leaf == "kernel":
    # A transposed 2x2 convolution is [Cin, 2, 2, Cout]; every other kernel has its inputs in front.
    fan_in = shape[0] if parent.startswith("output_upscaling") else np.prod(shape[:-1])
    return _truncated(rng, shape, 1 / _CUT / np.sqrt(fan_in))
  if parent in ("sam_prompt_encoder", "pe_layer", "sam_mask_decoder"):
    return rng.standard_normal(shape, np.float32)
  if leaf.startswith("pos_embed"):
    return np.float32(0.02) * rng.standard_normal(shape, np.float32)
  return _truncated(rng, shape, 0.02)


def _truncated(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
  """A normal cut at two deviations, times `scale`."""
  x = rng.standard_normal(shape, np.float32)
  while (outside := np.abs(x) > 2).any():
    x[outside] = rng.standard_normal(outside.sum(), np.float32)
  return x * np.float32(scale)
