"""The quickstart: what its config and its phantoms are for, and what the whole of it shows."""

import json
import math
from pathlib import Path

import pytest

from rfmedsam2_jax.cli import main
from rfmedsam2_jax.cli.quickstart import _agreement
from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.data.phantom import PhantomConfig
from rfmedsam2_jax.evaluation.metrics import Score
from rfmedsam2_jax.evaluation.scores import Scores

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def test_the_demos_stages_see_more_than_its_generator():
  """Where the grid of masks is coarser than the generator's voxels, stages have nothing to add."""
  config, phantoms = load_config(CONFIG), PhantomConfig()
  assert config.plan.spacing and config.plan.generator_spacing
  mask_pixel = max(phantoms.field_of_view[1:]) / (config.sam2.image_size // 4)
  assert min(config.plan.generator_spacing[1:]) > 2 * mask_pixel
  assert math.prod(config.plan.generator_spacing) > 8 * math.prod(config.plan.spacing)
  assert config.refiner.init_from == "builtin"


def test_predicted_iou_is_ranked_against_dice(tmp_path):
  dice = {"a": {"x": 0.9, "y": 0.8, "z": math.nan}, "b": {"x": 0.7, "y": 0.6, "z": 0.1}}
  scores = Scores(("x", "y", "z"), 1.0, {
    case: {name: Score(value, math.nan, math.nan, 0.0, 0.0) for name, value in each.items()}
    for case, each in dice.items()})

  def agreement(predicted):
    for case, each in predicted.items():
      structures = {name: {"predicted_iou": value} for name, value in each.items()}
      (tmp_path / f"{case}.json").write_text(json.dumps({"structures": structures}))
    return _agreement(tmp_path, scores)

  # What was not predicted, or has no score, has no rank.
  first = {"a": {"x": 0.5, "y": 0.4, "z": 0.0}, "b": {"x": 0.3, "y": 0.2, "z": None}}
  assert agreement(first) == pytest.approx(1)
  assert agreement({"a": first["a"], "b": first["b"] | {"z": 0.6}}) == pytest.approx(0)
  assert agreement({case: dict.fromkeys("xyz", 0.5) for case in "ab"}) is None


@pytest.mark.full
def test_the_demos_stages_mend_what_its_generator_missed(tmp_path):
  out = tmp_path / "demo"
  assert main(["quickstart", "--out", str(out)]) == 0
  first, last = (json.loads((out / "predictions" / where / "scores.json").read_text("utf-8"))
                 for where in ("stage0", "."))
  assert last["mean"]["dice"] - first["mean"]["dice"] >= 0.03
  for name, score in last["structures"].items():
    assert score["dice"] >= first["structures"][name]["dice"], name
