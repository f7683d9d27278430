"""The eight official configurations are recognised from the official classes' own tensors."""

import dataclasses

import pytest
import torch_sam2
from torch_sam2 import torch

from convert.recognise import OFFICIAL, recognise
from convert.report import MEMORY, match
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.nn import PRESETS
from rfmedsam2_jax.weights.names import official_shapes

LETTERS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}


def official_yaml_shapes(name, monkeypatch):
  """Names and shapes of the model that the official YAML file builds."""
  import hydra
  from omegaconf import OmegaConf

  # Drawing 224 M weights takes longer than the rest; only shapes count.
  monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, *_, **__: x)
  monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda x, *_, **__: x)
  version, size = name.split("_hiera_")
  config = hydra.compose(f"configs/{version}/{version}_hiera_{LETTERS[size]}.yaml")
  OmegaConf.resolve(config)
  model = hydra.utils.instantiate(config.model, _recursive_=True)
  return {name: tuple(x.shape) for name, x in model.state_dict().items()}


def test_eight_are_official():
  assert len(OFFICIAL) == 8


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_configuration_is_recognised(name, monkeypatch):
  shapes = official_yaml_shapes(name, monkeypatch)
  assert recognise(shapes, "x.pt") == name
  result = match(shapes, official_shapes(PRESETS[name]))
  assert len(result.matched) == len(shapes) and not result.refused(())


def test_2_0_and_2_1_are_told_apart_by_any_of_the_new_tensors():
  shapes = official_shapes(PRESETS["sam2.1_hiera_small"])
  del shapes["no_obj_embed_spatial"]
  assert recognise(shapes, "x.pt") == "sam2.1_hiera_small"
  del shapes["obj_ptr_tpos_proj.weight"]
  assert recognise(shapes, "x.pt") == "sam2_hiera_small"


def test_the_image_half_alone_says_that_it_cannot_be_told():
  shapes = official_shapes(PRESETS["sam2.1_hiera_large"])
  result = match({}, shapes)
  image_half = {name: x for name, x in shapes.items() if name in result.refused(("memory",))}
  with pytest.raises(UserError, match="config sam2.1_hiera_large or sam2_hiera_large"):
    recognise(image_half, "x.pt")
  assert len(MEMORY) and not any(name.startswith("memory") for name in image_half)


def test_the_builder_makes_the_official_model():
  """Of the tests' own network, and as convert --verify builds it."""
  config = dataclasses.replace(torch_sam2.TINY, image_size=256)
  shapes = {n: tuple(x.shape) for n, x in torch_sam2.build(config).state_dict().items()}
  assert shapes == official_shapes(config)
