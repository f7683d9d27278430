"""Shared by the tests: one cache of compiled programs, and a tiny run of a few steps.

Its place also makes the helpers beside it (torch_sam2) importable from every test.
"""

import fcntl
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from compilation import emitters_with_optimizations, without_emitters
from order import long_files_first
from tiny_config import PHANTOMS, write_tiny_config

from rfmedsam2_jax.data.phantom import write_phantom

without_emitters()  # here, since some tests make arrays when they are imported
MOST_MEMORY = 3 << 30  # bytes of one process, beyond which it forgets its compiled programs


@pytest.hookimpl(trylast=True)  # after -m has left out tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  items[:] = long_files_first(items)


@pytest.fixture(scope="session")
def common(tmp_path_factory) -> Path:
  """A folder of this run of the tests, the same in all processes that share them."""
  own = tmp_path_factory.getbasetemp()
  return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
  """What the first process that asks makes at `path`, and all others wait for."""
  with open(path.with_name(f"{path.name}.lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = path.with_name(f"{path.name}.done")
    if not done.exists():
      make(path)
      done.touch()
  return path


@pytest.fixture(autouse=True, scope="session")
def one_cache_of_programs(common):
  """What one test has compiled none compiles again, in whatever process it runs."""
  settings = {
    "jax_compilation_cache_dir": str(common / "programs"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  for name, value in settings.items():
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="session")
def quick_compilation():
  """Networks of tests are so small that compiling them takes longer than running them.

  tests/nn switches it off: what is compared with the original there is compiled as users have it.
  """
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of the processes that tests start
  jax.config.update("jax_disable_most_optimizations", True)
  with emitters_with_optimizations():
    yield


@pytest.fixture(autouse=True, scope="session")
def signals_as_in_a_terminal():
  """A job in the background is started with some signals ignored; so would be what it starts."""
  for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
      default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
      signal.signal(number, default)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
  """What is compiled and traced serves later modules too, until it fills gigabytes."""
  yield
  pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
  if pages * resource.getpagesize() > MOST_MEMORY:
    jax.clear_caches()


@pytest.fixture(scope="session")
def phantoms(common) -> Path:
  """A data set of four small labelled phantoms and two unseen ones."""
  return made_once(common / "phantoms", lambda path: write_phantom(path, PHANTOMS))


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, phantoms) -> Path:
  return write_tiny_config(tmp_path_factory.mktemp("config"), phantoms)


@pytest.fixture(scope="session")
def tiny_run(common, tiny_config) -> Path:
  """A finished run of the tiny config; its networks know nothing, but everything is there.

  Shared by processes: whoever wants to change it takes a copy.
  """
  from rfmedsam2_jax.cli import main

  def train(path: Path) -> None:
    assert main(["train", str(tiny_config), "--out", str(path), "--overwrite"]) == 0

  return made_once(common / "tiny", train)
