"""`python -m rfmedsam2_jax` is the command `rfmedsam2`."""

import sys

from rfmedsam2_jax.cli import main

sys.exit(main())
