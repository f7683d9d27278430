"""The command line: one module per command, with `arguments`, `run`, and its help as docstring."""

import signal
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None, command: str = "") -> int:
  """Runs one command (`command` if the program is that alone); returns the exit status."""
  if arguments is None:
    # The program itself. Before anything that takes time; `interruption` takes what came meanwhile.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    from rfmedsam2_jax.base import interruption
    interruption.install()
  from rfmedsam2_jax.cli import entry
  return entry.main(arguments, command)
