"""Embeds prompts (points, boxes as two points, masks) for the mask decoder. Follows
sam2.modeling.sam.prompt_encoder (sam2 1.1.0).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rfmedsam2_jax.nn.convolutions import Conv2D
from rfmedsam2_jax.nn.layers import AnyArray, Array, DType, gelu, layer_norm
from rfmedsam2_jax.nn.positions import random_fourier, random_fourier_grid

# Labels of points. 0 and 1 are SAM's; a token that says "no point" is not the same as no token.
ABSENT, NOT_A_POINT, BOX_START, BOX_END = -2, -1, 2, 3
# Of prompts that are drawn into the mask prompt: the logit, and the radius of a point in pixels.
DRAWN_LOGIT, DISC = 10.0, 5.0


class Prompts(NamedTuple):
  """Prompts of N cells; whatever a cell lacks is masked, so that all cells have one shape.

  `points`: float32 [N, Q, 2], x y as pixel indices of the S x S image (the encoder adds the half
  pixel). `labels`: int32 [N, Q], 0 negative and 1 positive point, 2 and 3 the corners of a box, -1
  the token that says "not a point", -2 no token at all (hidden from every attention). SAM 2 has one
  not-a-point token behind the points and boxes it is given, and two on a tracked slice without
  prompts (sam2_base.py:316, prompt_encoder.py:189); whoever builds this puts them in. `mask`:
  float32 [N, 4G, 4G] logits, or None if no cell has one. `has_mask`: bool [N], None for all.
  """

  points: Array
  labels: Array
  mask: AnyArray | None = None
  has_mask: AnyArray | None = None


def pack_prompts(
  boxes: AnyArray, has_box: AnyArray, points: AnyArray, point_labels: AnyArray,
  mask: AnyArray | None = None, has_mask: AnyArray | None = None,
) -> Prompts:
  """Corners, clicks and the tokens that SAM 2's own calls put behind them.

  As in sam2_base.py:316-345 a box is two points and one not-a-point token always follows; a cell
  with neither has two of them, like an unprompted tracked slice. `boxes`: [N, 4], x0 y0 x1 y1 as
  inclusive pixel indices of the S x S image. `has_box`: bool [N]. `points`: [N, Q, 2].
  `point_labels`: int [N, Q]; ABSENT where there is none. `mask`, `has_mask`: see `Prompts`.
  """
  clicked, count = jnp.any(point_labels >= 0, axis=1), boxes.shape[0]
  corners = boxes.reshape(count, 2, 2)
  box_labels = jnp.where(has_box[:, None], jnp.array([BOX_START, BOX_END]), ABSENT)
  second = jnp.where(has_box | clicked, ABSENT, NOT_A_POINT)[:, None]
  last = jnp.full((count, 1), NOT_A_POINT)
  tokens = jnp.concatenate([corners, points, jnp.zeros((count, 2, 2))], axis=1)
  labels = jnp.concatenate([box_labels, point_labels, second, last], axis=1)
  return Prompts(tokens, labels.astype(jnp.int32), mask, has_mask)


def box_prompts(
  boxes: AnyArray, has_box: AnyArray | None = None, mask: AnyArray | None = None,
  has_mask: AnyArray | None = None,
) -> Prompts:
  """Prompts of one box per cell (all have one by default), see `pack_prompts`."""
  n = boxes.shape[0]
  has_box = jnp.ones(n, bool) if has_box is None else has_box
  nowhere = jnp.zeros((n, 0, 2)), jnp.zeros((n, 0), jnp.int32)
  return pack_prompts(boxes, has_box, *nowhere, mask, has_mask)


def no_prompts(n: int) -> Prompts:
  """Prompts of `n` tracked cells that nobody prompted: two not-a-point tokens."""
  return Prompts(jnp.zeros((n, 2, 2), jnp.float32), jnp.full((n, 2), NOT_A_POINT, jnp.int32))


def drawn(prompts: Prompts, side: int) -> Prompts:
  """Prompts whose boxes and points stand in the mask prompt [N, side, side], too.

  The mask prompt is the mask that a cell has already (previous logits), else the filled box at
  +-10, in between where the box's edge cuts a pixel, else 0. Discs of points overwrite it, +10 and
  -10, later points earlier ones. A cell without any of it has none.
  """
  points, labels, cells = prompts.points.astype(jnp.float32), prompts.labels, len(prompts.labels)
  start = 4.0 * jnp.arange(side)  # first pixel of the image under a pixel of the mask

  def corner(label: int) -> Array:
    return jnp.sum(jnp.where((labels == label)[..., None], points, 0.0), axis=1)

  first, last = corner(BOX_START)[..., None], corner(BOX_END)[..., None]  # [N, 2, 1]
  covered = (jnp.minimum(last + 1, start + 4) - jnp.maximum(first, start)).clip(0, 4) / 4
  box = DRAWN_LOGIT * (2 * covered[:, 0, None, :] * covered[:, 1, :, None] - 1)
  boxed = jnp.any(labels == BOX_START, axis=1)
  mask = jnp.where(boxed[:, None, None], box, 0.0)
  has_mask = jnp.zeros(cells, bool)
  if prompts.mask is not None:
    has_mask = jnp.ones(cells, bool) if prompts.has_mask is None else jnp.asarray(prompts.has_mask)
    mask = jnp.where(has_mask[:, None, None], prompts.mask, mask)

  clicked = (labels == 0) | (labels == 1)
  away = jnp.square(start + 1.5 - points[..., None])  # [N, Q, 2, side]
  inside = away[:, :, 0, None, :] + away[:, :, 1, :, None] <= DISC**2
  turn = 2 * (1 + jnp.arange(labels.shape[1])) + labels  # odd: of the object
  top = jnp.max(jnp.where(inside & clicked[..., None, None], turn[..., None, None], 0), axis=1)
  disc = jnp.where(top % 2 == 1, DRAWN_LOGIT, -DRAWN_LOGIT)
  return prompts._replace(
    mask=jnp.where(top > 0, disc, mask), has_mask=has_mask | boxed | jnp.any(clicked, axis=1)
  )


def shown_prompts(prompts: Prompts) -> Array:
  """What `drawn` has drawn, [N, side, side] in [-1, 1]; 0 for cells without any of it."""
  assert prompts.mask is not None and prompts.has_mask is not None
  seen = jnp.clip(prompts.mask / DRAWN_LOGIT, -1, 1)
  return jnp.where(prompts.has_mask[:, None, None], seen, 0.0)


class RandomPositions(nn.Module):
  """The matrix of the random Fourier features of `width` channels, float32 [2, width / 2].

  A buffer in PyTorch (PositionEmbeddingRandom), here among the parameters, so that one tree is the
  whole network; no gradient reaches it, and `nn.sam2.BUFFERS` names it for optimizers.
  """

  width: int

  @nn.compact
  def __call__(self) -> Array:
    init, name = nn.initializers.normal(1.0), "positional_encoding_gaussian_matrix"
    return jax.lax.stop_gradient(self.param(name, init, (2, self.width // 2)))


class PromptEncoder(nn.Module):
  """Prompts to sparse tokens and a dense map."""

  width: int  # channels of tokens and map
  grid: int  # side G of the map; the image has 16 G
  mask_channels: int  # hidden width of the mask's way down
  dtype: DType

  def setup(self):
    token = nn.initializers.normal(1.0)  # torch's Embedding
    self.pe_layer = RandomPositions(self.width)
    names = (f"point_embeddings_{i}" for i in range(4))
    self.point_embeddings = [self.param(name, token, (1, self.width)) for name in names]
    self.not_a_point_embed = self.param("not_a_point_embed", token, (1, self.width))
    self.no_mask_embed = self.param("no_mask_embed", token, (1, self.width))
    self.mask_downscaling_0 = Conv2D(self.mask_channels // 4, 2, stride=2, dtype=self.dtype)
    self.mask_downscaling_1 = layer_norm(1e-6, dtype=self.dtype)
    self.mask_downscaling_3 = Conv2D(self.mask_channels, 2, stride=2, dtype=self.dtype)
    self.mask_downscaling_4 = layer_norm(1e-6, dtype=self.dtype)
    self.mask_downscaling_6 = Conv2D(self.width, 1, dtype=self.dtype)

  def grid_positions(self) -> Array:
    """Positions of the image embedding's cells, [G, G, width]."""
    return random_fourier_grid(self.pe_layer(), self.grid, self.grid).astype(self.dtype)

  def __call__(self, prompts: Prompts) -> tuple[Array, Array, Array]:
    """Returns tokens [N, Q, width], which of them exist bool [N, Q], dense map [N, G, G, width]."""
    points = (prompts.points.astype(jnp.float32) + 0.5) / (16 * self.grid)
    where = random_fourier(points, self.pe_layer())
    where = jnp.where(prompts.labels[..., None] >= 0, where, 0)
    what = jnp.concatenate([self.not_a_point_embed, *self.point_embeddings])
    tokens = where + what[jnp.maximum(prompts.labels, NOT_A_POINT) + 1]
    exists, n = prompts.labels != ABSENT, len(prompts.labels)
    no_mask = self.no_mask_embed.astype(self.dtype)
    dense = jnp.broadcast_to(no_mask, (n, self.grid, self.grid, self.width))
    if prompts.mask is not None:
      has_mask = jnp.ones(n, bool) if prompts.has_mask is None else prompts.has_mask
      has_mask = has_mask[:, None, None, None]
      # Where there is none, the mask may hold anything; zeros keep its gradient finite.
      x = jnp.where(has_mask, prompts.mask[..., None], 0).astype(self.dtype)
      x = gelu(self.mask_downscaling_1(self.mask_downscaling_0(x)))
      x = gelu(self.mask_downscaling_4(self.mask_downscaling_3(x)))
      dense = jnp.where(has_mask, self.mask_downscaling_6(x), dense)
    return tokens.astype(self.dtype), exists, dense
