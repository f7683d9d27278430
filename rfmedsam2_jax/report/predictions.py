"""What `predict` left in a folder: label maps, those of the stages, and CASE.json of each case.

What is there is read, and what is missing or damaged is a problem that the report names.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.files import load_json, read_json
from rfmedsam2_jax.data.names import is_label_name
from rfmedsam2_jax.evaluation.scores import label_map_files
from rfmedsam2_jax.segmentation.notices import Notice
from rfmedsam2_jax.segmentation.structures import StructureDetails


@dataclasses.dataclass(frozen=True)
class CaseFile:
  """CASE.json (docs/trust.md), as far as a report reads it."""

  shape: tuple[int, int, int]
  slice_axis: Literal[0, 1, 2]
  warnings: tuple[Notice, ...]
  structures: dict[str, StructureDetails]
  inputs: tuple[str, ...] = ()
  runs: tuple[str, ...] = ()


class Prediction(NamedTuple):
  """One case; None where a file is missing."""

  name: str
  labels: Path | None
  stages: dict[int, Path]  # label maps by the number of the stage
  details: CaseFile | None
  problems: list[str]  # sentences about what is missing or cannot be read


def read_predictions(folder: Path) -> list[Prediction]:
  """All cases of a folder, by name.

  Raises:
    UserError: no case in it, or two label maps of one case.
  """
  maps = _maps(folder)
  places = [(path.name.removeprefix("stage"), path) for path in folder.glob("stage*")]
  stages: dict[str, dict[int, Path]] = {}
  for number, place in sorted((int(n), path) for n, path in places if n.isdecimal()):
    for name, path in _maps(place).items() if place.is_dir() else ():
      stages.setdefault(name, {})[number] = path
  names = {*maps, *stages, *(path.stem for path in folder.glob("*.json") if _is_case(path))}
  if not names:
    raise UserError(
      f"{folder}: is neither a run (it has no config.yaml) nor has it label maps; give a folder "
      "that train or predict wrote"
    )
  return [_prediction(folder, name, maps.get(name), stages.get(name, {})) for name in sorted(names)]


def _prediction(
  folder: Path, name: str, labels: Path | None, stages: dict[int, Path]
) -> Prediction:
  missing = "its label map is missing; predict it again, over what is there"
  problems, details = [] if labels else [missing], None
  with noted(problems, folder):
    found = load_json(folder / f"{name}.json", CaseFile)
    try:
      json.dumps(dataclasses.asdict(found), allow_nan=False)
      details = found
    except ValueError:
      problems.append(f"{name}.json: has numbers that are not finite; predict it again")
  return Prediction(name, labels, stages, details, problems)


def labels_of(predictions: list[Prediction]) -> Labels | None:
  """Structures as the CASE.json have them, None without any; UserError if two contradict."""
  values: dict[str, int] = {}
  for prediction in predictions:
    for name, found in (prediction.details.structures if prediction.details else {}).items():
      if values.setdefault(name, found.label) != found.label:
        raise UserError(
          f"{prediction.name}.json: {name} has the label {found.label}, elsewhere {values[name]}; "
          "report the predictions of one model at a time"
        )
  if not values or len(set(values.values())) < len(values):
    return None
  structures = tuple(Structure(name, (value,)) for name, value in values.items())
  return Labels(structures, False, tuple(values.values()))


@contextlib.contextmanager
def noted(problems: list[str], *folders: Path) -> Iterator[None]:
  """Makes a UserError of the block one of the problems, and what follows it goes on.

  The folders are left out of it: places are nobody's business who gets the report.
  """
  try:
    yield
  except UserError as error:
    text = str(error)
    for folder in folders:
      text = text.replace(f"{folder}/", "")
    problems.append(text)


def _maps(folder: Path) -> dict[str, Path]:
  """Label maps by case; empty if there are none."""
  there = any(is_label_name(path) and path.is_file() for path in folder.iterdir())
  return label_map_files(folder) if there else {}


def _is_case(path: Path) -> bool:
  """Whether a JSON file tells of a case, whose label map may be lost."""
  with contextlib.suppress(UserError):
    content = read_json(path)
    return isinstance(content, dict) and {"case", "structures"} <= content.keys()
  return False
