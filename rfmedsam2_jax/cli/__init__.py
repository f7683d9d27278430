"""The command line: one module per command, with `arguments`, `run`, and its help as docstring."""

import signal
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None, command: str = "") -> int:
  """Runs one command; returns the exit status. Without arguments it is the program itself.

  `command` is that of a program which is one command alone, as `python -m convert` is.
  """
  if arguments is None:
    # Before anything that takes time; `interruption` takes what came meanwhile.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    from rfmedsam2_jax.base import interruption
    interruption.install()
  from rfmedsam2_jax.cli import entry
  return entry.main(arguments, command)
