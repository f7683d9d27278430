"""Scaled dot-product attention of all of SAM 2, in the form that suits the platform that it is
traced for, and SAM 2's rotary positions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.nn.layers import Array
from rfmedsam2_jax.nn.platform import Platform, default_platform
from rfmedsam2_jax.nn.row_bands import largest_divisor

# Scores (batch x heads x queries x keys) that are computed at once: so many that on a CPU they stay
# in the caches, where more queries are worth reading wider keys for; elsewhere only memory counts.
# Blocks of both take 79 ms where queries alone in parts take 108 (memory attention of three objects
# at 512 on two cores), close to the 75 of the arithmetic.
_CPU_SCORES_PER_CHANNEL = 2**14
_CPU_BLOCK = 1024  # queries, and keys
_ACCELERATOR_SCORES = 2**28
# Scores that are kept for the backward pass; more are computed again.
_CPU_KEPT_SCORES = 2**23
_LOW = -1e30  # score of a key that takes no part: finite, for blocks without any key


def dot_product_attention(
  q_BNHD: Array, k_BMHD: Array, v_BMHV: Array, mask_BM: Array | None = None,
  platform: Platform | None = None,
) -> Array:
  """softmax(q k' / sqrt(D)) v per head, [B, N, H, V] in the dtype of the queries [B, N, H, D]; the
  softmax is float32 whatever the inputs are.

  Args:
    k_BMHD, v_BMHV: keys [B, M, H, D] and values [B, M, H, V]; cuDNN is used only where V = D.
    mask_BM: bool [B, M], False for keys that take no part. Where a row of the batch has no key
      left, the result is zero, and so are the gradients.
    platform: what it is traced for; None is the default backend.
  """
  platform = platform or default_platform()
  if mask_BM is not None:
    # A row without keys attends to all of them and its result is thrown away: no softmax ever
    # sees an empty row, so no NaN arises in the value or in the gradient.
    some_B = mask_BM.any(axis=-1)
    mask_BM = mask_BM | ~some_B[:, None]
  if v_BMHV.shape[-1] == q_BNHD.shape[-1] and fits_cudnn(q_BNHD, k_BMHD, platform):
    out = _cudnn_attention(q_BNHD, k_BMHD, v_BMHV, mask_BM)
  else:
    out = _einsum_attention(q_BNHD, k_BMHD, v_BMHV, mask_BM, platform.is_cpu)
  if mask_BM is not None:
    out = jnp.where(some_B[:, None, None, None], out, 0)
  return out


def attention_weights(q_BNHD: Array, k_BMHD: Array, mask_BM: Array | None = None) -> Array:
  """What `dot_product_attention` weighs the values by, to look at: float32 [B, H, N, M]. The rows
  sum to one, or to zero where a row of the batch has no key left."""
  scores = jnp.einsum("bnhd,bmhd->bhnm", q_BNHD, k_BMHD, preferred_element_type=jnp.float32)
  where = None if mask_BM is None else mask_BM[:, None, None, :]
  weights = jax.nn.softmax(scores * q_BNHD.shape[-1] ** -0.5, axis=-1, where=where)
  return weights if where is None else jnp.where(where, weights, 0)


def fits_cudnn(q_BNHD: Array, k_BMHD: Array, platform: Platform) -> bool:
  """Whether cuDNN's fused attention takes these arrays, forward and backward: half precision on an
  Ampere or later, limited head width, more than one score per head."""
  capability, width = platform.capability, q_BNHD.shape[-1]
  if capability is None or q_BNHD.dtype not in (jnp.bfloat16, jnp.float16):
    return False
  # Wider than 128 both ways on Hopper alone: Blackwell has the forward pass only.
  widest = 256 if capability[0] == 9 else 128
  scores = q_BNHD.shape[1] * k_BMHD.shape[1]
  return capability[0] >= 8 and width % 8 == 0 and width <= widest and scores > 1


def _cudnn_attention(q: Array, k: Array, v: Array, mask_BM: Array | None) -> Array:
  """cuDNN's fused attention, where `fits_cudnn`.

  It takes a mask for every query, of all heads together: a bias [B, 1, N, M] in the dtype of the
  queries, and as much again for the bias's gradient, which JAX asks for and nobody uses.
  """
  (batch, queries), keys = q.shape[:2], k.shape[1]
  if mask_BM is None and keys % 2:
    mask_BM = jnp.ones((batch, keys), bool)
  # Gradients are refused where N or M is odd, as with a bias; jax 0.10.2 takes all for such.
  q, k, v, mask = jax.tree.map(
    lambda x: jnp.pad(x, [(0, 0), (0, x.shape[1] % 2)] + [(0, 0)] * (x.ndim - 2)),
    (q, k, v, mask_BM)
  )
  if mask is not None:
    mask = jnp.broadcast_to(mask[:, None, None, :], (batch, 1, q.shape[1], k.shape[1]))
  out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
  return out[:, :queries]


def _einsum_attention(q: Array, k: Array, v: Array, mask_BM: Array | None, cpu: bool) -> Array:
  """The plain computation, in parts where the scores would be large."""
  (batch, queries, heads, width), keys = q.shape, k.shape[1]
  limit = _CPU_SCORES_PER_CHANNEL * width if cpu else _ACCELERATOR_SCORES
  scores = batch * heads * queries * keys
  q = q * (width**-0.5)
  if scores <= limit:
    return _attend(q, k, v, mask_BM)
  keep = scores <= (_CPU_KEPT_SCORES if cpu else limit)
  if scores // batch <= limit:  # some rows of the batch at a time
    some = _attend if keep else jax.checkpoint(_attend)
    parts = batch // largest_divisor(batch, limit * batch // scores)
    rows = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (q, k, v, mask_BM))
    out = jax.lax.map(lambda row: some(*row), rows)
    return out.reshape(*q.shape[:3], -1)
  # Blocks of keys; on a CPU of one head of one row of the batch, and of some of its queries.
  chunks = -(-queries // _CPU_BLOCK) if cpu else 1
  size = -(-queries // chunks)
  block = _CPU_BLOCK if cpu else max(1, limit * keys // scores)
  q = jnp.pad(q, ((0, 0), (0, chunks * size - queries), (0, 0), (0, 0)))
  q, k, v = (x.transpose(0, 2, 1, 3).reshape(batch * heads, -1, x.shape[-1]) for x in (q, k, v))
  mask = None if mask_BM is None else jnp.repeat(mask_BM, heads, axis=0)
  attend = functools.partial(_attend_in_blocks, block=block, keep=keep)
  if cpu:
    q = q.reshape(batch * heads, chunks, size, -1)

    def head(inputs: tuple[Array, Array, Array, Array | None]) -> Array:
      q, *others = jax.tree.map(lambda x: x[None], inputs)
      return jax.lax.map(lambda q: attend(q[None], *others)[0], q[0])

    out = jax.lax.map(head, (q, k, v, mask))
  else:
    out = attend(q, k, v, mask)
  return out.reshape(batch, heads, chunks * size, -1)[:, :, :queries].transpose(0, 2, 1, 3)


def _attend_in_blocks(
  q_RND: Array, k_RMD: Array, v_RMV: Array, mask_RM: Array | None, block: int, keep: bool
) -> Array:
  """Attention of scaled queries to one block of keys after the other, [R, N, V].

  The softmax is corrected as larger scores come (Milakov and Gimelshein 2018, "Online normalizer
  calculation for softmax"). Blocks without any key that takes part cost nothing: memory slots that
  are not filled yet. Without `keep` the backward pass computes the scores again.
  """
  (rows, queries, _), keys = q_RND.shape, k_RMD.shape[1]

  def attend(carry, k, v, mask):
    out, total, peak = carry
    scores = jnp.einsum("rnd,rmd->rnm", q_RND, k, preferred_element_type=jnp.float32)
    if mask is not None:
      scores = jnp.where(mask[:, None], scores, _LOW)
    higher = jnp.maximum(peak, jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights, before = jnp.exp(scores - higher), jnp.exp(peak - higher)
    total = total * before + weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    new = jnp.einsum("rnm,rmv->rnv", weights, v, preferred_element_type=jnp.float32)
    return out * before + new, total, higher

  if not keep:
    attend = jax.checkpoint(attend)

  def step(carry, inputs):
    if inputs[2] is None:
      return attend(carry, *inputs), None
    return jax.lax.cond(inputs[2].any(), attend, lambda carry, *_: carry, carry, *inputs), None

  carry = (
    jnp.zeros((rows, queries, v_RMV.shape[-1]), jnp.float32),
    jnp.zeros((rows, queries, 1), jnp.float32), jnp.full((rows, queries, 1), _LOW, jnp.float32)
  )
  whole = keys - keys % block  # the keys of the last block are fewer, and come first
  inputs = k_RMD, v_RMV, mask_RM
  if whole < keys:
    carry, _ = step(carry, jax.tree.map(lambda x: x[:, whole:], inputs))
  blocks = jax.tree.map(
    lambda x: jnp.swapaxes(x[:, :whole].reshape(rows, -1, block, *x.shape[2:]), 0, 1), inputs
  )
  (out, total, _), _ = jax.lax.scan(step, carry, blocks)
  return (out / total).astype(q_RND.dtype)


def _attend(q_BNHD: Array, k_BMHD: Array, v_BMHV: Array, mask_BM: Array | None) -> Array:
  """Attention of scaled queries; every row of the mask has a True."""
  # Batch and head side by side in front: XLA:CPU is slow at products that are not laid out so.
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BNHD, k_BMHD, v_BMHV))
  scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
  if mask_BM is not None:
    scores = jnp.where(mask_BM[:, None, None, :], scores, -jnp.inf)
  peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  weights = jnp.exp(scores - peak)
  # Divided after the product, which has V columns where the scores have M.
  total = weights.sum(axis=-1, keepdims=True)
  weights = weights.astype(v.dtype)
  out = jnp.einsum("bhnm,bhmv->bhnv", weights, v, preferred_element_type=jnp.float32)
  return (out / total).astype(q.dtype).transpose(0, 2, 1, 3)


@functools.lru_cache(maxsize=32)
def axial_rope(height: int, width: int, head_width: int) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines of SAM 2's rotary positions, both float32 [height * width, head_width / 2],
  for the tokens of a grid in row-major order; head_width is divisible by 4. The first half of the
  pairs turns with x, the second with y (position_encoding.py:180 of sam2 1.1.0)."""
  frequencies = 10000.0 ** -(np.arange(0, head_width, 4)[: head_width // 4] / head_width)
  y, x = np.divmod(np.arange(height * width), width)
  angles = np.concatenate([np.outer(x, frequencies), np.outer(y, frequencies)], axis=-1)
  return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def apply_rope(x_BNHD: Array, rope: tuple[np.ndarray, np.ndarray]) -> Array:
  """Turns the interleaved pairs (channels 2i and 2i + 1) of queries or keys [B, N, H, D] by their
  position. N is a multiple of the grid's tokens (the keys of several memories, each a whole grid);
  tokens without a position (object pointers) are kept apart. `rope` is of head_width D."""
  batch, tokens, heads, width = x_BNHD.shape
  cos, sin = (t[None, None, :, None, :] for t in rope)
  x = x_BNHD.astype(jnp.float32).reshape(batch, -1, rope[0].shape[0], heads, width // 2, 2)
  even, odd = x[..., 0], x[..., 1]
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return turned.reshape(batch, tokens, heads, width).astype(x_BNHD.dtype)
