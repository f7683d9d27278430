"""Scores of a segmenter on held-out cases, while it is trained and in the end.

Every process scores its share of the cases; all have the result.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from rfmedsam2_jax.base.progress import Progress, Report, silent
from rfmedsam2_jax.data.datasets import IGNORED, Case, read_case
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.data.volumes import Volume
from rfmedsam2_jax.evaluation.metrics import dice
from rfmedsam2_jax.evaluation.scores import Scores, as_dict, evaluate_arrays
from rfmedsam2_jax.parallel import hosts
from rfmedsam2_jax.report.contact_sheet import SheetCase
from rfmedsam2_jax.segmentation.segmenter import Segmenter, label_maps, segment_volume


def quick_scores(
  segmenter: Segmenter, cases: Sequence[Case], report: Report
) -> tuple[dict[str, float], SheetCase | None]:
  """Mean Dice of every stage over a few cases, and the first of this process's to be looked at."""
  found: list[list[float]] = [[] for _ in range(segmenter.stages)]
  shown: SheetCase | None = None
  with hosts.together():
    progress, mine = Progress("validation, cases", report, compiles=True), hosts.share(cases)
    for done, case in enumerate(mine):
      progress(done, len(mine))
      volume, truth, maps = stage_maps(segmenter, case, report)
      if shown is None:
        stages = {f"stage {stage}": guess for stage, guess in enumerate(maps)}
        shown = SheetCase(
          case.identifier, volume.array[0], truth, stages, volume.geometry.spacing,
          slice_axis=segmenter.plan.slice_axis,
        )
      for stage, guess in enumerate(maps):
        for structure in segmenter.plan.labels.structures:
          mask, true_mask = np.isin(guess, structure.values), np.isin(truth, structure.values)
          found[stage].append(dice(mask, true_mask))
  # One list per stage, of all processes.
  found = [sum(parts, []) for parts in zip(*hosts.gather(found), strict=True)]
  scores = {f"stage{stage} Dice": float(np.nanmean(values)) for stage, values in enumerate(found)}
  return scores, shown


def validate_run(
  run: RunFolder, segmenter: Segmenter, cases: Sequence[Case], report: Report
) -> dict[str, Any]:
  """Scores every stage on all held-out cases and writes validation.json."""
  if not cases:
    report("no validation cases: nothing is scored")
    return {}
  labels = segmenter.plan.labels
  found: list[dict[str, Any]] = [{} for _ in range(segmenter.stages)]
  progress = Progress("validation, cases", report, compiles=True)
  with hosts.together():
    mine = hosts.share(cases)
    progress(0, len(mine))
    for done, case in enumerate(mine, 1):
      volume, truth, maps = stage_maps(segmenter, case, report)
      for stage, guess in enumerate(maps):
        found[stage][case.identifier] = evaluate_arrays(
          guess, truth, volume.geometry.spacing, labels.structures, labels.ignore
        )
      progress(done, len(mine))
  of_case = [
    {name: scores for part in parts for name, scores in part.items()}
    for parts in zip(*hosts.gather(found), strict=True)
  ]
  found = [{case.identifier: stage[case.identifier] for case in cases} for stage in of_case]
  stages = [Scores(labels.names, 1.0, scores) for scores in found]
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
