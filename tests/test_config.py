"""The config: strict, readable, and every file in configs/ valid."""

import dataclasses
from pathlib import Path

import pytest

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.config import Config, config_yaml, load_config
from rfmedsam2_jax.nn import PRESETS

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_and_survives_being_written(path, tmp_path):
  config = load_config(path)
  copy = tmp_path / "copy.yaml"
  copy.write_text(config_yaml(config))
  assert load_config(copy) == config


def test_the_longer_hippocampus_config_differs_in_loops_alone():
  def without_loops(tree):
    return {k: without_loops(v) if isinstance(v, dict) else v for k, v in tree.items()
            if k != "loop"}

  short, long = (dataclasses.asdict(load_config(CONFIGS / f"{name}.yaml"))
                 for name in ("hippocampus", "hippocampus-90"))
  assert short != long
  assert without_loops(short) == without_loops(long)


def test_presets_and_overrides_are_applied(tmp_path):
  path = tmp_path / "c.yaml"
  path.write_text("sam2: {preset: sam2.1_hiera_tiny, adapters: {width: 8}}\nseed: 3\n")
  config = load_config(path, ["sam2.image_size=512", "generator.loop.steps=7"])
  expected = dataclasses.replace(
    PRESETS["sam2.1_hiera_tiny"],
    image_size=512,
    adapters=dataclasses.replace(PRESETS["sam2.1_hiera_tiny"].adapters, width=8),
  )
  assert config.sam2 == expected
  assert config.generator.loop.steps == 7 and config.seed == 3
  assert config.generator.loop.log_every == Config().generator.loop.log_every


@pytest.mark.parametrize(
  "text, says",
  [
    ("generator: {lop: {}}", "unknown key generator.lop; the nearest known one is generator.loop"),
    ("sam2: {preset: nano, image_sise: 64}", "the nearest known one is sam2.image_size"),
    ("refinement: {stages: [{raech: 2}]}", "refinement.stages.0.raech"),
    ("generator: {batch_size: two}", "generator.batch_size"),
    ("sam2: {preset: huge}", "'huge' is not one of"),
    ("refinement: {stages: [{pointers: true}]}", "no stage before it"),
    ("sam2: {preset: nano, image_size: 100}", "divisible by 32"),
    ("generator: [", "is not YAML"),
    ("just words", "holds no keys"),
  ],
)
def test_a_wrong_config_says_what_and_where(tmp_path, text, says):
  path = tmp_path / "wrong.yaml"
  path.write_text(text)
  with pytest.raises(UserError) as error:
    load_config(path)
  assert says in str(error.value) and str(path) in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("override", ["seed", "=3", "seed.x=3", "generator.lop=1"])
def test_a_wrong_override_says_so(override):
  with pytest.raises(UserError):
    load_config(CONFIGS / "quickstart.yaml", [override])
