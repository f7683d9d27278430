"""The mask decoder: a cell's features and its prompts become a mask, its quality and its presence.

In: image embedding (with memory or `no_mem_embed`), prompt tokens and dense map from
nn.prompt_encoder. Out: `Decoded`. Follows sam2.modeling.sam.mask_decoder and transformer (1.1.0).
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from rfmedsam2_jax.nn.adapters import AdapterConfig
from rfmedsam2_jax.nn.attention import dot_product_attention
from rfmedsam2_jax.nn.layers import MLP, Array, ConvTranspose2x2, DType, conv2d, gelu, layer_norm
from rfmedsam2_jax.nn.remat import Remat, rematerialised

NUM_MULTIMASK = 3  # masks of an ambiguous prompt; mask token 0 is for the unambiguous ones
STABILITY_DELTA = 0.05  # thresholds on the logits between which a stable mask changes little
STABILITY_THRESHOLD = 0.98


class Decoded(NamedTuple):
  """What the decoder says of N cells, with M = 1 or 3 masks each; never gated by presence.

  Attributes:
    masks: float32 [N, M, 4G, 4G] logits.
    ious: float32 [N, M], predicted IoU in [0, 1].
    presence: float32 [N], logit that the object is on the slice at all.
    pointer: [N, C], the object pointer.
  """

  masks: Array
  ious: Array
  presence: Array
  pointer: Array


class MaskDecoder(nn.Module):
  """Two-way transformer, upscaling with high-resolution features, hypernetworks and heads.

  Args:
    width: channels C of embedding and tokens, divisible by 8.
    depth: two-way layers.
    heads: attention heads; divides C / 2.
    mlp: hidden width of the layers' MLPs.
    iou_hidden: hidden width of the IoU head.
    remat: what the backward pass keeps of a layer and of the upscaling, see nn.remat.
  """

  width: int
  depth: int = 2
  heads: int = 8
  mlp: int = 2048
  iou_hidden: int = 256
  adapters: AdapterConfig = AdapterConfig(dwconv=False, cnn=False)
  dtype: DType = jnp.float32
  remat: Remat = "none"

  def setup(self):
    masks, token = 1 + NUM_MULTIMASK, nn.initializers.normal(1.0)  # torch's Embedding
    self.obj_score_token = self.param("obj_score_token", token, (1, self.width))
    self.iou_token = self.param("iou_token", token, (1, self.width))
    self.mask_tokens = self.param("mask_tokens", token, (masks, self.width))
    self.transformer = TwoWayTransformer(
      self.width, self.depth, self.heads, self.mlp, self.adapters, self.dtype, self.remat
    )
    self.output_upscaling_0 = ConvTranspose2x2(self.width // 4, dtype=self.dtype)
    self.output_upscaling_1 = layer_norm(1e-6, dtype=self.dtype)
    self.output_upscaling_3 = ConvTranspose2x2(self.width // 8, dtype=self.dtype)
    self.conv_s0 = conv2d(self.width // 8, 1, dtype=self.dtype)
    self.conv_s1 = conv2d(self.width // 4, 1, dtype=self.dtype)
    self.output_hypernetworks_mlps = [
      MLP(self.width, self.width // 8, 3, dtype=self.dtype) for _ in range(masks)
    ]
    self.iou_prediction_head = MLP(
      self.iou_hidden, masks, 3, sigmoid_output=True, dtype=self.dtype
    )
    self.pred_obj_score_head = MLP(self.width, 1, 3, dtype=self.dtype)
    if self.adapters.mask:
      self.adapter = self.adapters.on_masks(self.adapters.mask_width, dtype=self.dtype)

  def project_high_res(self, stride4_BHWC: Array, stride8_BHWC: Array) -> tuple[Array, Array]:
    """The neck's finer levels as the upscaling wants them: C/8 and C/4 channels."""
    return self.conv_s0(stride4_BHWC), self.conv_s1(stride8_BHWC)

  def correct(self, pixels_NHWC: Array, nearby_NRHW: Array) -> Array:
    """What the MaskAdapter adds to mask logits, float32 [N, 4G, 4G]."""
    return self.adapter(pixels_NHWC, nearby_NRHW)

  def __call__(
    self, embedding_NGGC: Array, positions_GGC: Array, prompts_NQC: Array, exists_NQ: Array,
    high_res: tuple[Array, Array], multimask: bool = False, dynamic_multimask: bool = False,
  ) -> Decoded:
    """Decodes cells; `pointer` is the chosen mask token, not yet projected.

    Args:
      embedding_NGGC: with the dense prompt added.
      exists_NQ: bool, False for prompt tokens that no attention may see.
      multimask: masks of tokens 1 to 3 instead of token 0.
      dynamic_multimask: where the mask of token 0 is unstable, the best of tokens 1 to 3.
    """
    n = prompts_NQC.shape[0]
    own = jnp.concatenate([self.obj_score_token, self.iou_token, self.mask_tokens])
    own = jnp.broadcast_to(own.astype(self.dtype), (n, *own.shape))
    tokens = jnp.concatenate([own, prompts_NQC], axis=1)
    exists = jnp.concatenate([jnp.ones(own.shape[:2], bool), exists_NQ], axis=1)

    tokens, image = self.transformer(embedding_NGGC, positions_GGC, tokens, exists)
    mask_tokens = tokens[:, 2 : 2 + len(self.output_hypernetworks_mlps)]

    image = rematerialised(MaskDecoder._upscale, self.remat)(self, image, *high_res)

    ious = self.iou_prediction_head(tokens[:, 1]).astype(jnp.float32)
    presence = self.pred_obj_score_head(tokens[:, 0])[:, 0].astype(jnp.float32)

    def masks_of(which: range) -> Array:
      """Logits float32 [N, len(which), 4G, 4G] of some of the mask tokens."""
      kernels = jnp.stack(
        [self.output_hypernetworks_mlps[i](mask_tokens[:, i]) for i in which], axis=1
      )
      return jnp.einsum("nmc,nhwc->nmhw", kernels, image, preferred_element_type=jnp.float32)

    several = range(1, 1 + NUM_MULTIMASK)
    if self.is_initializing():
      masks_of(several)  # or the hypernetworks of tokens 1 to 3 would have no parameters
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
    return gelu(self.output_upscaling_3(image) + stride4)


def stability(logits_NHW: Array) -> Array:
  """IoU [N] of the masks at thresholds +-STABILITY_DELTA; 1 where both are empty."""
  inner = (logits_NHW > STABILITY_DELTA).sum(axis=(1, 2)).astype(jnp.float32)
  outer = (logits_NHW > -STABILITY_DELTA).sum(axis=(1, 2)).astype(jnp.float32)
  return jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0)


def _take(x_NM: Array, index_N: Array) -> Array:
  """One of M per row, [N, M, ...] -> [N, 1, ...]."""
  index = index_N.reshape(-1, *(1,) * (x_NM.ndim - 1))
  return jnp.take_along_axis(x_NM, index, axis=1)


class TwoWayTransformer(nn.Module):
  """Tokens attend to the image and the image to the tokens, `depth` times."""

  width: int
  depth: int
  heads: int
  mlp: int
  adapters: AdapterConfig
  dtype: DType
  remat: Remat = "none"

  @nn.compact
  def __call__(
    self, image_NGGC: Array, positions_GGC: Array, tokens_NTC: Array, exists_NT: Array
  ) -> tuple[Array, Array]:
    n, height, width, channels = image_NGGC.shape
    image = image_NGGC.reshape(n, height * width, channels)
    positions = positions_GGC.reshape(1, height * width, channels)
    tokens = tokens_NTC
    block_of = rematerialised(TwoWayAttentionBlock, self.remat, static=(6,))
    for i in range(self.depth):
      layer = block_of(
        self.heads, self.mlp, first=i == 0, adapters=self.adapters, dtype=self.dtype,
        name=f"layers_{i}",
      )
      tokens, image = layer(tokens, image, tokens_NTC, positions, exists_NT, (height, width))
    attention = TokenAttention(
      self.heads, channels // 2, dtype=self.dtype, name="final_attn_token_to_image"
    )
    tokens = tokens + attention(tokens + tokens_NTC, image + positions, image)
    tokens = layer_norm(dtype=self.dtype, name="norm_final_attn")(tokens)
    return tokens, image.reshape(image_NGGC.shape)


class TwoWayAttentionBlock(nn.Module):
  """Tokens to themselves, tokens to image, MLP on tokens, image to tokens.

  Args:
    first: the first layer's self-attention has neither positions nor a residual
      (transformer.py:161).
  """

  heads: int
  mlp: int
  first: bool
  adapters: AdapterConfig
  dtype: DType

  @nn.compact
  def __call__(
    self, tokens_NTC: Array, image_NLC: Array, token_positions_NTC: Array,
    image_positions_1LC: Array, exists_NT: Array, grid: tuple[int, int],
  ) -> tuple[Array, Array]:
    width = tokens_NTC.shape[-1]

    def norm(name: str, x: Array) -> Array:
      return layer_norm(dtype=self.dtype, name=name)(x)

    def attend(name: str, inner: int, *args: Array) -> Array:
      return TokenAttention(self.heads, inner, dtype=self.dtype, name=name)(*args)

    tokens, image = tokens_NTC, image_NLC
    if self.first:
      tokens = attend("self_attn", width, tokens, tokens, tokens, exists_NT)
    else:
      q = tokens + token_positions_NTC
      tokens = tokens + attend("self_attn", width, q, q, tokens, exists_NT)
    tokens = norm("norm1", tokens)

    q, k = tokens + token_positions_NTC, image + image_positions_1LC
    tokens = tokens + attend("cross_attn_token_to_image", width // 2, q, k, image)
    tokens = norm("norm2", tokens)

    tokens = tokens + MLP(self.mlp, width, 2, dtype=self.dtype, name="mlp")(tokens)
    tokens = norm("norm3", tokens)

    q, k = image + image_positions_1LC, tokens + token_positions_NTC
    image = image + attend("cross_attn_image_to_token", width // 2, q, k, tokens, exists_NT)
    on_grid = self.adapters.adapted(image.reshape(-1, *grid, width), self.dtype)
    image = on_grid.reshape(image.shape)
    return tokens, norm("norm4", image)


class TokenAttention(nn.Module):
  """Multi-head attention with projections, optionally narrower inside than outside.

  Args:
    heads: attention heads.
    inner: width of queries, keys and values together over all heads.
  """

  heads: int
  inner: int
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(
    self, q_NLC: Array, k_NMC: Array, v_NMC: Array, mask_NM: Array | None = None
  ) -> Array:
    def project(name: str, x: Array) -> Array:
      x = nn.Dense(self.inner, dtype=self.dtype, name=name)(x)
      return x.reshape(*x.shape[:2], self.heads, -1)

    q, k, v = project("q_proj", q_NLC), project("k_proj", k_NMC), project("v_proj", v_NMC)
    out = dot_product_attention(q, k, v, mask_NM)
    out = out.reshape(*out.shape[:2], self.inner)
    return nn.Dense(q_NLC.shape[-1], dtype=self.dtype, name="out_proj")(out)
