"""Which cases train and which validate: by case, seeded, written into the run's folder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.ranges import STRICT, Count, Whole, fixed
from rfmedsam2_jax.data.files import load_json, save_json


@dataclasses.dataclass(frozen=True)
class SplitConfig:
  """How the training cases are divided."""

  __pydantic_config__ = STRICT

  fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
  # Of the cases that validate, at least one; 0: none; unused with a fold.
  fold: Whole | None = None  # this one of five validates, the same cases as in nnU-Net's fold
  seed: Annotated[int, Field(ge=0, lt=2**32)] = 12345
  # Another seed is another split; nnU-Net's is the default.
  train_cases: Count | None = None  # train on so many of the others only; what does less data cost?
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
  """Divides cases, whatever their order; UserError if none trains or the fold does not exist."""
  ordered, count = sorted(identifiers), len(identifiers)
  shuffled = np.arange(count)
  if config.fold is None:
    if not 0 <= config.fraction < 1:
      raise UserError(f"split.fraction: is {config.fraction}; give a number from 0 to below 1")
    np.random.default_rng(config.seed).shuffle(shuffled)
    held_out = shuffled[:max(1, round(count * config.fraction)) if config.fraction else 0]
  else:
    if count < config.folds:
      raise UserError(f"split.folds: is {config.folds} with {count} cases; give 2 to {count}")
    if not 0 <= config.fold < config.folds:
      raise UserError(f"split.fold: is {config.fold}; give 0 to {config.folds - 1}")
    # As scikit-learn's KFold(folds, shuffle=True, random_state=seed), which nnU-Net uses.
    np.random.RandomState(config.seed).shuffle(shuffled)
    held_out = np.array_split(shuffled, config.folds)[config.fold]
  validation = {ordered[i] for i in held_out}
  train = tuple(name for name in ordered if name not in validation)
  if not train:
    raise UserError(f"split: no training case is left of {count}; add cases or lower the fraction "
                    f"(0 trains on all and validates on none)")
  if config.train_cases is not None:
    if not 1 <= config.train_cases <= len(train):
      raise UserError(f"split.train_cases: is {config.train_cases}; give 1 to {len(train)}")
    # A smaller number takes a part of what a larger one takes.
    drawn = np.random.default_rng(config.seed).permutation(len(train))[: config.train_cases]
    train = tuple(train[i] for i in sorted(drawn))
  return Split(train, tuple(name for name in ordered if name in validation), config)


def divide(cases: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
  """Training cases of the generator and of the refiner; UserError if one of them has none.

  The refiner alone sees `share` of them (`refiner.held_back`); 0: both see all.
  """
  if not share:
    return list(cases), list(cases)
  count = round(share * len(cases))
  if not 0 < count < len(cases):
    raise UserError(f"refiner.held_back: {share} of {len(cases)} training cases leaves "
                    f"{'the refiner' if count < 1 else 'the generator'} none; 0 gives both all")
  # Its own stream: cases that validate and those of `train_cases` are drawn from the seed itself.
  drawn = np.random.default_rng([seed, 1]).permutation(len(cases))
  return [cases[i] for i in sorted(drawn[count:])], [cases[i] for i in sorted(drawn[:count])]


def save_split(path: str | Path, split: Split) -> None:
  """Writes splits.json."""
  save_json(path, split)


def load_split(path: str | Path) -> Split:
  """Reads splits.json."""
  return load_json(path, Split)
