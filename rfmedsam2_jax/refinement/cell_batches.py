"""What refinement.refine gathers cells from: features of slices, and rows in batches of fixed size.

Batches have one size, and tables grow by doubling, so that volumes share compilations.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from rfmedsam2_jax.base.progress import Progress, Report, compiling
from rfmedsam2_jax.nn import SAM2, ImageFeatures
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.parallel.spread import everywhere, spread
from rfmedsam2_jax.refinement.stages import encode_slices
from rfmedsam2_jax.tracking.conditioning import power_of_two
from rfmedsam2_jax.tracking.features import FeatureStore

_encode = spread(encode_slices, static=[0], whole=[1])


def bucket(count: int, size: int) -> int:
  """The smallest size * 2^n that holds `count`."""
  return size * power_of_two(-(-count // size))


def padded(array: np.ndarray, count: int) -> np.ndarray:
  """Rows, `count` of them: the last one is repeated."""
  return np.pad(array, [(0, count - len(array))] + [(0, 0)] * (array.ndim - 1), mode="edge")


def batches(count: int, size: int) -> Iterator[np.ndarray]:
  """Index batches of fixed size; the last one repeats its last index."""
  for first in range(0, count, size):
    yield padded(np.arange(first, min(first + size, count)), size)


def joined(parts: list[Any], count: int) -> Any:
  """Rows of trees of numpy arrays one after the other, the first `count` of them."""
  return jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *parts)


def table(rows: Any, total: int) -> Any:
  """Rows padded to `total`, on every device."""
  # Joined and padded on the host: every number of parts would be compiled anew on the device.
  return everywhere(jax.tree.map(lambda x: padded(x, total), rows))


class SliceTable:
  """Features of the slices that live cells need, each encoded once, in a table of few sizes."""

  def __init__(
    self, model: SAM2, params: Params, slices: Callable[[np.ndarray], np.ndarray], batch: int
  ):
    encode = functools.partial(_encode, model, params)
    self._store = FeatureStore(encode, slices, batch, model.config.compute_dtype)
    self._program, self._batch = (model, batch), batch
    self.row_of: dict[int, int] = {}  # by slice number, see refine_volume
    self.features: ImageFeatures

  def need(self, wanted: np.ndarray, report: Report) -> None:
    """Encodes what is missing, batch by batch."""
    missing = [int(z) for z in wanted if int(z) not in self.row_of]
    new = compiling("the image encoder", _encode, self._program, report)
    progress = Progress("encoding, slices", report, new)
    for first in range(0, len(missing), self._batch):
      progress(first, len(missing))
      self._store.get(missing[first : first + self._batch])
    if missing:
      self.row_of |= {z: row for row, z in enumerate(missing, len(self.row_of))}
      self.features = table(self._store.held(list(self.row_of)), self.room)

  @property
  def room(self) -> int:
    """Rows of the table."""
    return bucket(len(self.row_of), self._batch)

  def rows(self, slices: np.ndarray) -> np.ndarray:
    return np.array([self.row_of[int(z)] for z in slices], np.int32)
