"""The MaskAdapter in the stages: over a grid, over a volume, alone and in a stream."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_refinement import CONFIG, DEPTH, NEAR, PRESENT, on_grid, run_volume, start_cells
from small_sam2 import MASK_SIDE, SMALL, drawn, images, relative

from rfmedsam2_jax.base.constants import IMAGE_MEAN, IMAGE_STD
from rfmedsam2_jax.nn import SAM2, AdapterConfig
from rfmedsam2_jax.nn.adapters import MaskAdapter
from rfmedsam2_jax.refinement import stages as stages_lib
from rfmedsam2_jax.training.state import silenced_decoder

CORRECTED = SAM2(dataclasses.replace(SMALL, adapters=AdapterConfig(False, False, mask=True)))


def without_mask_adapter(params):
  decoder = {name: x for name, x in params["sam_mask_decoder"].items() if name != "adapter"}
  return params | {"sam_mask_decoder": decoder}


def corrected_features(params):
  return jax.jit(lambda x: stages_lib.encode_slices(CORRECTED, params, x))(images(DEPTH))


def test_a_mask_adapter_adds_what_it_makes_of_the_masks_of_the_slices_around():
  """Nearby masks by a plain loop; absent organs are -8, slices beyond the volume 0."""
  params = drawn(CORRECTED.config)
  without = without_mask_adapter(params)
  config, cells = dataclasses.replace(CONFIG, stages=(NEAR,)), start_cells()
  features = corrected_features(params)
  with_it, _ = on_grid(params, config, cells, model=CORRECTED, features=features)[0]
  plain, _ = on_grid(without, config, cells)[0]
  nearby = np.zeros((2, DEPTH, 5, MASK_SIDE, MASK_SIDE), np.float32)
  for k, z, r in np.ndindex(2, DEPTH, 5):
    there = z + r - 2
    if 0 <= there < DEPTH:
      shown = cells.logits[k * DEPTH + there].clip(-8, 8) if PRESENT[k, there] else -8.0
      nearby[k, z, r] = shown
  pixels = (images(DEPTH) - IMAGE_MEAN) / IMAGE_STD
  pixels = pixels.reshape(DEPTH, MASK_SIDE, 4, MASK_SIDE, 4, 3).mean((2, 4))
  pixels = np.tile(pixels, (2, 1, 1, 1)).astype(np.float32)
  nearby = nearby.reshape(-1, *nearby.shape[2:])
  trained = {"params": params["sam_mask_decoder"]["adapter"]}
  expected = MaskAdapter().apply(trained, pixels, nearby)
  assert np.abs(expected).max() > 0.1
  assert relative(with_it.logits - plain.logits, expected) < 1e-4  # a difference of larger numbers
  # Two programs, whose float32 rounds otherwise.
  np.testing.assert_allclose(with_it.presence, plain.presence, rtol=1e-6)
  fresh = MaskAdapter().init(jax.random.key(0), pixels, nearby)
  assert not MaskAdapter().apply(fresh, pixels, nearby).any()


@pytest.mark.parametrize("memory", ["neighbours", "none"])
def test_a_volume_with_a_mask_adapter_equals_the_grid(memory):
  params = drawn(CORRECTED.config)
  config = dataclasses.replace(CONFIG, stages=(dataclasses.replace(NEAR, memory=memory),) * 2)
  found = run_volume(params, config, model=CORRECTED)
  features = corrected_features(params)
  expected = on_grid(params, config, start_cells(), model=CORRECTED, features=features)
  for number, (result, (outputs, live)) in enumerate(zip(found, expected, strict=True)):
    now = np.asarray(live).reshape(PRESENT.shape)[tuple(result.cells.T)]
    index = result.cells[now] @ [DEPTH, 1]
    shown = np.asarray(outputs.presence)[index] > 0
    # Masks between stages are kept as float16.
    ours, theirs = result.logits[now][shown], np.asarray(outputs.logits)[index][shown]
    assert relative(ours, theirs) < (5e-3 if number else 1e-3)


def test_a_mask_adapter_alone_corrects_as_beside_a_decoder_that_is_silent():
  params = silenced_decoder(drawn(CORRECTED.config))
  stages = tuple(dataclasses.replace(s, residual=True) for s in CONFIG.stages)
  config, cells = dataclasses.replace(CONFIG, stages=stages), start_cells()
  arguments = (cells, np.ones((1, DEPTH), bool), np.array([DEPTH]))
  alone = jax.jit(functools.partial(stages_lib.masks_on_grid, CORRECTED, params, config))
  features = corrected_features(params)
  beside = on_grid(params, config, cells, model=CORRECTED, features=features)
  for (ours, live), (theirs, lives) in zip(
    alone(images(DEPTH), *arguments), beside, strict=True
  ):
    np.testing.assert_array_equal(live, lives)
    np.testing.assert_array_equal(ours.presence, theirs.presence)
    assert relative(ours.logits[live], theirs.logits[live]) < 1e-5


@pytest.mark.slow
def test_a_stream_hears_its_mask_adapter():
  """Trained as `neighbours`, it adds the same to its masks."""
  params = drawn(CORRECTED.config)
  config = dataclasses.replace(CONFIG, stages=(dataclasses.replace(NEAR, memory="stream"),) * 2)
  found = run_volume(params, config, model=CORRECTED)
  plain = run_volume(without_mask_adapter(params), config)
  assert relative(found[0].logits, plain[0].logits) > 1e-2
