"""The command `rfmedsam2`: finds the module of a command, runs it, says what went wrong."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import shtab

from rfmedsam2_jax.base import command as process
from rfmedsam2_jax.base import interruption
from rfmedsam2_jax.base.accelerators import hide_libtpu
from rfmedsam2_jax.base.errors import RESUME, Stopped, UserError
from rfmedsam2_jax.base.places import word_or_path
from rfmedsam2_jax.base.progress import Passing
from rfmedsam2_jax.cli.console import Console, place_line
from rfmedsam2_jax.cli.copies import bring_copies

COMMANDS = ("train", "shard", "predict", "evaluate", "report", "track", "serve", "convert",
            "export", "install", "models", "fetch", "quickstart")
STATUSES = """exit status:
  0    done
  2    something that you can mend; one line says what
  75   stopped by SIGTERM and saved, or another process is gone: start again with --resume
  130  interrupted with Ctrl-C or SIGTERM; nothing is half-written"""
_INTERRUPTED = "interrupted; what was finished is kept"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
  """The options of one command, its `run` among them; exits where they are wrong."""
  parser, given = make_parser(), list(arguments)
  if given[:2] == ["convert", "nnunet"]:  # argparse would take the second word for a file
    given[:2] = ["convert-nnunet"]
  options, rest = parser.parse_known_args(given)
  # argparse takes positional arguments in one block only; overrides may also follow the options.
  if rest:
    if not hasattr(options, "overrides") or any("=" not in a or a[0] == "-" for a in rest):
      parser.error(f"unknown arguments: {' '.join(rest)}")
    options.overrides += rest
  return options


def main(arguments: Sequence[str] | None = None, command: str = "") -> int:
  """Runs one command; returns the exit status. See `cli.main`."""
  given = sys.argv[1:] if arguments is None else arguments
  options = parse([command, *given] if command else given)
  console = Console(options.quiet, options.as_json, command or "rfmedsam2")
  if arguments is None:
    _with_huge_pages()
    console.on_interruption(_INTERRUPTED)
    console.line(Passing("starting"))  # importing JAX takes seconds
  process.begin()
  hide_libtpu()
  _keep_programs()
  try:
    bring_copies(options, console.line)
    options.run(options, console)
    return 0
  except (UserError, Stopped) as error:
    message, status = str(error), 2 if isinstance(error, UserError) else RESUME
  except KeyboardInterrupt:
    message, status = _INTERRUPTED, interruption.STATUS
  except MemoryError:
    message, status = "not enough memory; close other programs, or give smaller volumes", 2
  except OSError as error:  # a write to an open file names none
    message, status = place_line(error, "a result could not be written"), 2
  console.error(message, status)
  return status


def _with_huge_pages() -> None:
  """Starts this program again, once: only at the start glibc reads whether to ask for huge pages.

  XLA:CPU allocates what lies between two operations anew for every call, and walks through it: page
  faults and misses of the address cache are what it waits for.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    signal.pthread_sigmask(signal.SIG_BLOCK, interruption.SIGNALS)  # they wait for `install`
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _keep_programs() -> None:
  """Compiled programs are kept between commands; set JAX_COMPILATION_CACHE_DIR to move them."""
  # By the environment: a command that fails on its arguments should not have to import JAX.
  cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rfmedsam2_jax"
  for name, value in (("jax_compilation_cache_dir", str(cache)),
                      ("jax_persistent_cache_min_compile_time_secs", 0.5)):
    given = os.environ.setdefault(name.upper(), str(value))
    if jax := sys.modules.get("jax"):
      jax.config.update(name, type(value)(given))


def make_parser() -> argparse.ArgumentParser:
  """The parser of all commands; importing their modules does not import JAX."""
  parser = argparse.ArgumentParser(
    prog="rfmedsam2", epilog=STATUSES, formatter_class=argparse.RawDescriptionHelpFormatter,
    description="Fully automatic segmentation of CT and MRI volumes with SAM 2, in JAX.")
  number = f"rfmedsam2 {version('rfmedsam2-jax')}"
  parser.add_argument("--version", action="version", version=number)
  shtab.add_argument_to(parser, "--print-completion",
                        help="the completion of a shell, see docs/commands.md")
  of_all = argparse.ArgumentParser(add_help=False)
  add = of_all.add_argument_group("what is said").add_argument
  add("--quiet", action="store_true", help="results, warnings and errors alone")
  add("--json", dest="as_json", action="store_true", help="lines of JSON, for programs")
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  for name in (*COMMANDS, "convert-nnunet"):
    module = importlib.import_module(f"rfmedsam2_jax.cli.{name.replace('-', '_')}")
    about = " ".join(str(module.__doc__).split()).partition(": ")[2].removesuffix(".")
    listed: dict[str, Any] = {"help": about} if name in COMMANDS else {}
    command = commands.add_parser(
      name, prog=f"rfmedsam2 {name.replace('-', ' ')}", parents=[of_all], description=about,
      **listed)
    module.arguments(command)
    command.set_defaults(run=module.run, command=name)
    for action in command._actions:
      if action.type in (Path, word_or_path):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
  return parser
