"""Memory attention: a slice's embedding attends to `MemorySlots`, memories of other slices and
object pointers, before it goes to the mask decoder. Follows sam2.modeling.memory_attention (sam2
1.1.0).
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.nn.adapters import AdapterConfig
from rfmedsam2_jax.nn.attention import (
  apply_rope,
  attention_weights,
  axial_rope,
  dot_product_attention,
  fits_cudnn,
)
from rfmedsam2_jax.nn.layers import Array, DType, layer_norm
from rfmedsam2_jax.nn.platform import Platform
from rfmedsam2_jax.nn.positions import sine_positions_2d
from rfmedsam2_jax.nn.remat import Remat, rematerialised

Rope = tuple[np.ndarray, np.ndarray]


class MemorySlots(NamedTuple):
  """The memories of N cells in M slots and P pointer slots, P may be 0; what is missing is not
  valid, and may hold anything.

  `maps`: [N, M, G, G, mem_dim], from `remember`. `rows`: int32 [N, M], row of the temporal table:
  distance - 1, the last row for conditioning slices. `valid`: bool [N, M]. `pointers`: [N, P, C].
  `pointer_positions`: float32 [N, P], signed distance / (min(true depth, 16) - 1), ignored by SAM
  2.0. `pointer_valid`: bool [N, P].
  """

  maps: Array
  rows: Array
  valid: Array
  pointers: Array
  pointer_positions: Array
  pointer_valid: Array


class MemoryAttention(nn.Module):
  """Layers of self-attention, attention to memories and MLP over a slice's features."""

  layers: int
  ffn: int  # hidden width of their MLPs
  adapters: AdapterConfig
  dtype: DType
  remat: Remat  # of a layer
  platform: Platform

  @nn.compact
  def __call__(
    self, embedding_NGGC: Array, slots: MemorySlots, temporal_RE: Array,
    pointer_positions_NPE: Array | None,
  ) -> Array:
    """Conditions cells; the value of a cell without any valid slot means nothing, but is finite.

    Args:
      embedding_NGGC: leading axis N, or 1 where all cells lie on one slice: what does not depend on
        memories is then done once.
      temporal_RE: the temporal table, [rows, mem_dim].
      pointer_positions_NPE: encoded positions of the pointers, [N, P, mem_dim]; none in SAM 2.0.
    """
    _, height, width, channels = embedding_NGGC.shape
    memory, positions, valid = self._memory_tokens(slots, temporal_RE, pointer_positions_NPE)
    keys = memory + positions
    spatial = slots.maps.shape[1] * height * width
    x = embedding_NGGC.astype(self.dtype)
    # The positions are added once and weakly, and not to the queries of any attention.
    x = x + 0.1 * jnp.asarray(sine_positions_2d(height, width, channels), x.dtype)
    layer_of = rematerialised(MemoryAttentionLayer, self.remat, static=(5,))
    for i in range(self.layers):
      layer = layer_of(self.ffn, self.adapters, self.dtype, self.platform, name=f"layers_{i}")
      x = layer(x, keys, memory, valid, spatial)
    return layer_norm(dtype=self.dtype, name="norm")(x)

  def _memory_tokens(
    self, slots: MemorySlots, temporal_RE: Array, pointer_positions_NPE: Array | None
  ) -> tuple[Array, Array, Array]:
    """Spatial tokens, then pointer tokens: values and positions [N, T, mem_dim], valid [N, T]."""
    n, m, height, width, dim = slots.maps.shape
    # A masked key has weight zero, but zero times what an empty slot may hold can be NaN.
    maps = jnp.where(slots.valid[:, :, None, None, None], slots.maps, 0).astype(self.dtype)
    sine = jnp.asarray(sine_positions_2d(height, width, dim))
    positions = sine + temporal_RE[slots.rows][:, :, None, None]
    memory = [maps.reshape(n, -1, dim)]
    where = [positions.astype(self.dtype).reshape(n, -1, dim)]
    valid = [jnp.repeat(slots.valid, height * width, axis=1)]
    _, p, channels = slots.pointers.shape
    if p:
      split = channels // dim  # a pointer is as wide as this many tokens
      pointers = jnp.where(slots.pointer_valid[..., None], slots.pointers, 0).astype(self.dtype)
      memory.append(pointers.reshape(n, p * split, dim))
      if pointer_positions_NPE is None:
        where.append(jnp.zeros((n, p * split, dim), self.dtype))
      else:
        where.append(jnp.repeat(pointer_positions_NPE.astype(self.dtype), split, axis=1))
      valid.append(jnp.repeat(slots.pointer_valid, split, axis=1))
    memory_NTE, where_NTE, valid_NT = (jnp.concatenate(x, axis=1) for x in (memory, where, valid))
    return memory_NTE, where_NTE, valid_NT


class MemoryAttentionLayer(nn.Module):
  """Self-attention, attention to memory, adapter, MLP; norms before, residuals around."""

  ffn: int
  adapters: AdapterConfig
  dtype: DType
  platform: Platform

  @nn.compact
  def __call__(
    self, x_NGGC: Array, keys_NTE: Array, memory_NTE: Array, valid_NT: Array, spatial: int
  ) -> Array:
    """`spatial` of the T keys lie on the grid and are rotated; the rest are pointers."""
    first, height, width, channels = x_NGGC.shape
    rope = axial_rope(height, width, channels)  # one head, as wide as the features
    norm = functools.partial(layer_norm, dtype=self.dtype)
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    x = x_NGGC.reshape(first, height * width, channels)
    y = norm(name="norm1")(x)
    attention = functools.partial(RoPEAttention, self.dtype, self.platform)
    x = x + attention(name="self_attn")(y, y, y, rope, height * width)
    y, n = norm(name="norm2")(x), len(keys_NTE)
    y = jnp.broadcast_to(y, (n, *y.shape[1:]))
    x = x + attention(name="cross_attn_image")(y, keys_NTE, memory_NTE, rope, spatial, valid_NT)
    on_grid = x.reshape(n, height, width, channels)
    x = self.adapters.adapted(on_grid, self.dtype, self.platform).reshape(x.shape)
    y = nn.relu(dense(self.ffn, name="linear1")(norm(name="norm3")(x)))
    x = x + dense(channels, name="linear2")(y)
    return x.reshape(n, height, width, channels)


class RoPEAttention(nn.Module):
  """Attention of one head with rotary positions on queries and on the first keys.

  Applied with `mutable=["intermediates"]` it also leaves `weights` there, float32 [N, L, T]: which
  keys each query attends to. Otherwise they never exist as an array.
  """

  dtype: DType
  platform: Platform

  @nn.compact
  def __call__(
    self, q_NLC: Array, k_NTE: Array, v_NTE: Array, rope: Rope, rotated: int,
    valid_NT: Array | None = None,
  ) -> Array:
    """Keys from `rotated` on have no place on the grid and are left as they are."""
    width = q_NLC.shape[-1]
    project = functools.partial(nn.Dense, width, dtype=self.dtype)
    q, k = (project(name=f"{n}_proj")(x)[:, :, None] for n, x in (("q", q_NLC), ("k", k_NTE)))
    q = apply_rope(q, rope)
    if rotated == k.shape[1]:
      k = apply_rope(k, rope)
    else:
      k = jnp.concatenate([apply_rope(k[:, :rotated], rope), k[:, rotated:]], axis=1)
    if self.is_mutable_collection("intermediates"):
      self.sow("intermediates", "weights", attention_weights(q, k, valid_NT)[:, 0])
    if v_NTE.shape[-1] < width and not fits_cudnn(q, k, self.platform):
      # The weights of a query sum to one, so that it makes no difference whether the values are
      # projected before they are averaged or after: memories are narrower before (64 channels to
      # 256), which saves a quarter of memory attention's operations.
      mean = dot_product_attention(q, k, v_NTE[:, :, None], valid_NT, self.platform)[:, :, 0]
      out = project(name="v_proj")(mean)
    else:
      v = project(name="v_proj")(v_NTE)[:, :, None]
      out = dot_product_attention(q, k, v, valid_NT, self.platform)[:, :, 0]
    return project(name="out_proj")(out)
