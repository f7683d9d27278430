"""Scores of label maps against references, by case and structure: from files, as a table, as JSON.

Both are brought into one orientation by their affines; `metrics` scores the masks.
"""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import Labels, Structure, load_labels
from rfmedsam2_jax.data.files import replacing
from rfmedsam2_jax.data.label_objects import is_label_object, own_grid
from rfmedsam2_jax.data.names import LABEL_ENDINGS, by_name, is_label_name, listed, some
from rfmedsam2_jax.data.segments import load_by_name, names_values, segments_of
from rfmedsam2_jax.data.volumes import Geometry, load_grid
from rfmedsam2_jax.evaluation.metrics import Missing, Score, mean_score, score

_LOG = logging.getLogger(__name__)
# What predict, track and evaluate write beside label maps.
_OURS = re.compile(r".*\.json|.*\.png|itksnap_labels\.txt|numbers\.csv|stage\d+|probabilities")


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
  warn: Callable[[str], None] = _LOG.warning,
) -> Scores:
  """Scores every label map of a folder against the one of the same name.

  Values that a file names count by their names where both sides have some: those of `labels`, or
  else of the reference.

  Args:
    predictions: a folder of label maps, or one file.
    references: likewise; of one prediction file it may be a folder.
    labels: names and values of the structures and the ignore label; None scores every label value
      that occurs, under its number.
    tolerance: mm, of the surface Dice.
    partial: score the predictions that are there, although references without one remain.
    missing: HD95 of a structure that one side alone has: mm, nan, or "worst", the image's diagonal.
    progress: called with (cases done, cases).
    warn: told in a line what is not scored: files that are no label maps, values of no structure.

  Raises:
    UserError: nothing to score, a case missing on one side, unlike grids, unreadable files, names
      that contradict the labels.
  """
  if not 0 <= tolerance < math.inf:
    raise UserError(f"tolerance {tolerance} mm: is no distance; give 0 or more")
  if missing != "worst" and not (math.isnan(missing) or 0 <= missing < math.inf):
    raise UserError(f"missing {missing} mm: is no distance; give 0 or more, nan or worst")
  pairs = _pairs(Path(predictions), Path(references), partial, warn)
  found: dict[str, dict[str, Score]] = {}
  named: list[Path] = []  # files that name their values, where the one beside does not
  progress(0, len(pairs))
  for identifier, (prediction, reference) in pairs.items():
    truth, guess, geometry = _read_pair(prediction, reference, labels)
    if labels is None and (says := names_values(prediction)) != names_values(reference):
      named.append(prediction if says else reference)
    for path, values in ((prediction, guess), (reference, truth)):
      unknown = sorted(set(np.unique(values).tolist()) - labels.known_values) if labels else []
      if unknown:
        warn(f"{path}: holds values that no structure has ({some(unknown)}); "
             "they are not scored")
    found[identifier] = evaluate_arrays(
      guess, truth, geometry.voxel_steps, structures_of(labels, truth, guess),
      labels.ignore if labels else None, tolerance, missing,
    )
    progress(len(found), len(pairs))
  if named:
    warn(f"{named[0]}: names its values and the file beside it does not, so numbers were compared"
         f"{f' (so in {len(named)} cases)' if len(named) > 1 else ''}; give the labels that name "
         "them")
  occurring = {name for case in found.values() for name in case}
  return gathered(found, labels.names if labels else sorted(occurring, key=int), tolerance,
                  missing)


def _read_pair(prediction: Path, reference: Path, labels: Labels | None
               ) -> tuple[np.ndarray, np.ndarray, Geometry]:
  """The true and the predicted values, int32 [D, H, W] each, and the grid of both."""
  # Objects of DICOM leave out slices without a structure: the other file's grid is whole.
  whole = [path for path in (reference, prediction) if not is_label_object(path)]
  geometry = load_grid(whole[0]) if whole else own_grid(reference, prediction)
  if labels is not None:
    truth, guess = (load_labels(path, geometry, labels) for path in (reference, prediction))
  else:
    named = {segment.name: segment.value for segment in segments_of(reference)}
    truth = load_by_name(reference, geometry, named)
    guess = load_by_name(prediction, geometry, named)
  return truth, guess, geometry


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


def label_map_files(
  path: Path, warn: Callable[[str], None] = lambda line: None
) -> dict[str, Path]:
  """Label maps by case, of a folder or one file; UserError if none, or two files of one case.

  `warn` is told in a line what lies beside them, but for what this program writes there.
  """
  if not path.exists():
    raise UserError(f"{path}: no such file or folder; check the path")
  if not path.is_dir():
    return by_name([path])
  listing = listed(path, is_label_name)
  if not listing.files:
    raise UserError(f"{path}: has no label maps (files that end in {', '.join(LABEL_ENDINGS)}); "
                    f"give a folder that has some")
  for line in listing.left_out(lambda name: bool(_OURS.fullmatch(name))):
    warn(str(line))
  return by_name(listing.files)


def _pairs(predictions: Path, references: Path, partial: bool, warn: Callable[[str], None]
           ) -> dict[str, tuple[Path, Path]]:
  guesses, truths = label_map_files(predictions, warn), label_map_files(references, warn)
  if not predictions.is_dir() and not references.is_dir():
    (identifier, guess), (truth,) = *guesses.items(), truths.values()
    return {identifier: (guess, truth)}
  for extra in (guess for identifier, guess in guesses.items() if identifier not in truths):
    raise UserError(
      f"{extra}: has no reference of that name in {references}; add it or remove the prediction")
  missing = [identifier for identifier in truths if identifier not in guesses]
  if missing and not partial and predictions.is_dir():
    raise UserError(f"{predictions}: has no prediction of {some(missing)}, which {references} has; "
                    "predict all cases, or score those that are there (partial)")
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
  """For JSON: undefined scores become null; "unmatched" are cases, see `Scores.unmatched`."""

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
