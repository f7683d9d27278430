"""Which cases train and which validate: by case or group, seeded, written into the run's folder."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, Field

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.ranges import STRICT, Count, Whole, fixed
from rfmedsam2_jax.data.files import load_json, read_json, save_json


def _compiles(pattern: str) -> str:
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
  return pattern


@dataclasses.dataclass(frozen=True)
class SplitConfig:
  """How the training cases are divided."""

  __pydantic_config__ = STRICT

  fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
  # Of the cases that validate, at least one; 0: none; unused with a fold or a file.
  fold: Whole | None = None
  # This one of five validates, the same cases as in nnU-Net's fold; of a file, this one of its own.
  group: Annotated[str, AfterValidator(_compiles)] | None = None
  # Regular expression: cases in whose names it (with brackets: the first ones) finds the same text
  # stay on one side, as scans of a patient with patient\d+; fraction and fold are of groups then.
  file: str | None = None  # nnU-Net's splits_final.json, which has the split
  seed: Annotated[int, Field(ge=0, lt=2**32)] = 12345
  # Another seed is another split; nnU-Net's is the default.
  train_cases: Count | None = None
  # Train on so many of the others only, of groups where cases have them; what does less data cost?
  folds: ClassVar[int] = 5
  _read = fixed("folds")


@dataclasses.dataclass(frozen=True)
class Split:
  """Identifiers in alphabetical order, and the settings that led to them."""

  __pydantic_config__ = STRICT
  train: tuple[str, ...]
  validation: tuple[str, ...]
  config: SplitConfig


def make_split(identifiers: Sequence[str], config: SplitConfig) -> Split:
  """Divides cases, whatever their order.

  Raises:
    UserError: none trains, no such fold, a case without a group, a file that does not fit.
  """
  ordered = sorted(identifiers)
  groups = grouped(ordered, config.group)
  if config.file is None:
    held_out = {name for group in _held_out(list(groups), config) for name in groups[group]}
    train, validation = (
      tuple(x for x in ordered if (x in held_out) == side) for side in (False, True))
  else:
    train, validation = _from_file(config.file, config.fold, set(ordered))
    for group, names in groups.items():
      if not set(names).isdisjoint(train) and not set(names).isdisjoint(validation):
        raise UserError(f"{config.file}: has cases of {group} (data.split.group) on both sides; "
                        "put them on one")
  if not train:
    raise UserError(f"split: no training case is left of {len(ordered)}; add cases or lower the "
                    "fraction (0 trains on all and validates on none)")
  if config.train_cases is not None:
    of_train = list(grouped(train, config.group).values())
    if not 1 <= config.train_cases <= len(of_train):
      raise UserError(f"split.train_cases: is {config.train_cases}; give 1 to {len(of_train)}")
    # A smaller number takes a part of what a larger one takes.
    drawn = np.random.default_rng(config.seed).permutation(len(of_train))[: config.train_cases]
    train = tuple(sorted(name for i in drawn for name in of_train[i]))
  return Split(train, validation, config)


def grouped(identifiers: Iterable[str], pattern: str | None) -> dict[str, list[str]]:
  """Cases by group (`SplitConfig.group`), each in the given order; without a pattern each its own.

  UserError for a case in which the pattern finds nothing.
  """
  groups: dict[str, list[str]] = {}
  for name in identifiers:
    found = re.search(pattern, name) if pattern is not None else None
    group = name if pattern is None else found and found[1 if found.re.groups else 0]
    if not group:
      raise UserError(f"data.split.group: {pattern!r} finds nothing in the name of case {name}; "
                      "give a pattern that fits all cases")
    groups.setdefault(group, []).append(name)
  return groups


def _held_out(groups: Sequence[str], config: SplitConfig) -> list[str]:
  """The groups that validate."""
  count = len(groups)
  shuffled = np.arange(count)
  if config.fold is None:
    if not 0 <= config.fraction < 1:
      raise UserError(f"split.fraction: is {config.fraction}; give a number from 0 to below 1")
    np.random.default_rng(config.seed).shuffle(shuffled)
    drawn = shuffled[:max(1, round(count * config.fraction)) if config.fraction else 0]
  else:
    if count < config.folds:
      what = "cases" if config.group is None else "groups"
      raise UserError(f"split.folds: is {config.folds} with {count} {what}; give 2 to {count}")
    if not 0 <= config.fold < config.folds:
      raise UserError(f"split.fold: is {config.fold}; give 0 to {config.folds - 1}")
    # As scikit-learn's KFold(folds, shuffle=True, random_state=seed), which nnU-Net uses.
    np.random.RandomState(config.seed).shuffle(shuffled)
    drawn = np.array_split(shuffled, config.folds)[config.fold]
  return [groups[i] for i in drawn]


def _from_file(
  path: str, fold: int | None, identifiers: set[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The cases that train and those that validate in one fold of nnU-Net's splits_final.json."""
  folds = read_json(path)
  if not isinstance(folds, list) or not folds or not all(map(_is_fold, folds)):
    raise UserError(f"{path}: is no list of {{\"train\": [cases], \"val\": [cases]}}, the form of "
                    "nnU-Net's splits_final.json; correct the file")
  if fold is None and len(folds) > 1:
    raise UserError(f"{path}: has {len(folds)} folds; give one as data.split.fold, 0 to "
                    f"{len(folds) - 1}")
  if (fold := fold or 0) >= len(folds):
    raise UserError(f"split.fold: is {fold}, but {path} has {len(folds)}; give 0 to "
                    f"{len(folds) - 1}")
  train, validation = folds[fold]["train"], folds[fold]["val"]
  if not train:
    raise UserError(f"{path}: fold {fold} has no case to train on; correct the file")
  if unknown := sorted({*train, *validation} - identifiers):
    raise UserError(f"{path}: fold {fold} has the case {unknown[0]}, which the data set has not; "
                    "correct the file or add the case")
  if both := sorted(set(train) & set(validation)):
    raise UserError(f"{path}: fold {fold} has the case {both[0]} on both sides; take it from one")
  return tuple(sorted(set(train))), tuple(sorted(set(validation)))


def _is_fold(fold: Any) -> bool:
  return isinstance(fold, dict) and all(
    isinstance(names := fold.get(side), list) and all(isinstance(name, str) for name in names)
    for side in ("train", "val"))


def divide(
  cases: Sequence[str], share: float, seed: int, group: str | None = None
) -> tuple[list[str], list[str]]:
  """Training cases of the generator and of the refiner; UserError if one of them has none.

  The refiner alone sees `share` of them (`refiner.held_back`), of groups where a pattern makes some
  (`SplitConfig.group`); 0: both see all.
  """
  if not share:
    return list(cases), list(cases)
  groups = grouped(cases, group)
  count = round(share * len(groups))
  if not 0 < count < len(groups):
    what = "training cases" if group is None else "groups of training cases"
    raise UserError(f"refiner.held_back: {share} of {len(groups)} {what} leaves "
                    f"{'the refiner' if count < 1 else 'the generator'} none; 0 gives both all")
  # Its own stream: cases that validate and those of `train_cases` are drawn from the seed itself.
  drawn = np.random.default_rng([seed, 1]).permutation(len(groups))[:count]
  names = list(groups)
  held_back = {case for i in drawn for case in groups[names[i]]}
  return [x for x in cases if x not in held_back], [x for x in cases if x in held_back]


def save_split(path: str | Path, split: Split) -> None:
  """Writes splits.json."""
  save_json(path, split)


def load_split(path: str | Path) -> Split:
  """Reads splits.json."""
  return load_json(path, Split)
