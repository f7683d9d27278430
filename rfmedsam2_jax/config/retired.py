"""Options that there are no more, and the constants that took their places.

Config files and runs made with them are read: a value that equals the constant is passed over, any
other is refused by name.
"""

import dataclasses
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.config.experiment import Config


def _constants(part: Any, path: str = "", fixed: bool = False) -> Iterator[tuple[str, Any]]:
  """Path and value of every constant of a config's classes; `*` stands for every stage."""
  options = [field.name for field in dataclasses.fields(part)]
  for name in dict.fromkeys([*options, *type(part).__annotations__]):
    value, constant = getattr(part, name), fixed or name not in options
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
      yield from _constants(value, f"{path}{name}.", constant)
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
      yield from _constants(value[0], f"{path}{name}.*.", constant)
    elif constant and not isinstance(value, type):  # the classes of adapters were no options
      yield f"{path}{name}", value


RETIRED: dict[str, Any] = dict(_constants(Config()))
RETIRED |= {f"{phase}.augmentation.intensity": 1.0 for phase in ("generator", "refiner")}

# What only training reads: of no consequence for networks that are trained.
_OF_TRAINING = ("data.", "plan.", "generator.", "tracker.", "refiner.")
_OF_NO_CONSEQUENCE = {"data.loader.prefetch": None}  # for what is computed


def without_retired(tree: Any, source: str, trained: bool = False) -> Any:
  """The tree of a config without the options that there are no more.

  trained: of a run that is done: what it was trained with is taken as it is.

  Raises:
    UserError: one of them is not what is now fixed.
  """
  for path, constant in (RETIRED | _OF_NO_CONSEQUENCE).items():
    constant = None if trained and path.startswith(_OF_TRAINING) else constant
    tree = _without(tree, path.split("."), constant, source, "")
  return tree


def _without(node: Any, path: list[str], constant: Any, source: str, where: str) -> Any:
  """`constant` is None where any value is passed over."""
  key, *rest = path
  if key == "*" and isinstance(node, list | tuple):
    return [_without(item, rest, constant, source, f"{where}{index}.")
            for index, item in enumerate(node)]
  if not isinstance(node, Mapping) or key not in node:
    return node
  others = {name: value for name, value in node.items() if name != key}
  if rest:
    inner = _without(node[key], rest, constant, source, f"{where}{key}.")
    # A part of which nothing is left may be none that there still is.
    return others if isinstance(inner, Mapping) and not inner else others | {key: inner}
  if not (constant is None or _equal(node[key], constant)):
    fixed = list(constant) if isinstance(constant, tuple) else constant
    raise UserError(f"{source}: {where}{key}: is {reprlib.repr(node[key])}, but is no option any "
                    f"more and always {fixed}; leave it out")
  return others


def _equal(value: Any, constant: Any) -> bool:
  try:  # numbers that YAML takes for text, lists that are tuples
    return bool(pydantic.TypeAdapter(type(constant)).validate_python(value) == constant)
  except pydantic.ValidationError:
    return False
