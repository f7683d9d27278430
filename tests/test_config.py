"""The config: strict, readable, every file in configs/ valid, and files of former versions read."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.config import Config, config_tree, config_yaml, load_config, parse_config
from rfmedsam2_jax.config.retired import RETIRED
from rfmedsam2_jax.nn import PRESETS
from rfmedsam2_jax.nn.sam2 import FIXED
from rfmedsam2_jax.refinement.config import PRESETS as REFINEMENTS
from rfmedsam2_jax.refinement.config import StageConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
OLD_RUN = ROOT / "docs" / "hippocampus" / "config.yaml"  # all values of a run of a former version
GONE = {*RETIRED, *(f"sam2.{name}" for name in FIXED), "data.loader.prefetch"}
QUICKSTART = CONFIGS / "quickstart.yaml"


@pytest.mark.parametrize(
  "path", [*sorted(CONFIGS.glob("*.yaml")), OLD_RUN], ids=lambda path: path.stem)
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
  config = load_config(path, ["sam2.image_size=512", "sam2.mem_dim=32", "generator.loop.steps=7"])
  expected = dataclasses.replace(
    PRESETS["sam2.1_hiera_tiny"],
    image_size=512,
    mem_dim=32,
    adapters=dataclasses.replace(PRESETS["sam2.1_hiera_tiny"].adapters, width=8),
  )
  assert config.sam2 == expected
  assert config.generator.loop.steps == 7 and config.seed == 3
  assert config.generator.loop.log_every == Config().generator.loop.log_every


@pytest.mark.parametrize("name, preset", PRESETS.items())
def test_a_preset_is_its_network(name, preset):
  assert parse_config({"sam2": {"preset": name}}).sam2 == preset


def test_a_stage_of_a_config_with_a_preset_can_be_overridden():
  path, override = CONFIGS / "hippocampus.yaml", "refinement.stages.1.memory=none"
  before, after = load_config(path).refinement, load_config(path, [override]).refinement
  second = dataclasses.replace(before.stages[1], memory="none")
  assert after == dataclasses.replace(before, stages=(before.stages[0], second))


def test_a_refinement_preset_fills_what_is_not_given_in_every_stage():
  assert parse_config({"refinement": {"preset": "masks"}}).refinement == REFINEMENTS["masks"]
  found = parse_config({"refinement": {"preset": "corrections"}}).refinement
  assert found == REFINEMENTS["corrections"]
  assert [(s.residual, s.residual_limit) for s in found.stages] == [(True, 3.0)] * 2
  stages = [{"memory": "none"}, {"residual_limit": 5}]
  changed = parse_config(
    {"refinement": {"preset": "corrections", "generator_weight": 0.1, "stages": stages}}).refinement
  assert changed == dataclasses.replace(found, generator_weight=0.1, stages=(
    StageConfig(memory="none", residual=True, residual_limit=3.0),
    StageConfig(residual=True, residual_limit=5.0)))


@pytest.mark.parametrize(
  "text, says",
  [
    ("generator: {lop: {}}", "unknown key generator.lop; the nearest known one is generator.loop"),
    ("sam2: {preset: nano, image_sise: 64}", "the nearest known one is sam2.image_size"),
    ("sam2: {preset: nano, adapters: {widht: 8}}", "the nearest known one is sam2.adapters.width"),
    ("refinement: {stages: [{raech: 2}]}", "refinement.stages.0.raech; the nearest known one is "
                                           "refinement.stages.0.reach"),
    ("sede: 1\ngenerator: {batch_size: two}", "unknown key sede; the nearest known one is seed"),
    ("7: 1", "unknown key 7"),
    ("generator: {batch_size: two}", "generator.batch_size: is 'two'"),
    ("sam2: {preset: huge}", "'huge' is not one of"),
    ("sam2: {preset: [nano]}", "sam2.preset: ['nano'] is not one of"),
    ("refinement: {preset: huge}", "'huge' is not one of masks, corrections"),
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


@pytest.mark.parametrize("override", [
  "generator.augmentation.flips=[7]", "refiner.augmentation.flips=[-1]",
  "generator.augmentation.rotation_probability=7", "refiner.augmentation.scaling=[0,1]",
  "refiner.augmentation.scaling=[1.4,0.7]", "refiner.augmentation.intensity=-1",
  "refiner.corruption.shift=-2", "refiner.corruption.morphology=-1", "refiner.corruption.noise=-1",
  "refiner.loss.focal_alpha=9", "refiner.loss.dice=-1", "generator.loss.dice=-1",
  "refiner.loss.focal=.inf", "refiner.loss.focal_gamma=.nan", "generator.features=[]",
  "generator.features=[8,0]", "generator.mirrored=[3]", "refiner.trainable=[]",
  "refiner.held_back=1.5", "refiner.mask_adapter.loop.steps=-1",
  "refiner.mask_adapter.optimizer.clip_norm=0", "refiner.optimizer.learning_rate=-1",
  "generator.optimizer.ema_decay=1.1", "generator.loop.log_every=0", "plan.spacing=[0,1,1]",
  "plan.patch_size=[0,8,8]", "plan.poolings=-1", "data.split.fraction=1",
  "data.split.fraction=.nan", "data.split.folds=1", "data.split.train_cases=0",
  "data.split.group='('",
  "data.sam_channels=[-1]", "data.loader.workers=-1", "inference.overlap=1",
  "inference.mirror_axes=[3]", "inference.batch_size=0", "refinement.cells_per_batch=0",
  "refinement.live_margin=-1", "refinement.generator_weight=2", "sam2.adapters.mask_width=0",
  "sam2.dtype=float16", "mesh.cpu_devices=0", "mesh.data=.inf",
])
def test_a_value_out_of_range_is_refused_in_one_line_that_names_it(override):
  key, _, value = override.partition("=")
  with pytest.raises(UserError) as error:
    load_config(QUICKSTART, [override])
  line = str(error.value)
  assert line.startswith(f"{QUICKSTART}: {key}") and "\n" not in line
  assert "correct the value" in line or "leave it out" in line


def test_nan_and_infinity_are_refused_wherever_a_number_may_stand():
  whole = config_tree(parse_config({"plan": {
    "spacing": [1, 1, 1], "channels": [{"name": "ct", "kind": "ct"}]}}))
  found = set()

  def with_bad(tree, where):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
      path = f"{where}{key}"
      if isinstance(value, dict | list | tuple):
        for name, changed in with_bad(value, f"{path}."):
          yield name, _with(tree, key, changed)
      elif isinstance(value, float):
        for bad in (float("nan"), float("inf")):
          yield path, _with(tree, key, bad)

  for path, tree in with_bad(whole, ""):
    found.add(path)
    with pytest.raises(UserError):
      parse_config(tree)
  assert {"plan.spacing.0", "plan.channels.0.mean", "generator.optimizer.ema_decay"} <= found


def _with(tree, key, value):
  if isinstance(tree, dict):
    return tree | {key: value}
  return [value if index == key else item for index, item in enumerate(tree)]


@pytest.mark.parametrize("override", ["seed", "=3", "seed.x=3", "generator.lop=1"])
def test_a_wrong_override_says_so(override):
  with pytest.raises(UserError):
    load_config(QUICKSTART, [override])


def test_the_file_of_an_old_run_is_what_it_was():
  values = yaml.safe_load(OLD_RUN.read_text())
  assert values["refiner"]["augmentation"]["noise"] == 0.1  # what is a constant now
  config = load_config(OLD_RUN)
  assert config.refiner.augmentation.noise == 0.1
  again = config_tree(config)

  def kept(old, new, where):
    for key, value in old.items():
      path = f"{where}{key}"
      if isinstance(value, dict):
        kept(value, new.get(key, {}), f"{path}.")
      elif path not in GONE and path != "refinement.stages":
        assert new[key] == (tuple(value) if isinstance(value, list) else value), path
  kept(values, again, "")


def changed(constant):
  """Another value of the same kind."""
  if isinstance(constant, tuple):
    return [constant[0], 2 * constant[1]]
  if isinstance(constant, str):
    return f"not {constant}"
  return not constant if isinstance(constant, bool) else constant + 1


def tree_of(path, value):
  for key in reversed(path.split(".")):
    value = [{}, value] if key == "*" else {key: value}
  return value


@pytest.mark.parametrize("path, constant", RETIRED.items())
def test_a_retired_option_is_passed_over_or_refused_by_name(path, constant):
  tree = tree_of(path, constant)
  assert parse_config(tree) == parse_config(tree_of("refinement.stages.*", {}) if "*" in path
                                            else {})
  with pytest.raises(UserError) as error:
    parse_config(tree_of(path, changed(constant)), "c.yaml")
  line = str(error.value)
  assert line.startswith(f"c.yaml: {path.replace('*', '1')}: is ") and "\n" not in line
  shown = list(constant) if isinstance(constant, tuple) else constant
  assert line.endswith(f"but is no option any more and always {shown}; leave it out")


def test_what_a_trained_run_was_trained_with_does_not_keep_it_from_predicting(tmp_path):
  path = tmp_path / "config.yaml"
  path.write_text("refiner: {augmentation: {noise: 3, flips: [1]}}\n")
  assert load_config(path, trained=True).refiner.augmentation.flips == (1,)
  path.write_text("refinement: {box_margin: 9}\n")
  with pytest.raises(UserError, match="refinement.box_margin: is 9"):
    load_config(path, trained=True)


@pytest.mark.parametrize("values, says", [
  ({"trunk_heads": 2, "num_maskmem": 7, "decoder_mlp": 2048, "prompt_mask_channels": 16,
    "pointer_positions": True, "adapters": {"mask_reach": 2}}, None),
  ({"trunk_heads": 3}, "sam2: trunk_heads is 3, but is no option any more and always 2"),
  ({"absent_embedding": False, "pointer_positions": True}, "pointer_positions is True"),
  ({"adapters": {"mask_reach": 1}}, "sam2.adapters.mask_reach: is 1"),
])
def test_sizes_that_follow_from_others_are_passed_over_or_refused(values, says):
  tree = {"sam2": {"preset": "sam2.1_hiera_base_plus"} | values}
  if says is None:
    assert parse_config(tree).sam2 == PRESETS["sam2.1_hiera_base_plus"]
  else:
    with pytest.raises(UserError, match=says):
      parse_config(tree)


def leaves(value):
  """Options: a stage's once, other tuples as one, all that a dict holds."""
  if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
    value = value[0]
  if isinstance(value, dict):
    return sum(map(leaves, value.values()))
  if not dataclasses.is_dataclass(value):
    return 1
  return sum(leaves(getattr(value, field.name)) for field in dataclasses.fields(value))


def test_there_are_no_more_options_than_a_person_can_survey():
  assert leaves(Config()) <= 168


def test_reading_a_config_needs_nothing_that_only_training_needs():
  heavy = ("grain", "optax", "tensorboardX", "matplotlib")
  code = f"import sys, rfmedsam2_jax.config; print([m for m in {heavy} if m in sys.modules])"
  found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert found.stdout.strip() == "[]"
