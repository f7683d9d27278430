"""A command in a process of its own, as a host has one; leases are of seconds, not of minutes."""

import sys

from rfmedsam2_jax.base import leases
from rfmedsam2_jax.cli import main

leases.BEAT, leases.LIFE = 0.3, 2.0

if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
