"""Where each array of a training state lies on the mesh, by its path, which optimizers repeat."""

import fnmatch
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rfmedsam2_jax.parallel.mesh import BATCH_AXES

# Axes of dense kernels [in, out] whose width is divided over `model`: layers that open a block by
# their columns, those that close it by their rows, so that only the end of a block is summed.
_COLUMNS, _ROWS = ("fsdp", "model"), ("model", "fsdp")
RULES = (
  ("*/attn/qkv/kernel", _COLUMNS), ("*/attn/proj/kernel", _ROWS),
  ("*/mlp/layers_0/kernel", _COLUMNS), ("*/mlp/layers_1/kernel", _ROWS),
  ("*/linear1/kernel", _COLUMNS), ("*/linear2/kernel", _ROWS),
)
# Arrays with fewer elements lie whole on every device: gathering them would cost more than they do.
SMALL = 2**12


class Placement(NamedTuple):
  """Where an array lies, and why."""
  spec: PartitionSpec
  reason: str


def placement(path: str, shape: Sequence[int], mesh: Mesh) -> Placement:
  """The rule for an array; `path` is its names, joined by "/"."""
  if math.prod(shape) < SMALL:
    return Placement(PartitionSpec(), f"fewer than {SMALL} elements")
  for pattern, axes in RULES:
    if fnmatch.fnmatchcase(path, pattern) and len(axes) == len(shape):
      fits = [axis if size % mesh.shape[axis] == 0 and mesh.shape[axis] > 1 else None
              for axis, size in zip(axes, shape, strict=True)]
      if any(fits) or mesh.size == 1:
        return Placement(PartitionSpec(*fits), f"rule {pattern}")
  parts = mesh.shape["fsdp"]
  if parts == 1:
    return Placement(PartitionSpec(), "fsdp is 1")
  fitting = [(size, axis) for axis, size in enumerate(shape) if size % parts == 0]
  if not fitting:
    return Placement(PartitionSpec(), f"no axis is a multiple of {parts}")
  return Placement(PartitionSpec(*[None] * max(fitting)[1], "fsdp"), "largest axis that divides")


def placements(tree: Any, mesh: Mesh) -> dict[str, Placement]:
  """Path and placement of every array of a tree."""
  leaves = ((path_of(path), x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree))
  return {path: placement(path, shape, mesh) for path, shape in leaves}


def specs(tree: Any, mesh: Mesh) -> Any:
  """PartitionSpecs, as the tree."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: placement(path_of(path), x.shape, mesh).spec, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
  """NamedShardings, as the tree."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh))


def path_of(path: Sequence[Any]) -> str:
  """Names of a key path joined by "/"; positions in tuples, which optimizers add, are left out."""
  names = (getattr(key, "key", getattr(key, "name", None)) for key in path)
  return "/".join(str(name) for name in names if name is not None)


def place(tree: Any, mesh: Mesh) -> Any:
  """Puts a tree of whole arrays, the same in every process, where the rules want it."""
  def put(x: Any, sharding: NamedSharding) -> jax.Array:
    if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
      data = put(jax.random.key_data(x), NamedSharding(mesh, PartitionSpec()))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  return jax.tree.map(put, tree, shardings(tree, mesh))


def whole(tree: Any, mesh: Mesh) -> Any:
  """The arrays of a tree, gathered: numpy, in every process."""
  return jax.tree.map(np.asarray, _gathering(mesh)(tree))


@functools.cache
def _gathering(mesh: Mesh) -> Callable[[Any], Any]:
  """One function of `jax.jit` for each mesh, which remembers what it has compiled."""
  return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def over_mesh(sums: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """Sums (params, batch, keys) of parameters that lie by the rules, and rows and keys on the mesh.

  Every device sums over its rows with whole parameters, which are gathered for it (their gradients
  are summed and scattered again); activations never leave the device, only the sums do.
  """
  if mesh.size == 1:
    return sums

  def spread(params: Any, batch: Any, keys: Any) -> Any:
    where = jax.tree.map(
      lambda spec: PartitionSpec(*(axis if axis == "fsdp" else None for axis in spec)),
      specs(params, mesh))

    def local(params: Any, batch: Any, keys: Any) -> Any:
      return jax.lax.psum(sums(jax.tree.map(_gather, params, where), batch, keys), BATCH_AXES)

    # Axes of one device too: where any is left to the compiler, cuDNN's attention is refused.
    axes = {axis for axis, size in mesh.shape.items() if axis in BATCH_AXES or size == 1}
    places = where, PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES)
    # The networks' loops start from constants, which the check would want marked as varying.
    return jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=PartitionSpec(),
                         axis_names=axes, check_vma=False)(params, batch, keys)

  return spread


def _gather(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  axes = tuple(spec)
  return jax.lax.all_gather(x, "fsdp", axis=axes.index("fsdp"), tiled=True) if "fsdp" in axes else x
