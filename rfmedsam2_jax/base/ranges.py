"""Kinds of numbers in a config and their ranges, which pydantic checks where a config is read."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

# `__pydantic_config__` of dataclasses that take no other keys, and neither infinity nor NaN.
STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
  if pair[0] > pair[1]:
    raise ValueError(f"is {list(pair)}; the first must not be above the second")
  return pair


Count = Annotated[int, Field(ge=1, le=2**20)]
Whole = Annotated[int, Field(ge=0, le=2**40)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=2**40)]  # of a part of a loss; a rate; a margin
Axis = Annotated[int, Field(ge=0, le=2)]  # of a prepared volume: slices, rows, columns
_End = Annotated[float, Field(gt=0, le=100)]
Span = Annotated[tuple[_End, _End], pydantic.AfterValidator(_rising)]
Precision = Literal["float32", "bfloat16"]
