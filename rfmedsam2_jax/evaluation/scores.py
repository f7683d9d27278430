"""Scores of label maps against references, by case and structure: from files, as a table, as JSON.

Both are brought into one orientation by their affines; `metrics` scores the masks.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.files import replacing
from rfmedsam2_jax.data.volumes import ENDINGS, is_volume_name, load_image, load_label_map
from rfmedsam2_jax.evaluation.metrics import Missing, Score, mean_score, score


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of a set of cases.

  Attributes:
    structures: names, in the order of the label values.
    cases: by case identifier and structure name.
    missing: what HD95 is where only one side has a structure.
  """

  structures: tuple[str, ...]
  tolerance: float  # mm, of the surface Dice
  cases: dict[str, dict[str, Score]]
  missing: Missing = math.nan

  def of_structure(self, name: str) -> Score:
    """Mean over the cases."""
    return mean_score([case[name] for case in self.cases.values()])

  def unmatched(self, name: str) -> int:
    """Cases in which only one side has the structure; HD95 leaves them out, or is `missing`."""
    return sum(case[name].unmatched for case in self.cases.values())

  @property
  def mean(self) -> Score:
    """Mean over the structures' means: a structure counts the same however many cases have it."""
    return mean_score([self.of_structure(name) for name in self.structures])


def evaluate_folders(
  predictions: str | Path, references: str | Path, labels: Labels | None = None,
  tolerance: float = 1.0, partial: bool = False, missing: Missing = math.nan,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
  """Scores every label map of a folder against the one of the same name.

  Args:
    predictions: a folder of label maps, or one file.
    references: likewise; of one prediction file it may be a folder.
    labels: names and values of the structures and the ignore label; None scores every label value
      that occurs, under its number.
    tolerance: mm, of the surface Dice.
    partial: score the predictions that are there, although references without one remain.
    missing: HD95 of a structure that one side alone has: mm, nan, or "worst", the image's diagonal.
    progress: called with (cases done, cases).

  Raises:
    UserError: nothing to score, a case missing on one side, unlike grids, unreadable files.
  """
  if not 0 <= tolerance < math.inf:
    raise UserError(f"tolerance {tolerance} mm: is no distance; give 0 or more")
  if missing != "worst" and not (math.isnan(missing) or 0 <= missing < math.inf):
    raise UserError(f"missing {missing} mm: is no distance; give 0 or more, nan or worst")
  pairs = _pairs(Path(predictions), Path(references), partial)
  found: dict[str, dict[str, Score]] = {}
  progress(0, len(pairs))
  for identifier, (prediction, reference) in pairs.items():
    geometry = load_image(reference).geometry
    truth, guess = (load_label_map(path, geometry) for path in (reference, prediction))
    found[identifier] = evaluate_arrays(
      guess, truth, geometry.voxel_steps, structures_of(labels, truth, guess),
      labels.ignore if labels else None, tolerance, missing,
    )
    progress(len(found), len(pairs))
  occurring = {name for case in found.values() for name in case}
  return gathered(found, labels.names if labels else sorted(occurring, key=int), tolerance,
                  missing)


def gathered(
  cases: Mapping[str, Mapping[str, Score]], names: Iterable[str], tolerance: float = 1.0,
  missing: Missing = math.nan,
) -> Scores:
  """`Scores` of the structures `names`; one that a case lacks makes no statement there."""
  names, absent = tuple(names), Score(math.nan, math.nan, math.nan, 0.0, 0.0)
  filled = {key: {name: case.get(name, absent) for name in names} for key, case in cases.items()}
  return Scores(names, tolerance, filled, missing)


def structures_of(labels: Labels | None, *maps: np.ndarray) -> tuple[Structure, ...]:
  """The structures that labels name; without labels every value of the maps, under its number."""
  if labels is not None:
    return labels.structures
  values = sorted({int(value) for found in maps for value in np.unique(found)} - {0})
  return tuple(Structure(str(value), (value,)) for value in values)


def evaluate_arrays(
  prediction: np.ndarray, reference: np.ndarray, voxel: ArrayLike,
  structures: Sequence[Structure], ignore: int | None = None, tolerance: float | None = 1.0,
  missing: Missing = math.nan,
) -> dict[str, Score]:
  """Scores by structure name of label maps, whole numbers [D, H, W] on one grid; see `score`."""
  known = None if ignore is None else reference != ignore
  return {
    s.name: score(np.isin(prediction, s.values), np.isin(reference, s.values), voxel, tolerance,
                  known, missing)
    for s in structures
  }


def label_map_files(path: Path) -> dict[str, Path]:
  """Label maps by case, of a folder or one file; UserError if none, or two files of one case."""
  if not path.exists():
    raise UserError(f"{path}: no such file or folder; check the path")
  files = sorted(filter(is_volume_name, path.iterdir())) if path.is_dir() else [path]
  if not files:
    raise UserError(f"{path}: has no label maps (files that end in {', '.join(ENDINGS)}); "
                    f"give a folder that has some")
  by_case: dict[str, Path] = {}
  for file in files:
    name = file.name.removesuffix(next((e for e in ENDINGS if file.name.endswith(e)), ""))
    if by_case.setdefault(name, file) != file:
      raise UserError(f"{file}: is the case {name}, and so is {by_case[name].name}; remove one")
  return by_case


def _pairs(predictions: Path, references: Path, partial: bool) -> dict[str, tuple[Path, Path]]:
  guesses, truths = label_map_files(predictions), label_map_files(references)
  if predictions.is_file() and references.is_file():
    (identifier, guess), (truth,) = *guesses.items(), truths.values()
    return {identifier: (guess, truth)}
  for extra in (guess for identifier, guess in guesses.items() if identifier not in truths):
    raise UserError(
      f"{extra}: has no reference of that name in {references}; add it or remove the prediction")
  missing = [identifier for identifier in truths if identifier not in guesses]
  if missing and not partial and predictions.is_dir():
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    raise UserError(f"{predictions}: has no prediction of {shown}, which {references} has; predict "
                    "all cases, or score those that are there (partial)")
  return {identifier: (guess, truths[identifier]) for identifier, guess in guesses.items()}


def table(scores: Scores) -> str:
  """The means as text, one row per structure."""
  def cells(mean: Score, unmatched: int) -> list[str]:
    values = ((mean.dice, 4), (mean.surface_dice, 4), (mean.hd95, 2), (unmatched, 0),
              (mean.volume, 2), (mean.reference_volume, 2))
    return ["-" if math.isnan(value) else f"{value:.{digits}f}" for value, digits in values]

  surface = f"surface Dice {scores.tolerance:g} mm"
  hd95 = "HD95 mm" + (f", missed {scores.missing}" if str(scores.missing) != "nan" else "")
  header = ["structure", "Dice", surface, hd95, "unmatched", "volume ml", "reference ml"]
  unmatched = {name: scores.unmatched(name) for name in scores.structures}
  rows = [[name, *cells(scores.of_structure(name), missed)] for name, missed in unmatched.items()]
  last = f"mean of {len(scores.cases)} case{'s' * (len(scores.cases) != 1)}"
  rows = [header, *rows, [last, *cells(scores.mean, sum(unmatched.values()))]]
  first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
  lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]
  rule = "-" * len(lines[0])
  return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def as_dict(scores: Scores) -> dict:
  """For JSON: undefined scores become null."""

  def plain(value: Score) -> dict[str, float | None]:
    return {k: None if math.isnan(v) else v for k, v in dataclasses.asdict(value).items()}

  unmatched = {name: scores.unmatched(name) for name in scores.structures}
  return {
    "tolerance_mm": scores.tolerance, "conventions": _conventions(scores.missing),
    "mean": plain(scores.mean) | {"unmatched": sum(unmatched.values())},
    "structures": {name: plain(scores.of_structure(name)) | {"unmatched": unmatched[name]}
                   for name in scores.structures},
    "cases": {identifier: {name: plain(value) for name, value in case.items()}
              for identifier, case in scores.cases.items()},
  }


def _conventions(missing: Missing) -> dict[str, str]:
  """What the numbers of a file of scores mean, for those who compare them with others'."""
  cost = {"nan": "null and left out of means", "worst": "the diagonal of the image"}
  return {
    "surface_dice": "share of both surfaces' area at most the tolerance from the other surface; "
                    "areas and distances as in DeepMind's surface-distance",
    "hd95": "mm, the larger of the distances within which 95 % of either surface's area lies",
    "both_empty": "dice, surface_dice and hd95 are null and left out of means",
    "one_empty": "counted as unmatched; dice and surface_dice are 0, hd95 is "
                 f"{cost.get(str(missing), f'{missing} mm')}",
    "missing": str(missing),
  }


def from_dict(content: dict[str, Any]) -> Scores:
  """The inverse of `as_dict`; KeyError, TypeError, ValueError or AttributeError for anything else.

  Files of before there were conventions are read too.
  """
  def known(value: dict[str, float | None]) -> Score:
    return Score(**{k: math.nan if v is None else float(v) for k, v in value.items()})

  cases = {identifier: {name: known(value) for name, value in case.items()}
           for identifier, case in content["cases"].items()}
  missing = content.get("conventions", {}).get("missing", "nan")
  return Scores(tuple(content["structures"]), float(content["tolerance_mm"]), cases,
                missing if missing == "worst" else float(missing))


def save_scores(path: str | Path, scores: Scores) -> None:
  """Writes the scores as JSON."""
  with replacing(path) as temporary:
    temporary.write_text(json.dumps(as_dict(scores), indent=1, allow_nan=False) + "\n")
