"""The neck of SAM 2's image encoder, and the encoder: normalised images to feature maps of one
width at strides 4, 8, 16, which the mask decoder (the finer two) and memory attention take.
Follows sam2/modeling/backbones/image_encoder.py of sam2 1.1.0, with the same submodule names.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from rfmedsam2_jax.nn.adapters import AdapterConfig
from rfmedsam2_jax.nn.convolutions import Conv2D
from rfmedsam2_jax.nn.hiera import Hiera
from rfmedsam2_jax.nn.layers import Array, DType, upsample2
from rfmedsam2_jax.nn.platform import Platform, default_platform
from rfmedsam2_jax.nn.remat import Remat, rematerialised

TOP_DOWN_LEVELS = (2, 3)  # which receive the upsampled coarser level; 0 is the finest


class FpnNeck(nn.Module):
  """A feature pyramid without output convolutions, every level of `d_model` channels."""

  d_model: int
  adapters: AdapterConfig = AdapterConfig(dwconv=False, cnn=False)
  dtype: DType = jnp.float32
  remat: Remat = "none"  # of a level
  platform: Platform = dataclasses.field(default_factory=default_platform)

  @nn.compact
  def __call__(self, features: tuple[Array, ...]) -> tuple[Array, ...]:
    """Features [B, H, W, C] of every stage, fine to coarse, to as many [B, H, W, d_model]."""
    levels: list[Array] = []
    lateral_of = rematerialised(Lateral, self.remat)
    for i in reversed(range(len(features))):
      # Upstream counts the convolutions from the coarsest level.
      name = f"convs_{len(features) - 1 - i}"
      parts = self.d_model, self.adapters, self.dtype, self.platform
      lateral = lateral_of(*parts, name=name)(features[i])
      if levels and i in TOP_DOWN_LEVELS:
        lateral = lateral + upsample2(levels[-1])
      levels.append(lateral)
    return tuple(reversed(levels))


class Lateral(nn.Module):
  """One level's point-wise convolution and its CNN-Adapter."""

  features: int
  adapters: AdapterConfig
  dtype: DType
  platform: Platform

  @nn.compact
  def __call__(self, x_BHWC: Array) -> Array:
    x = Conv2D(self.features, 1, dtype=self.dtype, name="conv")(x_BHWC)
    return self.adapters.convolved(x, self.dtype, self.platform)


class ImageEncoder(nn.Module):
  """Trunk and neck; the coarsest level serves the top-down path and is then dropped."""

  trunk: Hiera
  neck: FpnNeck

  def __call__(self, images_BHW3: Array) -> tuple[Array, ...]:
    """Images [B, S, S, 3] to [B, S/4, S/4, C], [B, S/8, S/8, C], [B, S/16, S/16, C]."""
    return self.neck(self.trunk(images_BHW3))[:-1]
