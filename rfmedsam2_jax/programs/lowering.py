"""StableHLO of a function for devices that need not be in the machine that traces it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from rfmedsam2_jax.nn import Platform

# cuDNN's attention, forward and backward. jax.export vouches for no custom call that it does not
# know: such a program is for the version of JAX that made it, and for those that know the call.
CUDNN_CALLS = tuple(sorted(cudnn._custom_name_maps.values()))
_CUDNN = 91100  # the version that is answered: 9.11


def lowered(function: Callable, platform: Platform, *arguments: Any) -> jax.export.Exported:
  """The program of a function, jitted or not, whose networks are traced for `platform`.

  It names no file of this machine, so that the same function gives the same bytes everywhere.

  Args:
    arguments: of the function, as arrays or jax.ShapeDtypeStruct, whose dimensions may be symbolic.
  """
  name = "cuda" if platform.name == "gpu" else platform.name
  checks = [jax.export.DisabledSafetyCheck.custom_call(call) for call in CUDNN_CALLS]
  run: Any = function if hasattr(function, "trace") else jax.jit(function)
  with _without_places(), as_if_there(platform):
    return jax.export.export(run, platforms=[name], disabled_checks=checks)(*arguments)


@contextlib.contextmanager
def as_if_there(platform: Platform) -> Iterator[None]:
  """What JAX asks of a GPU and its cuDNN before it calls cuDNN is answered for `platform`.

  Otherwise it refuses, where there is no such GPU (jax 0.10.2).
  """
  capability = platform.capability or (0, 0)
  answers: dict[str, Callable] = {
    "check_cudnn_version": lambda: _CUDNN,
    "check_compute_capability": lambda asked: capability >= tuple(map(int, asked.split("."))),
    "is_cuda_compute_capability_equal": lambda asked: capability == tuple(
      map(int, asked.split("."))),
  }
  known = {name: getattr(cudnn, name) for name in answers}
  try:
    for name, answer in answers.items():
      setattr(cudnn, name, answer)
    yield
  finally:
    for name, answer in known.items():
      setattr(cudnn, name, answer)


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
  """Instructions do not say which line of which file made them."""
  settings: Any = jax.config
  before = settings.jax_traceback_in_locations_limit
  jax.config.update("jax_traceback_in_locations_limit", 0)
  try:
    yield
  finally:
    jax.config.update("jax_traceback_in_locations_limit", before)
