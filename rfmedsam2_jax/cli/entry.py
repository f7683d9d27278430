"""The command `rfmedsam2`: finds the module of a command, runs it, says what went wrong."""

import argparse
import errno
import functools
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import shtab

from rfmedsam2_jax.base import interruption
from rfmedsam2_jax.base.errors import RESUME, Stopped, UserError
from rfmedsam2_jax.base.progress import Passing
from rfmedsam2_jax.cli.console import Console

COMMANDS = ("train", "shard", "predict", "evaluate", "report", "track", "serve", "quickstart")

STATUSES = """exit status:
  0    done
  2    something that you can mend; one line says what
  75   stopped by SIGTERM and saved, or another process is gone: start again with --resume
  130  interrupted with Ctrl-C or SIGTERM; nothing is half-written"""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# glibc then asks for huge pages. XLA:CPU allocates what lies between two operations anew for every
# call, and walks through it: page faults and misses of the address cache are what it waits for.
_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def _with_huge_pages() -> None:
  """Starts this process again, once, with a setting that glibc reads at the start only."""
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = _HUGE_PAGES
    interruption.block()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status."""
  parser = make_parser()
  options, rest = parser.parse_known_args(arguments)
  # argparse takes positional arguments in one block only; overrides may also follow the options.
  if rest and not (hasattr(options, "overrides") and all("=" in a and a[0] != "-" for a in rest)):
    parser.error(f"unknown arguments: {' '.join(rest)}")
  if rest:
    options.overrides += rest
  if arguments is None:
    _with_huge_pages()
  console = Console(options.quiet, options.as_json)
  if arguments is None:
    console.on_interruption("interrupted; what was finished is kept")
    console.line(Passing("starting"))  # importing JAX takes seconds
  _set_up_jax()
  message, status = _run(options, console)
  if status:
    console.error(message, status)
  return status


def _run(options: argparse.Namespace, console: Console) -> tuple[str, int]:
  """Why the command failed, and its exit status."""
  try:
    options.run(options, console)
  except UserError as error:
    return str(error), 2
  except Stopped as stopped:
    return str(stopped), RESUME
  except KeyboardInterrupt:
    return "interrupted; what was finished is kept", 130
  except MemoryError:
    return "not enough memory; close other programs, or give smaller volumes", 2
  except OSError as error:
    # A write to an open file names none.
    return place_line(error, "a result could not be written"), 2
  return "", 0


def place_line(error: OSError, unnamed: str) -> str:
  """The line about a file that cannot be read or written; raises what is no such error.

  Args:
    unnamed: stands for the file where a full disk names none.
  """
  if error.filename is None and error.errno not in _FULL:
    raise error
  return f"{error.filename or unnamed}: {error.strerror}; free it or choose another place"


def quiet_libraries() -> None:
  """What they warn of is no news to who runs a command; errors are."""
  for name in ("absl", "orbax", "jax"):
    logging.getLogger(name).setLevel(logging.ERROR)
  _ignore_late_answers()


@functools.cache
def _ignore_late_answers() -> None:
  """Keeps TensorStore's threads and asyncio from printing that nobody waits for them any more.

  The first file of a checkpoint that cannot be read is raised, and ends Orbax's event loop while
  others are still being read: their tasks then fail by the dozen.
  """
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore", r"coroutine '\w+Handler\.", RuntimeWarning)
  before = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      before(unraisable)

  sys.unraisablehook = hook


def _set_up_jax() -> None:
  import jax

  # Compiled programs are kept between commands; set JAX_COMPILATION_CACHE_DIR to move them.
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "rfmedsam2_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  quiet_libraries()


def make_parser() -> argparse.ArgumentParser:
  """The parser of all commands; importing their modules does not import JAX."""
  parser = argparse.ArgumentParser(
    prog="rfmedsam2",
    description="Fully automatic segmentation of CT and MRI volumes with SAM 2, in JAX.",
    epilog=STATUSES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--version", action="version", version=f"rfmedsam2 {version('rfmedsam2-jax')}"
  )
  shtab.add_argument_to(
    parser, "--print-completion", help="the completion of a shell, see docs/commands.md"
  )
  of_all = argparse.ArgumentParser(add_help=False)
  Console.arguments(of_all)
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  for name in COMMANDS:
    module = importlib.import_module(f"rfmedsam2_jax.cli.{name}")
    command = commands.add_parser(name, help=module.HELP, parents=[of_all])
    module.arguments(command)
    command.set_defaults(run=module.run)
    for action in command._actions:
      if action.type is Path:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
  return parser
