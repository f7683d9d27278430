"""docs/commands.md names every command with exactly its options, and every exit status."""

import argparse
import re
from pathlib import Path

from rfmedsam2_jax.cli.entry import STATUSES, make_parser

PAGE = (Path(__file__).parents[1] / "docs" / "commands.md").read_text("utf-8")
OF_ALL = {"--help", "--quiet", "--json"}


def test_every_command_has_its_options_on_the_page():
  sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
  said = {
    name: set(re.findall("`(--[a-z0-9-]+)`", " ".join(re.findall(r"^\|([^|]*)\|", text, re.M))))
    for name, text in sections.items()
  }
  (commands,) = (
    a.choices for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)
  )
  commands["convert"]._actions += commands.pop("convert-nnunet")._actions  # on one page
  true = {
    name: {o for a in c._actions for o in a.option_strings if o[:2] == "--"} - OF_ALL
    for name, c in commands.items()
  }
  assert said == true


def test_exit_statuses_are_those_of_the_help():
  assert re.findall(r"^\| (\d+) \|", PAGE, re.M) == re.findall(r"^ +(\d+) ", STATUSES, re.M)
