"""The official SAM 2 (sam2 1.1.0, PyTorch) of any size, with weights that show mistakes.

Shared by the parity tests: build the official model for a config of ours, draw its weights, and
hand the same weights over as our parameters.
"""

import numpy as np
import pytest

from convert.official import build, nchw
from rfmedsam2_jax.nn.adapters import AdapterConfig
from rfmedsam2_jax.nn.sam2 import SAM2Config
from rfmedsam2_jax.weights.names import from_official

torch = pytest.importorskip("torch")
pytest.importorskip("sam2")

__all__ = ["TINY", "draw_tensors", "draw_weights", "nchw", "official", "params_of",
           "relative_error", "torch"]

# The official classes fix the decoder's depth, heads and hidden widths; the rest can be small.
TINY = SAM2Config(
  image_size=128,
  embed_dim=16,
  stages=(1, 1, 2, 1),
  global_att_blocks=(3,),
  window_spec=(8, 4, 6, 4),
  window_pos_embed_bkg_spatial_size=(7, 7),
  d_model=64,
  mem_dim=16,
  memory_layers=2,
  adapters=AdapterConfig(dwconv=False, cnn=False),
)


def official(config, seed=0, presence_bias=3.0, video=False, **options):
  """The official model of a config, in eval mode, on the CPU, weights drawn.

  Args:
    video: build SAM2VideoPredictor instead of SAM2Base, with the overrides of
      `build_sam2_video_predictor`.
    options: further arguments of the class.
  """
  model = build(config, video, **options)
  draw_weights(model, seed, presence_bias)
  return model


def draw_weights(model, seed=0, presence_bias=3.0):
  """Draws every tensor of a SAM2Base anew; most objects are present."""
  draw_tensors(model, seed)
  model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(presence_bias)


def draw_tensors(model, seed=0):
  """Draws every tensor of the state dict of any module.

  As initialised, position embeddings are zero and layer scales 1e-6, which hides mistakes; scaled
  up as they are, the network is chaotic. These deviations keep signals at order one.
  """
  generator = torch.Generator().manual_seed(seed)
  for module in model.modules():
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, tensor in tensors:
      if name in module._non_persistent_buffers_set:
        continue
      if name == "weight" and isinstance(module, torch.nn.ConvTranspose2d):
        mean, deviation = 0.0, 0.6 / tensor.shape[0] ** 0.5
      elif name == "weight" and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
        mean, deviation = 0.0, 0.6 / tensor[0].numel() ** 0.5
      elif name == "weight" and tensor.ndim == 1:
        mean, deviation = 1.0, 0.2
      elif name == "bias":
        mean, deviation = 0.0, 0.1
      else:
        mean, deviation = 0.0, 0.5
      tensor.data.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))


def params_of(model, config):
  """The weights of an official model as our parameters, without adapters."""
  return from_official({k: v.numpy() for k, v in model.state_dict().items()}, config)


def relative_error(ours, theirs):
  """Largest difference over the largest value of the reference; shapes must agree."""
  theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
  ours = np.asarray(ours)
  assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
