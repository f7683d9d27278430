"""Scores of a segmenter on held-out cases, while it is trained and in the end.

Every process scores its share of the cases; all have the result.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rfmedsam2_jax.base.progress import Progress, Report, silent
from rfmedsam2_jax.data.datasets import IGNORED, Case, read_case
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.data.volumes import Volume
from rfmedsam2_jax.evaluation.metrics import Score, mean_score
from rfmedsam2_jax.evaluation.scores import Scores, as_dict, evaluate_arrays
from rfmedsam2_jax.parallel import hosts
from rfmedsam2_jax.report.contact_sheet import SheetCase
from rfmedsam2_jax.segmentation.segmenter import Segmenter, label_maps, segment_volume


def score_stages(
  segmenter: Segmenter, cases: Sequence[Case], report: Report, tolerance: float | None = None
) -> tuple[list[Scores], SheetCase | None]:
  """Scores of every stage, and the first of this process's cases to be looked at.

  Without a `tolerance` (mm) there is no surface Dice and no HD95: training needs Dice only.
  """
  labels = segmenter.plan.labels
  shown: SheetCase | None = None
  found: dict[str, list[dict[str, Score]]] = {}

  def score(case: Case) -> None:
    nonlocal shown
    volume, truth, maps = stage_maps(segmenter, case, report)
    name, geometry = case.identifier, volume.geometry
    found[name] = [
      evaluate_arrays(
        guess, truth, geometry.voxel_steps, labels.structures, labels.ignore, tolerance)
      for guess in maps
    ]
    if shown is None:
      stages = {f"stage {stage}": guess for stage, guess in enumerate(maps)}
      shown = SheetCase(
        name, volume.array[0], truth, stages, geometry.spacing,
        slice_axis=segmenter.plan.slice_axis, ignore=labels.ignore)

  hosts.each(cases, score, Progress("validation, cases", report, compiles=True))
  names = [case.identifier for case in cases]
  of_cases = {name: stages for part in hosts.gather(found) for name, stages in part.items()}
  return [Scores(labels.names, 1.0, {name: of_cases[name][stage] for name in names})
          for stage in range(segmenter.stages)], shown


RANKED_BY = "ranked_by"  # in a line of the log: which of its scores ranks checkpoints


class Ranking:
  """The scores that a phase's checkpoints are ranked by: the last stage's mean Dice.

  It is `Scores.mean`, which `note` says in lines of the log. Lines without it are of a run that was
  begun with the mean over all pairs of a case and a structure, and goes on with that one. Older
  lines do not name their score either, which is the last one. known: by step, of what the log has
  up to step `start`.
  """

  def __init__(self, run: RunFolder, phase: str, start: int):
    lines = [x for x in run.logged()
             if x["phase"] == phase and x["step"] <= start and "validation/stage0 Dice" in x]
    named = (x.get(RANKED_BY, [name for name in x if name.startswith("validation/")][-1])
             for x in lines)
    scores = {x["step"]: x[name] for x, name in zip(lines, named, strict=True)}
    self.known = {step: x for step, x in scores.items() if x is not None and not math.isnan(x)}
    self._of_pairs = not all("mean" in x for x in lines)
    self.note = {} if self._of_pairs else {"mean": "of structures"}

  def dice(self, scores: Scores) -> float | None:
    """None where no score makes a statement."""
    mean = scores.mean
    if self._of_pairs:
      mean = mean_score([x for case in scores.cases.values() for x in case.values()])
    return None if math.isnan(mean.dice) else mean.dice


def validate_run(
  run: RunFolder, segmenter: Segmenter, cases: Sequence[Case], report: Report
) -> dict[str, Any]:
  """Scores every stage on all held-out cases and writes validation.json."""
  if not cases:
    report("no validation cases: nothing is scored")
    return {}
  stages, _ = score_stages(segmenter, cases, report, tolerance=1.0)
  result = {f"stage{stage}": as_dict(scores) for stage, scores in enumerate(stages)}
  run.write("validation.json", json.dumps(result, indent=1) + "\n")
  for stage, scores in enumerate(stages):
    each = "  ".join(f"{name} {scores.of_structure(name).dice:.4f}" for name in scores.structures)
    report(f"validation stage {stage}: mean Dice {scores.mean.dice:.4f}, "
           f"HD95 {scores.mean.hd95:.2f} mm  ({each})")
  return result


def stage_maps(
  segmenter: Segmenter, case: Case, report: Report = silent
) -> tuple[Volume, np.ndarray, list[np.ndarray]]:
  """A labelled case: its image, its true label map, and the label map of every stage."""
  labels = segmenter.plan.labels
  volume, atoms = read_case(case, len(segmenter.plan.channels), labels)
  assert atoms is not None, "validation cases have labels"
  truth = np.array(labels.atom_values)[np.where(atoms == IGNORED, 0, atoms)]
  if labels.ignore is not None:
    truth[atoms == IGNORED] = labels.ignore
  return volume, truth, label_maps([segment_volume(segmenter, volume, progress=report)])
