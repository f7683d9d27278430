"""Features of a volume's slices: encoded a batch at a time, kept on the host."""

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.nn import ImageFeatures


class FeatureStore:
  """Features of slices, each encoded once; held on the host where they may be wanted again.

  Args:
    encode: makes features of images [batch, S, S, 3]. batch: slices that are encoded at once.
    slices: gives such images for slice numbers [batch].
    dtype: of what is held; None: hold only what `get` is told to keep.
  """

  def __init__(
    self, encode: Callable[[np.ndarray], ImageFeatures], slices: Callable[[np.ndarray], np.ndarray],
    batch: int, dtype: np.dtype | None,
  ):
    self._encode, self._slices, self._batch, self._dtype = encode, slices, batch, dtype
    self._host: dict[int, ImageFeatures] = {}

  def get(self, slices: Sequence[int] | np.ndarray, keep: bool = False) -> ImageFeatures:
    """Features of slices on the device, padded at the end to whole batches.

    `keep` holds these as they are: prompted slices are few, and wanted twice.
    """
    numbers = [int(z) for z in slices]
    missing = [z for z in dict.fromkeys(numbers) if z not in self._host]
    fresh: dict[int, ImageFeatures] = {}
    for first in range(0, len(missing), self._batch):
      chunk = missing[first : first + self._batch]
      padded = np.pad(chunk, (0, self._batch - len(chunk)), mode="edge")
      features = self._encode(self._slices(padded))
      self._computed = features.embedding.dtype
      host = jax.tree.map(np.asarray, features)
      rows = {z: jax.tree.map(lambda x, i=i: x[i], host) for i, z in enumerate(chunk)}
      if keep:
        self._host |= rows
      elif self._dtype is not None:
        self._host |= jax.tree.map(lambda x: x.astype(self._dtype, copy=False), rows)
      if numbers == chunk and not keep:
        return features
      fresh |= rows
    wanted = numbers + [numbers[-1]] * (-len(numbers) % self._batch)
    return jax.tree.map(
      lambda *xs: jnp.asarray(np.stack(xs).astype(self._computed)),
      *(fresh.get(z) or self._host[z] for z in wanted),
    )

  def held(self, slices: Sequence[int]) -> ImageFeatures:
    """Features of slices that are held, numpy arrays."""
    return jax.tree.map(lambda *xs: np.stack(xs), *(self._host[z] for z in slices))

  def ahead(self, batches: Sequence[np.ndarray]) -> Iterator[ImageFeatures]:
    """Features of one batch of slices after the other; each is made while the last is used."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      made = None
      for slices in batches:
        made, ready = pool.submit(self.get, slices), made
        if ready:
          yield ready.result()
      if made:
        yield made.result()
