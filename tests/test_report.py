import json

import matplotlib.image
import numpy as np
import pytest

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import Structure
from rfmedsam2_jax.data.phantom import PhantomConfig, organ_names, phantom_case
from rfmedsam2_jax.report.contact_sheet import SheetCase, save_contact_sheet
from rfmedsam2_jax.report.curves import read_log, save_curves

STRUCTURES = [Structure(name, (value,)) for value, name in enumerate(organ_names(), start=1)]


@pytest.fixture(scope="module")
def phantom():
  return phantom_case(PhantomConfig(field_of_view=(208.0, 200.0, 208.0)), 1)


def coloured(picture: np.ndarray) -> int:
  """Pixels that are not grey."""
  return int((np.ptp(picture[..., :3], axis=-1) > 0.2).sum())


def test_contact_sheet_shows_contours_of_every_stage(tmp_path, phantom):
  image, truth, spacing = phantom
  stages = {"stage 0": np.roll(truth, 3, axis=2), "stage 1": np.zeros_like(truth)}
  sheets = {}
  for name, prediction in stages.items():
    case = SheetCase("a", image, truth, {name: prediction}, spacing)
    path = save_contact_sheet(tmp_path / f"{name}.png", [case], STRUCTURES, slices_per_case=2)
    sheets[name] = matplotlib.image.imread(path)
  # The reference's contours are in both, those of the stage that found nothing are not.
  reference, both = coloured(sheets["stage 1"]), coloured(sheets["stage 0"])
  assert reference > 500 and both > 1.6 * reference
  assert [p.name for p in sorted(tmp_path.iterdir())] == ["stage 0.png", "stage 1.png"]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_contact_sheet_of_any_axis_without_truth_and_without_structures(tmp_path, phantom, axis):
  image, truth, spacing = phantom
  for labels in (truth, np.zeros_like(truth)):
    case = SheetCase("a", image, None, {"stage 0": labels}, spacing, slice_axis=axis)
    path = save_contact_sheet(tmp_path / "sheet.png", [case], STRUCTURES, slices_per_case=1)
    assert matplotlib.image.imread(path).shape[2] in (3, 4)


def test_curves_read_what_the_loop_logs_and_survive_a_torn_line(tmp_path):
  log = tmp_path / "log.jsonl"
  lines = [
    {"phase": phase, "step": step, "time": 1.0, "loss": 2.0 / step, "stage1/mask": 1.0 / step}
    for phase in ("generator", "refiner")
    for step in (10, 20, 30)
  ]
  lines.insert(3, {"phase": "generator", "step": 30, "validation/stage0 Dice": 0.8})
  log.write_text("\n".join(map(json.dumps, lines)) + '\n{"phase": "refi')
  curves = read_log(log)
  assert curves["generator"]["loss"] == [(10, 0.2), (20, 0.1), (30, pytest.approx(2 / 30))]
  assert curves["generator"]["validation/stage0 Dice"] == [(30, 0.8)]
  assert "time" not in curves["refiner"] and "stage1/mask" in curves["refiner"]
  assert save_curves(log, tmp_path / "curves.png").stat().st_size > 5000
  with pytest.raises(UserError, match="nowhere.jsonl: does not exist"):
    save_curves(tmp_path / "nowhere.jsonl", tmp_path / "curves.png")
