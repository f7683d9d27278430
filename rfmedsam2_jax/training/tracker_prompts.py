"""Prompts that the tracker is trained with: pure functions of the truth and of keys.

Where a track sets out, which of its slices are prompted and how, and clicks where a mask is wrong.
Shapes are static, what is absent is a mask. Follows training/model/sam2.py of sam2 1.1.0
(`prepare_prompt_inputs`), but for what is drawn for a whole batch there and for every track here:
direction, kind of the prompt, second slice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rfmedsam2_jax.config.tracker import TrackerConfig
from rfmedsam2_jax.nn.boxes import jittered
from rfmedsam2_jax.nn.layers import Array
from rfmedsam2_jax.nn.prompt_encoder import ABSENT
from rfmedsam2_jax.refinement.prompts import scaled_boxes

PROMPTED = 2  # slices that come first in a track's order, where they are prompted

_BOX_NOISE = 0.1  # share of the size (sam2_utils.py:155)
_FROM_TRUTH = 0.1  # share of clicks anywhere in the object (prob_to_sample_from_gt_for_train)


class Plan(NamedTuple):
  """How N tracks are prompted and followed through L slices; step 0 is each track's first slice.

  slices: int32 [N, L], in the order in which they are run: prompted ones first.
  places: int32 [N, L], of these slices on the way: 0 where it begins, whatever the direction.
  prompted: bool [N, L], steps whose slice has a first prompt: one or two, or all with the object.
  corrected: bool [N, L], steps whose slice gets clicks; it is then remembered as a prompted one.
  takes_mask: bool [N], the first prompts are masks, of the first two steps at most.
  boxes: float32 [N, L, 4]. has_box: bool [N, L].
  points: float32 [N, L, 2]. labels: int32 [N, L], ABSENT where there is none.
  used: bool [N], tracks that there are.
  """

  slices: Array
  places: Array
  prompted: Array
  corrected: Array
  takes_mask: Array
  boxes: Array
  has_box: Array
  points: Array
  labels: Array
  used: Array


def draw_plan(truth: Array, has: Array, keys: Array, shared: Array, config: TrackerConfig) -> Plan:
  """Draws how N tracks are prompted.

  Args:
    truth: bool [N, L, S, S]. has: bool [N], tracks that there are.
    keys: [N], one for each track. shared: one for all, of the steps with corrections: most steps
      have none, and are then cheap.
  """
  count, length = truth.shape[:2]
  present = jnp.any(truth, axis=(2, 3))
  of_way, of_second, of_kind, of_box, of_point, of_every = (
    jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys) for i in range(6)
  )
  uniform = jax.vmap(jax.random.uniform)
  # A way begins where the object is; where both ends have it, either will do.
  forward, backward = present[:, 0], present[:, -1]
  reverse = jnp.where(forward & backward, uniform(of_way) < 0.5, backward)
  along = jnp.arange(length, dtype=jnp.int32)
  ways = jnp.where(reverse[:, None], length - 1 - along, along)
  seen = jnp.take_along_axis(present, ways, axis=1)

  two, further, later = jax.random.split(shared, 3)
  two = jax.random.bernoulli(two)
  drawn = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(of_second)
  drawn = jnp.where(seen & (along > 0), drawn, -1.0)
  second = jnp.where(two & (jnp.max(drawn, axis=1) >= 0), jnp.argmax(drawn, axis=1), 0)[:, None]
  places = jnp.where(along == second, -1, along).at[:, 0].set(-2)
  places = jnp.argsort(places, axis=1).astype(jnp.int32)
  slices = jnp.take_along_axis(ways, places, axis=1)
  every = uniform(of_every) < config.every
  prompted = (along == 0) | ((along == 1) & (second > 0))
  prompted |= every[:, None] & jnp.take_along_axis(present, slices, axis=1)

  kind = uniform(of_kind)
  kind = jnp.where(every, kind * (config.box + config.point), kind)  # no masks
  takes_mask = kind >= config.box + config.point
  # With one prompted slice, half of the time one more gets clicks (num_frames_to_correct).
  at = jnp.where(jax.random.bernoulli(further), jax.random.randint(later, (), 1, max(length, 2)), 0)
  corrected = (along == 0) | (along == jnp.where(two, 1, at))
  # A given mask is the output, and there is nothing to correct.
  corrected = jnp.broadcast_to(corrected, (count, length)) & ~takes_mask[:, None]

  shown = jnp.take_along_axis(truth, slices[..., None, None], axis=1)
  of_slice = jax.vmap(lambda key: jax.random.split(key, length))
  boxes = _noisy_boxes(shown, of_slice(of_box))
  points, labels = clicks(shown.reshape(-1, *shown.shape[2:]), None, of_slice(of_point).reshape(-1))
  boxed = (kind < config.box)[:, None]
  has_point = prompted & ~boxed & ~takes_mask[:, None]
  return Plan(
    slices, places, prompted, corrected, takes_mask, boxes, prompted & boxed,
    points.reshape(count, length, 2), jnp.where(has_point, labels.reshape(count, length), ABSENT),
    has & (forward | backward),
  )


def _noisy_boxes(masks: Array, keys: Array) -> Array:
  """Boxes [..., 4] of masks bool [..., S, S], each edge moved by up to a tenth of the box's size
  (sam2_utils.sample_box_points). keys: [...]."""
  side = masks.shape[-1]
  boxes, _ = scaled_boxes(masks, side, 0.0)
  draw = lambda key: jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0)  # noqa: E731
  noise = jax.vmap(draw)(keys.reshape(-1)).reshape(boxes.shape)
  return jittered(boxes, noise, _BOX_NOISE, side)


def corrections(truth: Array, found: Array, keys: Array) -> tuple[Array, Array]:
  """`clicks` that correct masks; one in ten is anywhere in the object, right or wrong."""
  keys = jax.vmap(jax.random.split)(keys)
  from_truth = jax.vmap(jax.random.uniform)(keys[:, 0]) < _FROM_TRUTH
  return clicks(truth, found & ~from_truth[:, None, None], keys[:, 1])


def clicks(truth: Array, found: Array | None, keys: Array) -> tuple[Array, Array]:
  """A click on each of N masks, uniformly where it is wrong: float32 [N, 2], x y, and int32 [N].

  The label is 1 where the object was missed, 0 where it is not. A mask without a mistake gets a
  click on the background (sam2_utils.sample_random_points_from_errors).

  Args:
    truth, found: bool [N, S, S]; None: nothing was found yet. keys: [N].
  """
  wrong = truth if found is None else truth != found
  right = ~jnp.any(wrong, axis=(1, 2))
  region = jnp.where(right[:, None, None], ~truth, wrong)
  rows = jnp.cumsum(jnp.sum(region, axis=2, dtype=jnp.int32), axis=1)
  count = rows[:, -1]
  drawn = jax.vmap(jax.random.uniform)(keys) * count
  # Pixel number `which` of the region, row after row.
  which = jnp.minimum(drawn.astype(jnp.int32), count - 1)[:, None]
  y = jnp.argmax(rows > which, axis=1)[:, None]
  before = jnp.where(y > 0, jnp.take_along_axis(rows, jnp.maximum(y - 1, 0), axis=1), 0)
  row = jnp.take_along_axis(region, y[..., None], axis=1)[:, 0]
  x = jnp.argmax(jnp.cumsum(row, axis=1, dtype=jnp.int32) > which - before, axis=1)[:, None]
  of_row = jnp.take_along_axis(truth, y[..., None], axis=1)[:, 0]
  label = jnp.take_along_axis(of_row, x, axis=1)[:, 0]
  return jnp.concatenate([x, y], axis=1).astype(jnp.float32), label.astype(jnp.int32)
