"""How the programs of tests are compiled: quickly, but in tests/nn as users have them."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import jax
from jax._src import compiler

# Kernels by way of MLIR, XLA's way on CPUs. Without it, by LLVM alone, the small programs of tests
# compile in about half the time; what they compute is the same.
EMITTERS = "xla_cpu_use_fusion_emitters"
WITHOUT = f"--{EMITTERS}=false"


def without_emitters() -> None:
  """Sets XLA's flag for this process and those that it starts, before JAX looks at its devices.

  Not where jaxlib does not know the flag, at which it ends the process, nor where a program could
  not be compiled without it, as `emitters_with_optimizations` does.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if EMITTERS in flags or not hasattr(compiler, "get_compile_options"):
    return
  start = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.make_cpu_client()"]
  environment = os.environ | {"XLA_FLAGS": WITHOUT}
  if subprocess.run(start, env=environment, capture_output=True).returncode == 0:
    os.environ["XLA_FLAGS"] = f"{flags} {WITHOUT}".strip()


@contextlib.contextmanager
def emitters_with_optimizations() -> Iterator[None]:
  """Programs that are compiled with all optimizations have this one, too.

  XLA reads its flags once, but options of a single program go before them.
  """
  options = compiler.get_compile_options

  def with_emitters(*given, env_options_overrides=None, **named):
    if not jax.config.read("jax_disable_most_optimizations"):
      env_options_overrides = {EMITTERS: True} | (env_options_overrides or {})
    return options(*given, env_options_overrides=env_options_overrides, **named)

  if WITHOUT in os.environ.get("XLA_FLAGS", ""):
    with mock.patch.object(compiler, "get_compile_options", with_emitters):
      yield
  else:
    yield
