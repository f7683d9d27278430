"""Addresses in buckets among the options of a command: copies on this machine take their places."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rfmedsam2_jax.base.addresses import address_of, copy_of
from rfmedsam2_jax.base.buckets import outlined, staged
from rfmedsam2_jax.base.progress import Passing, Report

_WRITTEN = ("out", "scores")  # options of what a command makes; all others are read


def bring_copies(options: argparse.Namespace, report: Report) -> None:
  """Puts copies in the places of addresses, what is read whole, of what is written an outline.

  UserError for an address that is not supported, before any is reached.
  """
  for _ in _addresses(list(vars(options).values())):
    pass
  for name, value in vars(options).items():
    setattr(options, name, _placed(name, value, options.command, report))


def _addresses(value: Any) -> Iterator[str]:
  if isinstance(value, list):
    for one in value:
      yield from _addresses(one)
  elif isinstance(value, Path) and (address := address_of(value)) is not None:
    yield address


def _placed(name: str, value: Any, command: str, report: Report) -> Any:
  if isinstance(value, list):
    return [_placed(name, one, command, report) for one in value]
  for address in _addresses(value):
    if name in _WRITTEN and command == "train":  # which sees to its folder itself
      return copy_of(value, "written")
    report(Passing(f"copying {address}"))
    return outlined(value, "written") if name in _WRITTEN else staged(value)
  return value
