"""Kinds of numbers in a config and their ranges, which pydantic checks where a config is read."""

import reprlib
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Field

from rfmedsam2_jax.base.addresses import check_place
from rfmedsam2_jax.base.errors import UserError

# `__pydantic_config__` of dataclasses that take no other keys, and neither infinity nor NaN.
STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


def fixed(*names: str) -> Any:
  """Lets files hold what are no fields any more; ValueError unless the class has it as they do."""
  def read(cls: type, tree: Any, handler: Any) -> Any:
    given = {name: tree[name] for name in names if name in tree} if isinstance(tree, dict) else {}
    config = handler({k: v for k, v in tree.items() if k not in given} if given else tree)
    for name, value in given.items():
      if value != (now := getattr(config, name)):
        raise ValueError(f"{name} is {reprlib.repr(value)}, but is no option any more and always "
                         f"{now}; leave it out")
    return config
  return pydantic.model_validator(mode="wrap")(classmethod(read))  # type: ignore[arg-type]


def _place(text: str) -> str:
  try:
    check_place(text)
  except UserError as error:
    raise ValueError(str(error)) from None
  return text


Place = Annotated[str, AfterValidator(_place)]  # a file or folder, here or in a bucket
Count = Annotated[int, Field(ge=1, le=2**20)]
Whole = Annotated[int, Field(ge=0, le=2**40)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=2**40)]  # of a part of a loss; a rate; a margin
Axis = Annotated[int, Field(ge=0, le=2)]  # of a prepared volume: slices, rows, columns
Precision = Literal["float32", "bfloat16"]
