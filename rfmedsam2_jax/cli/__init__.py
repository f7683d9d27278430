"""The command line: one module per command, each with HELP, `arguments` and `run`."""

from rfmedsam2_jax.cli.entry import main

__all__ = ["main"]
