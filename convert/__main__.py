"""`python -m convert`, see convert.command."""

import sys
from collections.abc import Sequence

from rfmedsam2_jax.base import interruption


def main(arguments: Sequence[str] | None = None) -> int:
  """Converts one checkpoint; returns the exit status. Without arguments it is the program."""
  if arguments is None:
    interruption.install()  # before anything that takes time
  from convert import command

  return command.main(arguments)


if __name__ == "__main__":
  sys.exit(main())
