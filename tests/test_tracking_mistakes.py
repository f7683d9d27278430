"""The comparison with the official predictor notices mistakes: each of these makes it fail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tracking_parity import SCENARIOS, Pair, assert_the_same_volume, scaled

from rfmedsam2_jax.nn import SAM2, mask_decoder, memory_attention, prompt_encoder
from rfmedsam2_jax.nn import memory_bank as memory
from rfmedsam2_jax.nn import sam2 as sam2_module
from rfmedsam2_jax.tracking import TrackingConfig, VolumeTracker, conditioning, recurrence, tracker

POINTS, VANISH = "points, points with boxes, and a mask", "objects that vanish and return"
MANY = "several slices each"


@functools.cache
def reference(scenario):
  return Pair("small", scenario)


def again(found: Pair, scenario, **options):
  """Our side of a pair once more, as the code is now."""
  for cached in (tracker._encode, tracker._sweep, conditioning._decode_prompted,
                 conditioning._take_masks):
    cached.clear_cache()
  depth, _, (prompts,) = SCENARIOS[scenario]
  ours = VolumeTracker(
    SAM2(found.config), found.params, TrackingConfig(cache="float32", **options),
    lambda z: found.slices[z], depth,
  )
  changed = object.__new__(Pair)
  changed.ours = ours.track([scaled(p, found.config.image_size) for p in prompts])
  changed.theirs, changed.varied = found.theirs, found.varied
  return changed


def wrong_gelu(patch):
  tanh = functools.partial(jax.nn.gelu, approximate=True)
  patch.setattr(prompt_encoder, "gelu", tanh)
  patch.setattr(mask_decoder, "gelu", tanh)


def padding_token_left_out(patch):
  def without(given, masks=None, has_mask=None):
    prompts = original(given, masks, has_mask)
    return prompts._replace(labels=jnp.where(prompts.labels == -1, -2, prompts.labels))

  original = conditioning.point_prompts
  patch.setattr(conditioning, "point_prompts", without)


def one_token_instead_of_two(patch):
  def one(n):
    return original(n)._replace(labels=jnp.tile(jnp.array([-1, -2]), (n, 1)))

  original = recurrence.no_prompts
  patch.setattr(recurrence, "no_prompts", one)


def change_slots(patch, change):
  original = memory.read
  patch.setattr(memory, "read", lambda *a, **k: change(original(*a, **k)))


def wrong_temporal_row(patch):
  change_slots(
    patch, lambda s: s._replace(rows=jnp.where(s.rows < 6, jnp.minimum(s.rows + 1, 5), 6))
  )


def conditioning_row_by_distance(patch):
  change_slots(patch, lambda s: s._replace(rows=jnp.minimum(s.rows, 5)))


def pointer_positions_from_one(patch):
  change_slots(patch, lambda s: s._replace(pointer_positions=s.pointer_positions + 1 / 15))


def no_pointers(patch):
  change_slots(patch, lambda s: s._replace(pointer_valid=jnp.zeros_like(s.pointer_valid)))


def padded_depth(patch):
  original = memory.pointer_positions
  patch.setattr(memory, "pointer_positions", lambda offsets, depth: original(offsets, 12))


def memories_not_binarised(patch):
  original = recurrence.remember_cells
  patch.setattr(recurrence, "remember_cells", lambda *a, binarize=False: original(*a))


def reverse_without_forward_memories(patch):
  def forget(bank, where, maps, pointers, slices, start, reverse):
    # Nothing is early enough for the reverse half.
    return original(bank, where, maps, pointers, slices, start - 10_000, reverse)

  original = memory.add_recent
  patch.setattr(memory, "add_recent", forget)


def memory_of_ungated_masks(patch):
  patch.setattr(recurrence, "gated_logits", lambda logits, presence: logits)


def absent_embedding_left_out(patch):
  original = recurrence.apply

  def everyone_present(config, params, embedding, *rest, method, **options):
    if method == "remember":
      rest = rest[0], jnp.ones_like(rest[1])
    return original(config, params, embedding, *rest, method=method, **options)

  patch.setattr(recurrence, "apply", everyone_present)


def keys_without_rope(patch):
  def only_queries(x, rope):
    return original(x, rope) if x.shape[1] == 256 else x

  original = memory_attention.apply_rope
  patch.setattr(memory_attention, "apply_rope", only_queries)


def no_memory_embedding_for_given_masks(patch):
  original = recurrence.cells_of_masks

  def conditioned(model, params, features, masks):
    embedding = features.embedding + params["no_mem_embed"]
    return original(model, params, features._replace(embedding=embedding), masks)

  patch.setattr(recurrence, "cells_of_masks", conditioned)


def pointer_not_replaced_where_absent(patch):
  def keep(self, decoded):
    present = decoded.presence > 0
    masks = jnp.where(present[:, None, None, None], decoded.masks, sam2_module.ABSENT_LOGIT)
    return decoded._replace(masks=masks)

  patch.setattr(SAM2, "gate", keep)


MISTAKES = [
  (wrong_gelu, MANY, {}),
  (padding_token_left_out, MANY, {}),
  (one_token_instead_of_two, MANY, {}),
  (wrong_temporal_row, MANY, {}),
  (conditioning_row_by_distance, MANY, {}),
  (pointer_positions_from_one, MANY, {}),
  (no_pointers, MANY, {}),
  (padded_depth, "ten slices in batches of four", {}),
  (memories_not_binarised, MANY, {}),
  (reverse_without_forward_memories, POINTS, {}),
  (memory_of_ungated_masks, VANISH, {}),
  (absent_embedding_left_out, VANISH, {}),
  (pointer_not_replaced_where_absent, VANISH, {}),
  (keys_without_rope, MANY, {}),
  (no_memory_embedding_for_given_masks, POINTS, {}),
  (None, MANY, {"multimask": False}),
  (None, MANY, {"dynamic_multimask": False}),
  (None, MANY, {"memory_dtype": "float32"}),
]


def named(mistake, options):
  return mistake.__name__ if mistake else "without " + " ".join(options)


@pytest.mark.full
@pytest.mark.parametrize(
  "mistake, scenario, options", MISTAKES, ids=[named(m, o) for m, _, o in MISTAKES]
)
def test_a_mistake_is_noticed(monkeypatch, mistake, scenario, options):
  found = reference(scenario)
  if mistake:
    mistake(monkeypatch)
  changed = again(found, scenario, **options)
  with pytest.raises(AssertionError):
    assert_the_same_volume(changed)


@pytest.mark.full
def test_without_a_mistake_nothing_is_noticed():
  assert_the_same_volume(again(reference(MANY), MANY))
  assert np.isfinite(reference(MANY).ours.cells.logits).all()
