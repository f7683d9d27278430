"""Shared by the tests: a tiny run, trained once for a few steps on small phantoms.

Its place also makes the helpers beside it (torch_sam2) importable from every test.
"""

import signal
from pathlib import Path

import jax
import pytest
from tiny_config import PHANTOMS, write_tiny_config

from rfmedsam2_jax.data.phantom import write_phantom


@pytest.fixture(autouse=True, scope="session")
def quick_compilation():
  """Networks of tests are so small that compiling them takes longer than running them.

  tests/nn switches it off: what is compared with the original there is compiled as users have it.
  """
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="session")
def signals_as_in_a_terminal():
  """A job in the background is started with some signals ignored; so would be what it starts."""
  for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
      default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
      signal.signal(number, default)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
  """Compiled programs of a module are of no use to the next, and would fill gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
  """A data set of four small labelled phantoms and two unseen ones."""
  folder = tmp_path_factory.mktemp("data") / "phantoms"
  return write_phantom(folder, PHANTOMS)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, phantoms) -> Path:
  return write_tiny_config(tmp_path_factory.mktemp("config"), phantoms)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_config) -> Path:
  """A finished run of the tiny config; its networks know nothing, but everything is there."""
  from rfmedsam2_jax.cli import main

  run = tmp_path_factory.mktemp("runs") / "tiny"
  assert main(["train", str(tiny_config), "--out", str(run)]) == 0
  return run
