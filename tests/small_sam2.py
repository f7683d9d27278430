"""A very small SAM 2 of ours with weights that show mistakes, and cells to run it on."""

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rfmedsam2_jax.nn import SAM2, AdapterConfig, SAM2Config, param_shapes
from rfmedsam2_jax.refinement.first_prompts import generated

SMALL = SAM2Config(
  image_size=64,
  embed_dim=8,
  stages=(1, 1, 1, 1),
  global_att_blocks=(2,),
  window_spec=(4, 4, 4, 2),
  window_pos_embed_bkg_spatial_size=(4, 4),
  d_model=32,
  mem_dim=8,
  memory_layers=1,
  memory_ffn=48,
  memory_mask_channels=(4, 8, 16, 32),  # with two, the first norm leaves only a sign
  fuser_layers=1,
  decoder_heads=4,
  iou_hidden=32,
  adapters=AdapterConfig(dwconv=False, cnn=False),
)
MODEL = SAM2(SMALL)
SIDE, MASK_SIDE = SMALL.image_size, 4 * SMALL.grid


def drawn(config=SMALL, seed=0, presence_bias=3.0):
  """Parameters drawn so that every part is heard and nothing saturates.

  As initialised, many tensors are zero, which hides mistakes; deviations as in torch_sam2.
  """
  rng = np.random.default_rng(seed)
  shapes = flatten_dict(param_shapes(config))
  params = {}
  for path, x in shapes.items():
    mean, deviation = 0.0, 0.5
    if path[-1] == "kernel":
      transposed = len(x.shape) == 4 and x.shape[1:3] == (2, 2) and "upscaling" in str(path)
      deviation = 0.6 / np.sqrt(x.shape[0] if transposed else np.prod(x.shape[:-1]))
    elif path[-1] == "scale":
      mean, deviation = 1.0, 0.2
    elif path[-1] == "bias":
      deviation = 0.1
    params[path] = np.float32(mean + deviation * rng.standard_normal(x.shape))
  params = unflatten_dict(params)
  with_presence(params, presence_bias)
  return params


def with_presence(params, bias):
  """Sets the bias of the presence logit; some cells are gated when it is near zero."""
  params["sam_mask_decoder"]["pred_obj_score_head"]["layers_2"]["bias"][:] = bias
  return params


def images(count, seed=0):
  """Slices [count, S, S, 3] in [0, 1], smooth and unlike each other."""
  rng = np.random.default_rng(seed)
  coarse = rng.random((count, 8, 8, 3), np.float32)
  return coarse.repeat(SIDE // 8, 1).repeat(SIDE // 8, 2)


def volume_prompts(present, seed=0):
  """Stage-0 prompts of [K, D] cells: blobs, one per present cell, on a negative background."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:MASK_SIDE, :MASK_SIDE]
  centre = rng.uniform(0.3, 0.7, (2, *present.shape, 1, 1)) * MASK_SIDE
  radius = rng.uniform(0.15, 0.3, (*present.shape, 1, 1)) * MASK_SIDE
  distance = np.hypot(y - centre[0], x - centre[1])
  logits = np.where(present[..., None, None], 2 * (radius - distance), -8.0).clip(-32, 32)
  prompts = generated(logits.astype(np.float16), SIDE, 2.0)
  assert (prompts.has_box == present).all()
  return prompts


def relative(ours, theirs):
  """Largest difference over the largest value of the reference; shapes must agree."""
  ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
  assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
