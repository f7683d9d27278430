"""Scores of label maps against reference label maps: per structure and case, as a table and JSON.

The end of the data's way: reads what segmentation.segmenter wrote (or any NIfTI label maps) and the
reference, brings both into one orientation by their affines, and hands masks to `metrics`.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.files import replacing
from rfmedsam2_jax.data.volumes import ENDINGS, is_volume_name, load_image, load_label_map
from rfmedsam2_jax.evaluation.metrics import Score, mean_score, score


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of a set of cases.

  Attributes:
    structures: names, in the order of the label values.
    tolerance: mm, of the surface Dice.
    cases: by case identifier and structure name.
  """

  structures: tuple[str, ...]
  tolerance: float
  cases: dict[str, dict[str, Score]]

  def of_structure(self, name: str) -> Score:
    """Mean over the cases."""
    return mean_score([case[name] for case in self.cases.values()])

  @property
  def mean(self) -> Score:
    """Mean over the structures' means: a structure counts the same however many cases have it."""
    return mean_score([self.of_structure(name) for name in self.structures])


def evaluate_folders(
  predictions: str | Path,
  references: str | Path,
  labels: Labels | None = None,
  tolerance: float = 1.0,
  partial: bool = False,
  progress: Callable[[int, int], None] | None = None,
) -> Scores:
  """Scores every label map of a folder against the one of the same name.

  Args:
    predictions: a folder of label maps, or one file.
    references: the same of references; of one prediction file it may be a folder.
    labels: names and values of the structures and the ignore label; None scores every label value
      that occurs, under its number.
    tolerance: mm, of the surface Dice.
    partial: score the predictions that are there, although references without one remain.
    progress: called with (cases done, cases).

  Raises:
    UserError: nothing to score, a case missing on one side, unlike grids, unreadable files.
  """
  if tolerance < 0:
    raise UserError(f"tolerance {tolerance} mm: is negative; give 0 or more")
  pairs = _pairs(Path(predictions), Path(references), partial)
  found: dict[str, dict[str, Score]] = {}
  occurring: set[str] = set()
  if progress is not None:
    progress(0, len(pairs))
  for done, (identifier, (prediction, reference)) in enumerate(pairs.items(), start=1):
    structures, found[identifier] = _score_case(prediction, reference, labels, tolerance)
    occurring.update(structures)
    if progress is not None:
      progress(done, len(pairs))
  names = labels.names if labels is not None else tuple(sorted(occurring, key=int))
  # A value that other cases have and this one lacks on both sides makes no statement.
  absent = Score(math.nan, math.nan, math.nan, 0.0, 0.0)
  cases = {i: {name: case.get(name, absent) for name in names} for i, case in found.items()}
  return Scores(names, tolerance, cases)


def evaluate_arrays(
  prediction: np.ndarray,
  reference: np.ndarray,
  spacing: tuple[float, ...],
  structures: Sequence[Structure],
  ignore: int | None = None,
  tolerance: float = 1.0,
) -> dict[str, Score]:
  """Scores one case of label maps, whole numbers [D, H, W] on one grid, by structure name."""
  known = None if ignore is None else reference != ignore
  return {
    structure.name: score(
      np.isin(prediction, structure.values),
      np.isin(reference, structure.values),
      spacing,
      tolerance,
      known,
    )
    for structure in structures
  }


def _score_case(
  prediction: Path, reference: Path, labels: Labels | None, tolerance: float
) -> tuple[tuple[str, ...], dict[str, Score]]:
  geometry = load_image(reference).geometry
  truth = load_label_map(reference, geometry)
  guess = load_label_map(prediction, geometry)
  if labels is None:
    values = sorted({*np.unique(truth).tolist(), *np.unique(guess).tolist()} - {0})
    structures: tuple[Structure, ...] = tuple(Structure(str(v), (v,)) for v in values)
  else:
    structures = labels.structures
  ignore = None if labels is None else labels.ignore
  scores = evaluate_arrays(guess, truth, geometry.spacing, structures, ignore, tolerance)
  return tuple(scores), scores


def label_maps(path: Path) -> dict[str, Path]:
  """Label maps by case identifier, of a folder or of one file.

  Raises:
    UserError: nothing there, or two files of one case.
  """
  if path.is_dir():
    files = sorted(file for file in path.iterdir() if is_volume_name(file))
    if not files:
      raise UserError(f"{path}: has no label maps (files that end in {', '.join(ENDINGS)}); "
                      f"give a folder that has some")
  elif path.exists():
    files = [path]
  else:
    raise UserError(f"{path}: no such file or folder; check the path")
  names: dict[str, Path] = {}
  for file in files:
    ending = next((e for e in ENDINGS if file.name.endswith(e)), "")
    name = file.name.removesuffix(ending)
    if name in names:
      raise UserError(f"{file}: is the case {name}, and so is {names[name].name}; remove one")
    names[name] = file
  return names


def _pairs(predictions: Path, references: Path, partial: bool) -> dict[str, tuple[Path, Path]]:
  guesses, truths = label_maps(predictions), label_maps(references)
  if predictions.is_file() and references.is_file():
    (identifier, guess), (truth,) = *guesses.items(), truths.values()
    return {identifier: (guess, truth)}
  for identifier, guess in guesses.items():
    if identifier not in truths:
      raise UserError(
        f"{guess}: has no reference of that name in {references}; add it or remove the prediction"
      )
  missing = [identifier for identifier in truths if identifier not in guesses]
  if missing and not partial and predictions.is_dir():
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    raise UserError(
      f"{predictions}: has no prediction of {shown}, which {references} has; predict all cases, "
      "or score those that are there with --partial"
    )
  return {identifier: (guess, truths[identifier]) for identifier, guess in guesses.items()}


def table(scores: Scores) -> str:
  """The means as text, one row per structure."""
  count = len(scores.cases)
  surface = f"surface Dice {scores.tolerance:g} mm"
  header = ["structure", "Dice", surface, "HD95 mm", "unmatched", "volume ml", "reference ml"]
  rows = []
  for name in scores.structures:
    of_cases = [case[name] for case in scores.cases.values()]
    # What one side has and the other lacks entirely: HD95 leaves it out, so it is counted here.
    unmatched = sum(s.dice == 0 and math.isnan(s.hd95) for s in of_cases)
    rows.append([name, *_cells(scores.of_structure(name), unmatched)])
  total = sum(int(row[4]) for row in rows)
  rows.append([f"mean of {count} case{'s' * (count != 1)}", *_cells(scores.mean, total)])
  widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
  lines = []
  for row in (header, *rows):
    cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    cells[0] = row[0].ljust(widths[0])
    lines.append("  ".join(cells))
  rule = "-" * len(lines[0])
  return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _cells(mean: Score, unmatched: int) -> list[str]:
  def number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"

  return [
    number(mean.dice, 4),
    number(mean.surface_dice, 4),
    number(mean.hd95, 2),
    str(unmatched),
    number(mean.volume, 2),
    number(mean.reference_volume, 2),
  ]


def as_dict(scores: Scores) -> dict:
  """For JSON: undefined scores become null."""

  def plain(value: Score) -> dict[str, float | None]:
    return {k: None if math.isnan(v) else v for k, v in dataclasses.asdict(value).items()}

  return {
    "tolerance_mm": scores.tolerance,
    "mean": plain(scores.mean),
    "structures": {name: plain(scores.of_structure(name)) for name in scores.structures},
    "cases": {
      identifier: {name: plain(value) for name, value in case.items()}
      for identifier, case in scores.cases.items()
    },
  }


def from_dict(content: dict[str, Any]) -> Scores:
  """The inverse of `as_dict`.

  Raises:
    KeyError, TypeError, AttributeError: it is not what that returns.
  """
  cases = {
    identifier: {
      name: Score(**{k: math.nan if v is None else float(v) for k, v in value.items()})
      for name, value in case.items()
    }
    for identifier, case in content["cases"].items()
  }
  return Scores(tuple(content["structures"]), float(content["tolerance_mm"]), cases)


def save_scores(path: str | Path, scores: Scores) -> None:
  """Writes the scores as JSON."""
  with replacing(path) as temporary:
    temporary.write_text(json.dumps(as_dict(scores), indent=1, allow_nan=False) + "\n")
