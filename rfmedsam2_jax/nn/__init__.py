"""Networks: Linen modules, arrays in and arrays out."""

from rfmedsam2_jax.nn.adapters import AdapterConfig
from rfmedsam2_jax.nn.initialisation import init_params, param_shapes
from rfmedsam2_jax.nn.mask_decoder import Decoded
from rfmedsam2_jax.nn.memory_attention import MemorySlots
from rfmedsam2_jax.nn.platform import Platform
from rfmedsam2_jax.nn.presets import PRESETS
from rfmedsam2_jax.nn.prompt_encoder import Prompts, box_prompts, no_prompts
from rfmedsam2_jax.nn.sam2 import ABSENT_LOGIT, BUFFERS, SAM2, ImageFeatures, SAM2Config, apply
from rfmedsam2_jax.nn.unet import UNet, UNetConfig

init = init_params

__all__ = [
  "ABSENT_LOGIT", "BUFFERS", "PRESETS", "SAM2", "AdapterConfig", "Decoded", "ImageFeatures",
  "MemorySlots", "Platform", "Prompts", "SAM2Config", "UNet", "UNetConfig", "apply", "box_prompts",
  "init", "init_params", "no_prompts", "param_shapes",
]
