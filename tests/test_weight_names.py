"""Official tensors and ours: every one has its place, both ways."""

import dataclasses

import numpy as np
import pytest
import torch_sam2
from flax.traverse_util import flatten_dict
from torch_sam2 import TINY

from rfmedsam2_jax.weights.names import from_official, place, tensor_shapes, to_official

SAM2_0 = dataclasses.replace(TINY, absent_embedding=False)


@pytest.fixture(scope="module", params=[TINY, SAM2_0], ids=["2.1", "2.0"])
def official(request):
  model = torch_sam2.official(request.param)
  return {k: v.numpy() for k, v in model.state_dict().items()}, request.param


def test_every_official_tensor_has_a_place_and_every_parameter_is_filled(official):
  state, config = official
  params = flatten_dict(from_official(state, config))
  assert {path: x.shape for path, x in params.items()} == tensor_shapes(config)
  assert len(params) == len(state)


def test_there_and_back_is_the_same_checkpoint(official):
  state, config = official
  back = to_official(from_official(state, config))
  assert back.keys() == state.keys()
  for name, x in state.items():
    np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_kernels_are_transposed_and_not_reshaped():
  x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
  path, layout = place("memory_encoder.mask_downsampler.encoder.0.weight", 4)
  assert path == ("memory_encoder", "mask_downsampler", "encoder_0", "kernel")
  assert layout.to_ours(x)[3, 4, 2, 1] == x[1, 2, 3, 4]
  path, layout = place("sam_mask_decoder.output_upscaling.0.weight", 4)
  assert layout.to_ours(x)[1, 3, 4, 2] == x[1, 2, 3, 4]


@pytest.mark.parametrize("change, complaint", [
  (lambda s: s.pop("no_mem_embed"), "missing no_mem_embed"),
  (lambda s: s.update({"memory_attention.layers.9.norm1.bias": np.zeros(64)}),
   "left over memory_attention/layers_9/norm1/bias"),
  (lambda s: s.update({"no_obj_ptr": np.zeros((1, 7))}), r"no_obj_ptr is \(7,\) and should be"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(official, change, complaint):
  state, config = official
  state = dict(state)
  change(state)
  with pytest.raises(ValueError, match=complaint):
    from_official(state, config)


def test_a_name_that_sam2_does_not_have_is_refused():
  with pytest.raises(ValueError, match="no tensor of SAM 2"):
    place("backbone.norm.running_mean", 1)
