"""SAM 2 as two functions on a parameter dict, for experiments."""

from typing import Any

from rfmedsam2_jax.nn.initialisation import init_params
from rfmedsam2_jax.nn.layers import Array
from rfmedsam2_jax.nn.sam2 import SAM2, SAM2Config


def init(config: SAM2Config, key: Array) -> dict[str, Any]:
  """Fresh parameters: a nested dict of float32 arrays with the official submodule names."""
  return init_params(config, key)


def apply(
  config: SAM2Config, params: dict[str, Any], *inputs: Any, method: str, **options: Any
) -> Any:
  """Runs one part of SAM 2: a pure function that `jax.jit`, `vmap` and `grad` take.

  Args:
    method: encode_image, remember, condition, unconditioned, decode or gate, see `SAM2`.
    inputs, options: of that method.
  """
  return SAM2(config).apply({"params": params}, *inputs, method=method, **options)
