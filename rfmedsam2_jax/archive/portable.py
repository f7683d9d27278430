"""The texts of a run without the machine that it was made on: no path, no name of a case."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.places import BUILTIN
from rfmedsam2_jax.config import Config
from rfmedsam2_jax.data.fingerprint import Fingerprint

# /a/b as a whole value of JSON or YAML, a drive of Windows, or a home.
_ABSOLUTE = re.compile(r"(?:^|[\s\"'=(])((?:/[\w.~ -]+){2,}|[A-Za-z]:[\\/][^\s\"']*|~/[^\s\"']*)")


def portable_config(config: Config) -> Config:
  """The same networks and options, where places have only their last names."""
  replace = dataclasses.replace
  sources = tuple(replace(s, source=_last(s.source)) for s in config.tracker.data)
  return replace(
    config,
    data=replace(
      config.data, dataset=_last(config.data.dataset),
      split=replace(config.data.split, file=_last(config.data.split.file or "") or None)),
    generator=replace(config.generator, init_from=_last(config.generator.init_from)),
    refiner=replace(config.refiner, init_from=_last(config.refiner.init_from)),
    tracker=replace(config.tracker, init_from=_last(config.tracker.init_from), data=sources))


def _last(place: str) -> str:
  if place in ("", BUILTIN):
    return place
  return Path(place).name or "a folder"


def portable_fingerprint(fingerprint: Fingerprint) -> Fingerprint:
  """Without the names of cases, which may be those of people."""
  cases = tuple(dataclasses.replace(case, identifier=f"case{number}")
                for number, case in enumerate(fingerprint.cases, 1))
  return dataclasses.replace(fingerprint, cases=cases)


def check_portable(name: str, text: str, places: Sequence[Path], written: bool) -> None:
  """UserError if a text names a place of this machine.

  Args:
    name: of the text, for the error.
    places: folders of this machine that it must not name, wherever in the text.
    written: by a person, who may show paths of examples; else no absolute path at all.
  """
  found = next((str(p) for p in (Path.home(), *places) if len(str(p)) > 3 and str(p) in text), None)
  if found is None and not written and (match := _ABSOLUTE.search(text)):
    found = match[1]
  if found is not None:
    raise UserError(f"{name}: names {found}, a place of this machine; take it out and export again")
