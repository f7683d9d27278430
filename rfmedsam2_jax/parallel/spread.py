"""Prediction on all devices of a host: rows that do not need each other, each device its share."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_AXIS = "rows"


@functools.cache
def _local_mesh() -> Mesh:
  return Mesh(np.array(jax.local_devices()), (_AXIS,))


def device_count() -> int:
  """Devices that rows are spread over: all of this process."""
  return _local_mesh().size


def everywhere(tree: Any) -> Any:
  """Puts arrays whole on every device of this process; those that are there already stay."""
  return jax.device_put(tree, NamedSharding(_local_mesh(), PartitionSpec()))


def spread(function: Callable[..., Any], static: Collection[int] = (),
           whole: Collection[int] = ()) -> Callable[..., Any]:
  """`jax.jit` of a function over rows, which every device computes for its share of them.

  Args:
    function: of positional arguments; its results have rows along their first axis.
    static: positions of hashable arguments that are compiled in.
    whole: positions of arguments that every device sees whole (parameters, stores): put them
      `everywhere` once. Others have rows, a multiple of `device_count()`, along their first axis.
  """
  @functools.partial(jax.jit, static_argnums=tuple(static))
  def run(*arguments: Any) -> Any:
    mesh = _local_mesh()
    if mesh.size == 1:
      return function(*arguments)
    traced = [i for i in range(len(arguments)) if i not in static]

    def share(*parts: Any) -> Any:
      given = dict(zip(traced, parts, strict=True))
      return function(*(given.get(i, argument) for i, argument in enumerate(arguments)))

    rows = PartitionSpec(_AXIS)
    places = tuple(PartitionSpec() if i in whole else rows for i in traced)
    # The networks' loops start from constants, which the check would want marked as varying.
    mapped = jax.shard_map(share, mesh=mesh, in_specs=places, out_specs=rows, check_vma=False)
    return mapped(*(arguments[i] for i in traced))

  return run
