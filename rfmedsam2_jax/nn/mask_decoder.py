"""The mask decoder: a cell's image embedding (with memory or `no_mem_embed`) and its prompts, from
nn.prompt_encoder, become a mask, its quality and its presence. Follows
sam2.modeling.sam.mask_decoder and transformer (1.1.0).
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rfmedsam2_jax.nn.adapters import AdapterConfig
from rfmedsam2_jax.nn.attention import dot_product_attention
from rfmedsam2_jax.nn.convolutions import Conv2D
from rfmedsam2_jax.nn.layers import MLP, Array, ConvTranspose2x2, DType, gelu, layer_norm
from rfmedsam2_jax.nn.platform import Platform
from rfmedsam2_jax.nn.remat import Remat, rematerialised

NUM_MULTIMASK = 3  # masks of an ambiguous prompt; mask token 0 is for the unambiguous ones
STABILITY_DELTA = 0.05  # thresholds on the logits between which a stable mask changes little
STABILITY_THRESHOLD = 0.98


class Decoded(NamedTuple):
  """What the decoder says of N cells, with M = 1 or 3 masks each; never gated by presence.

  `masks`: float32 [N, M, 4G, 4G] logits. `ious`: float32 [N, M], predicted, in [0, 1]. `presence`:
  float32 [N], logit that the object is on the slice at all. `pointer`: [N, C], of the object.
  """

  masks: Array
  ious: Array
  presence: Array
  pointer: Array


class MaskDecoder(nn.Module):
  """Two-way transformer, upscaling with high-resolution features, hypernetworks and heads."""

  width: int  # channels C of embedding and tokens, divisible by 8
  depth: int  # two-way layers
  heads: int  # attention heads; divides C / 2
  mlp: int  # hidden width of the layers' MLPs
  iou_hidden: int  # hidden width of the IoU head
  adapters: AdapterConfig
  dtype: DType
  remat: Remat  # of a layer and of the upscaling
  platform: Platform
  drawn: bool = False  # it sees prompts that are drawn on the mask grid

  def setup(self):
    masks, token = 1 + NUM_MULTIMASK, nn.initializers.normal(1.0)  # torch's Embedding
    mlp = functools.partial(MLP, dtype=self.dtype)
    self.obj_score_token = self.param("obj_score_token", token, (1, self.width))
    self.iou_token = self.param("iou_token", token, (1, self.width))
    self.mask_tokens = self.param("mask_tokens", token, (masks, self.width))
    self.transformer = TwoWayTransformer(
      self.depth, self.heads, self.mlp, self.adapters, self.dtype, self.remat, self.platform
    )
    self.output_upscaling_0 = ConvTranspose2x2(self.width // 4, dtype=self.dtype)
    self.output_upscaling_1 = layer_norm(1e-6, dtype=self.dtype)
    self.output_upscaling_3 = ConvTranspose2x2(self.width // 8, dtype=self.dtype)
    self.conv_s0 = Conv2D(self.width // 8, 1, dtype=self.dtype)
    self.conv_s1 = Conv2D(self.width // 4, 1, dtype=self.dtype)
    if self.drawn:
      fine = functools.partial(
        Conv2D, kernel=3, padding=1, dtype=self.dtype, platform=self.platform)
      self.drawn_s0, self.drawn_s1 = fine(self.width // 8), fine(self.width // 4)
      self.mix_0, self.mix_1 = fine(self.width // 4), fine(self.width // 8)
    self.output_hypernetworks_mlps = [mlp(self.width, self.width // 8, 3) for _ in range(masks)]
    self.iou_prediction_head = mlp(self.iou_hidden, masks, 3, sigmoid_output=True)
    self.pred_obj_score_head = mlp(self.width, 1, 3)
    if self.adapters.mask:
      self.adapter = self.adapters.on_masks(self.adapters.mask_width, dtype=self.dtype)

  def __call__(
    self, embedding_NGGC: Array, positions_GGC: Array, prompts_NQC: Array, exists_NQ: Array,
    high_res: tuple[Array, Array], multimask: bool | Array = False,
    dynamic_multimask: bool = False, shown_Nhh: Array | None = None,
  ) -> Decoded:
    """Decodes cells; `pointer` is the chosen mask token, not yet projected.

    Args:
      embedding_NGGC: with the dense prompt added.
      exists_NQ: bool, False for prompt tokens that no attention may see.
      multimask: masks of tokens 1 to 3 instead of token 0. As bool [N] it says so of every cell,
        and all have three masks: for the others that of token 0 stands three times.
      dynamic_multimask: where the mask of token 0 is unstable, the best of tokens 1 to 3.
      shown_Nhh: of a decoder that sees drawn prompts, [N, 4G, 4G] in [-1, 1], 0 where nothing is.
    """
    n = prompts_NQC.shape[0]
    own = jnp.concatenate([self.obj_score_token, self.iou_token, self.mask_tokens])
    own = jnp.broadcast_to(own.astype(self.dtype), (n, *own.shape))
    tokens = jnp.concatenate([own, prompts_NQC], axis=1)
    exists = jnp.concatenate([jnp.ones(own.shape[:2], bool), exists_NQ], axis=1)
    tokens, image = self.transformer(embedding_NGGC, positions_GGC, tokens, exists)
    mask_tokens = tokens[:, 2 : 2 + len(self.output_hypernetworks_mlps)]
    if shown_Nhh is not None:
      shown, (stride4, stride8) = shown_Nhh[..., None].astype(self.dtype), high_res
      coarse = nn.avg_pool(shown, (2, 2), (2, 2))
      high_res = (stride4 + self.drawn_s0(beside_prototype(shown, stride4)),
                  stride8 + self.drawn_s1(beside_prototype(coarse, stride8)))
    image = rematerialised(MaskDecoder._upscale, self.remat)(self, image, *high_res)
    ious = self.iou_prediction_head(tokens[:, 1]).astype(jnp.float32)
    presence = self.pred_obj_score_head(tokens[:, 0])[:, 0].astype(jnp.float32)

    def kernels_of(which: range) -> Array:
      mlps = self.output_hypernetworks_mlps
      return jnp.stack([mlps[i](mask_tokens[:, i]) for i in which], axis=1)

    def masks_by(kernels: Array) -> Array:
      """Logits float32 [N, M, 4G, 4G] of kernels [N, M, C/8]."""
      return jnp.einsum("nmc,nhwc->nmhw", kernels, image, preferred_element_type=jnp.float32)

    def masks_of(which: range) -> Array:
      return masks_by(kernels_of(which))

    several = range(1, 1 + NUM_MULTIMASK)
    if self.is_initializing():
      masks_of(several)  # or the hypernetworks of tokens 1 to 3 would have no parameters
    if isinstance(multimask, jax.Array):
      ambiguous, kernels = multimask[:, None], kernels_of(range(1 + NUM_MULTIMASK))
      kernels = jnp.where(ambiguous[..., None], kernels[:, 1:], kernels[:, :1])
      best = _take(mask_tokens[:, 1:], ious[:, 1:].argmax(axis=-1))[:, 0]
      pointer = jnp.where(ambiguous, best, mask_tokens[:, 0])
      ious = jnp.where(ambiguous, ious[:, 1:], ious[:, :1])
      return Decoded(masks_by(kernels), ious, presence, pointer)
    if multimask:
      # The pointer follows the mask that a caller would choose.
      best = _take(mask_tokens[:, 1:], ious[:, 1:].argmax(axis=-1))[:, 0]
      return Decoded(masks_of(several), ious[:, 1:], presence, best)
    masks, single_ious = masks_of(range(1)), ious[:, :1]
    if dynamic_multimask:
      best_N = ious[:, 1:].argmax(axis=-1)
      stable = stability(masks[:, 0]) >= STABILITY_THRESHOLD
      masks = jnp.where(stable[:, None, None, None], masks, _take(masks_of(several), best_N))
      single_ious = jnp.where(stable[:, None], single_ious, _take(ious[:, 1:], best_N))
    return Decoded(masks, single_ious, presence, mask_tokens[:, 0])

  def _upscale(self, image_NGGC: Array, stride4: Array, stride8: Array) -> Array:
    """Image side and high-resolution features to [N, 4G, 4G, C/8]."""
    image = gelu(self.output_upscaling_1(self.output_upscaling_0(image_NGGC) + stride8))
    image = gelu(self.output_upscaling_3(image) + stride4)
    if self.drawn:
      # Without it, what is drawn and what is seen meet pixel by pixel alone.
      image = image + self.mix_1(gelu(self.mix_0(image)))
    return image


def beside_prototype(shown_NHW1: Array, features_NHWC: Array) -> Array:
  """What is drawn, in [-1, 1], and how unlike every place is to the mean of those that are drawn as
  the object: [N, H, W, 1 + C].

  That an object looks alike all over would have to be found out through the kernels of the mask
  tokens else. The more of what is drawn is the object, the more the mean says.
  """
  weights = jnp.maximum(shown_NHW1, 0)
  total = weights.sum((1, 2), keepdims=True)
  mean = (weights * features_NHWC).sum((1, 2), keepdims=True) / jnp.maximum(total, 1e-3)
  unlike = jnp.where(total > 0, jnp.square(features_NHWC - mean), 0)
  return jnp.concatenate([shown_NHW1, unlike], axis=-1)


def stability(logits_NHW: Array) -> Array:
  """IoU [N] of the masks at thresholds +-STABILITY_DELTA; 1 where both are empty."""
  thresholds = STABILITY_DELTA, -STABILITY_DELTA
  inner, outer = ((logits_NHW > x).sum(axis=(1, 2)).astype(jnp.float32) for x in thresholds)
  return jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0)


def _take(x_NM: Array, index_N: Array) -> Array:
  """One of M per row, [N, M, ...] -> [N, 1, ...]."""
  return jnp.take_along_axis(x_NM, index_N.reshape(-1, *(1,) * (x_NM.ndim - 1)), axis=1)


class TwoWayTransformer(nn.Module):
  """Tokens attend to the image and the image to the tokens, `depth` times."""

  depth: int
  heads: int
  mlp: int
  adapters: AdapterConfig
  dtype: DType
  remat: Remat
  platform: Platform

  @nn.compact
  def __call__(
    self, image_NGGC: Array, positions_GGC: Array, tokens_NTC: Array, exists_NT: Array
  ) -> tuple[Array, Array]:
    n, height, width, channels = image_NGGC.shape
    image, tokens = image_NGGC.reshape(n, height * width, channels), tokens_NTC
    positions = positions_GGC.reshape(1, height * width, channels)
    block_of = rematerialised(TwoWayAttentionBlock, self.remat, static=(6,))
    for i in range(self.depth):
      sizes = self.heads, self.mlp, i == 0
      layer = block_of(*sizes, self.adapters, self.dtype, self.platform, name=f"layers_{i}")
      tokens, image = layer(tokens, image, tokens_NTC, positions, exists_NT, (height, width))
    name = "final_attn_token_to_image"
    attention = TokenAttention(self.heads, channels // 2, self.dtype, self.platform, name=name)
    tokens = tokens + attention(tokens + tokens_NTC, image + positions, image)
    tokens = layer_norm(dtype=self.dtype, name="norm_final_attn")(tokens)
    return tokens, image.reshape(image_NGGC.shape)


class TwoWayAttentionBlock(nn.Module):
  """Tokens to themselves, tokens to image, MLP on tokens, image to tokens."""

  heads: int
  mlp: int
  first: bool  # its self-attention has neither positions nor a residual (transformer.py:161)
  adapters: AdapterConfig
  dtype: DType
  platform: Platform

  @nn.compact
  def __call__(
    self, tokens_NTC: Array, image_NLC: Array, token_positions_NTC: Array,
    image_positions_1LC: Array, exists_NT: Array, grid: tuple[int, int],
  ) -> tuple[Array, Array]:
    tokens, image, width = tokens_NTC, image_NLC, tokens_NTC.shape[-1]
    norm = functools.partial(layer_norm, dtype=self.dtype)
    attention = functools.partial(
      TokenAttention, self.heads, dtype=self.dtype, platform=self.platform
    )
    attend = attention(width, name="self_attn")
    if self.first:
      tokens = attend(tokens, tokens, tokens, exists_NT)
    else:
      q = tokens + token_positions_NTC
      tokens = tokens + attend(q, q, tokens, exists_NT)
    tokens = norm(name="norm1")(tokens)
    q, k = tokens + token_positions_NTC, image + image_positions_1LC
    tokens = tokens + attention(width // 2, name="cross_attn_token_to_image")(q, k, image)
    tokens = norm(name="norm2")(tokens)
    tokens = tokens + MLP(self.mlp, width, 2, dtype=self.dtype, name="mlp")(tokens)
    tokens = norm(name="norm3")(tokens)
    q, k = image + image_positions_1LC, tokens + token_positions_NTC
    attend = attention(width // 2, name="cross_attn_image_to_token")
    image = image + attend(q, k, tokens, exists_NT)
    on_grid = self.adapters.adapted(image.reshape(-1, *grid, width), self.dtype, self.platform)
    return tokens, norm(name="norm4")(on_grid.reshape(image.shape))


class TokenAttention(nn.Module):
  """Multi-head attention with projections, optionally narrower inside than outside."""

  heads: int
  inner: int  # width of queries, keys and values together over all heads
  dtype: DType
  platform: Platform

  @nn.compact
  def __call__(
    self, q_NLC: Array, k_NMC: Array, v_NMC: Array, mask_NM: Array | None = None
  ) -> Array:
    def project(name: str, x: Array) -> Array:
      x = nn.Dense(self.inner, dtype=self.dtype, name=name)(x)
      return x.reshape(*x.shape[:2], self.heads, -1)

    q, k, v = project("q_proj", q_NLC), project("k_proj", k_NMC), project("v_proj", v_NMC)
    out = dot_product_attention(q, k, v, mask_NM, self.platform)
    out = out.reshape(*out.shape[:2], self.inner)
    return nn.Dense(q_NLC.shape[-1], dtype=self.dtype, name="out_proj")(out)
