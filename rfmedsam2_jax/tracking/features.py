"""Features of a volume's slices: encoded a batch at a time, kept on the host."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rfmedsam2_jax.nn import SAM2, ImageFeatures
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.tracking.image import encode_images

_encode = jax.jit(encode_images, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
  """How objects are followed through a volume.

  `multimask` and `dynamic_multimask` are what `build_sam2_video_predictor` sets; a network that
  was trained with mask token 0 alone (as `nano` is) wants both off.
  """

  multimask: bool = True          # best of three masks on tracked slices and for one single point
  dynamic_multimask: bool = True  # for a box or several points: best of three where one is unstable
  memory_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of memories; SAM 2 keeps bfloat16
  slices_per_batch: int = 4       # encoded and swept in one call; device memory grows with it
  objects_per_batch: int = 8      # objects that step together; device memory grows with it
  cache: Literal["bfloat16", "float32", "none"] = "bfloat16"  # features kept on the host, so that
                                                             # corrections need not encode again

  def __post_init__(self):
    for name in ("slices_per_batch", "objects_per_batch"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


class FeatureStore:
  """Features of slices: encoded once, on the host where corrections may want them again."""

  def __init__(
    self,
    model: SAM2,
    params: Params,
    config: TrackingConfig,
    slices: Callable[[np.ndarray], np.ndarray],
  ):
    self._model, self._params, self._slices = model, params, slices
    self._batch = config.slices_per_batch
    self._dtype = None
    if config.cache != "none":
      self._dtype = np.dtype(ml_dtypes.bfloat16 if config.cache == "bfloat16" else np.float32)
    self._host: dict[int, ImageFeatures] = {}

  def get(self, slices: np.ndarray, keep: bool = False) -> ImageFeatures:
    """Features of slices on the device, padded at the end to whole batches.

    Args:
      keep: hold these as they are: prompted slices are few, and wanted twice.
    """
    numbers = [int(z) for z in slices]
    missing = [z for z in dict.fromkeys(numbers) if z not in self._host]
    fresh: dict[int, ImageFeatures] = {}
    for first in range(0, len(missing), self._batch):
      chunk = missing[first : first + self._batch]
      padded = np.pad(chunk, (0, self._batch - len(chunk)), mode="edge")
      features = _encode(self._model, self._params, self._slices(padded))
      if numbers == chunk and not keep:
        self._remember(chunk, jax.tree.map(np.asarray, features))
        return features
      host = jax.tree.map(np.asarray, features)
      fresh |= {z: jax.tree.map(lambda x, i=i: x[i], host) for i, z in enumerate(chunk)}
      self._remember(chunk, host, keep)
    wanted = numbers + [numbers[-1]] * (-len(numbers) % self._batch)
    rows = [fresh.get(z) or self._host[z] for z in wanted]
    dtype = self._model.config.compute_dtype
    return jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs).astype(dtype)), *rows)

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

  def _remember(self, numbers: list[int], features: ImageFeatures, keep: bool = False) -> None:
    if keep or self._dtype is not None:
      for i, z in enumerate(numbers):
        one = jax.tree.map(lambda x, i=i: x[i], features)
        self._host[z] = one if keep else jax.tree.map(lambda x: x.astype(self._dtype), one)
