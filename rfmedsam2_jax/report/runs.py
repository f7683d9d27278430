"""What a run folder tells: its plan, what was trained, its curves and its validation scores."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rfmedsam2_jax.data.files import read_json
from rfmedsam2_jax.data.names import own_name
from rfmedsam2_jax.data.plan import Plan, load_plan
from rfmedsam2_jax.evaluation.scores import Scores, from_dict
from rfmedsam2_jax.report.curves import curves_svg, read_log
from rfmedsam2_jax.report.predictions import noted


class RunSummary(NamedTuple):
  """One run."""

  name: str
  plan: Plan | None  # None if it is missing or damaged
  facts: list[tuple[str, str]]  # lines of a table, name and text
  curves: str  # SVG elements, empty without a log
  validation: list[Scores]  # of every stage, generator first; empty if there are none
  remarks: list[str]  # what is missing, in sentences


def read_run(folder: Path) -> RunSummary:
  """Reads what there is; a file that is missing, as in an unfinished run, becomes a remark."""
  remarks: list[str] = []
  plan, curves = None, ""
  with noted(remarks, folder):
    plan = load_plan(folder / "plan.json")
  facts = [*_of_config(folder, remarks), *(_of_plan(plan) if plan else [])]
  splits = _json(folder / "splits.json", remarks)
  if isinstance(splits, dict):
    facts += [(f"{key} cases", str(len(v))) for key, v in splits.items() if isinstance(v, list)]
  versions = _json(folder / "versions.json", remarks)
  if isinstance(versions, dict):
    facts.append(("made with", ", ".join(f"{k} {v}" for k, v in versions.items())))
  with noted(remarks, folder):
    curves = curves_svg(read_log(folder / "log.jsonl"))
  validation: list[Scores] = []
  content = _json(folder / "validation.json", remarks)
  if content is not None:
    try:
      validation = [from_dict(stage) for stage in content.values()]
    except (KeyError, TypeError, AttributeError, ValueError):
      remarks.append("validation.json: has no scores of stages; train the run to its end")
  return RunSummary(own_name(folder), plan, facts, curves, validation, remarks)


def _json(path: Path, remarks: list[str]) -> Any:
  with noted(remarks, path.parent):
    return read_json(path)


def _of_config(folder: Path, remarks: list[str]) -> list[tuple[str, str]]:
  """What a person asks first; the whole is in config.yaml."""
  try:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    sam2, refinement, refiner = config["sam2"], config["refinement"], config["refiner"]
    alone = refiner.get("mask_adapter", {}).get("loop", {}).get("steps", 0)
    first = f"{alone} steps of the MaskAdapter alone, then " if alone else ""
    held_back = refiner.get("held_back", 0)
    return [
      ("data set", Path(str(config["data"]["dataset"])).name),
      ("generator", f"{config['generator']['loop']['steps']} steps, "
                    f"features {_list(config['generator']['features'])}"),
      ("refiner", f"{first}{refiner['loop']['steps']} steps, images of "
                  f"{sam2['image_size']} pixels, {len(refinement['stages'])} stages"),
      *([("held back from the generator", f"{held_back:.0%} of the cases")] if held_back else []),
      ("started from", refiner.get("init_from") or "random weights"),
      ("seed", str(config["seed"])),
    ]
  except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
    remarks.append("config.yaml: cannot be read; train the run again")
    return []


def _of_plan(plan: Plan) -> list[tuple[str, str]]:
  return [
    ("channels", ", ".join(f"{channel.name} ({channel.kind})" for channel in plan.channels)),
    ("structures", ", ".join(plan.labels.names)),
    ("voxels", f"{_list(plan.spacing, ' x ')} mm, slices first"),
    *([("voxels of the generator", f"{_list(plan.generator_spacing, ' x ')} mm")]
      if plan.generator_spacing else []),
    ("median shape", _list(plan.median_shape, " x ")),
    ("patch", _list(plan.patch_size, " x ")),
    ("slices", ("axial", "coronal", "sagittal")[plan.slice_axis]),
  ]


def _list(values: Any, between: str = ", ") -> str:
  return between.join(f"{value:g}" for value in values)
