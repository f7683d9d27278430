"""`python -m convert` is the command `rfmedsam2 convert`, from a clone."""

import sys
from collections.abc import Sequence

from rfmedsam2_jax.cli import main as rfmedsam2


def main(arguments: Sequence[str] | None = None) -> int:
  """Converts one checkpoint; returns the exit status. Without arguments it is the program."""
  return rfmedsam2(arguments, "convert")


if __name__ == "__main__":
  sys.exit(main())
