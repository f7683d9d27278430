"""Mistakes put into stage-0 mask logits, so that the refiner learns to correct and not to copy.

The generator has seen its training cases: what it says of them is better than what it will say of
new ones. Pure numpy functions of (rng, array) for data.pipeline.
"""

import dataclasses
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field
from scipy import ndimage

from rfmedsam2_jax.base.constants import LOGIT_LIMIT
from rfmedsam2_jax.base.ranges import STRICT, Share


@dataclasses.dataclass(frozen=True)
class PromptCorruptionConfig:
  """Probabilities are per track (one structure in one run) unless they say per slice."""

  __pydantic_config__ = STRICT

  truth_probability: Share = 0.3  # start from the truth (+-8, smooth) instead of the generator
  morphology_probability: Share = 0.4  # grown or shrunk
  morphology: Annotated[int, Field(ge=0, le=64)] = 2  # greatest radius, pixels of the mask grid
  shift_probability: Share = 0.3
  shift: Annotated[int, Field(ge=0, le=64)] = 3  # greatest one of a track, likewise
  drop_probability: Share = 0.1  # per slice: the structure was not seen there
  lose_probability: Share = 0.03  # the structure was not seen in the whole run
  island_probability: Share = 0.15  # a false island in some consecutive slices
  island_radius: ClassVar[tuple[float, float]] = (1.5, 5.0)  # pixels of the mask grid
  noise_probability: Share = 0.3
  noise: Annotated[float, Field(ge=0, le=100)] = 4.0  # greatest deviation of smooth noise, logits


def logits_of_truth(occupancy: np.ndarray) -> np.ndarray:
  """Smooth mask logits within +-8 by the truth's sign, of float32 [..., m, m] in [0, 1]."""
  smooth = ndimage.gaussian_filter(occupancy, (0,) * (occupancy.ndim - 2) + (0.5, 0.5))
  return (16 * smooth - 8).astype(np.float32)


def corrupt(rng: np.random.Generator, logits: np.ndarray, config: PromptCorruptionConfig
            ) -> np.ndarray:
  """A copy of a track's mask logits, float32 [L, m, m] of L slices, with mistakes, within +-32."""
  logits = np.array(logits, np.float32)
  slices, side = logits.shape[0], logits.shape[-1]
  if rng.random() < config.morphology_probability and config.morphology:
    width = 2 * int(rng.integers(1, config.morphology + 1)) + 1
    change = ndimage.maximum_filter if rng.random() < 0.5 else ndimage.minimum_filter
    change(logits, size=(1, width, width), output=logits, mode="nearest")
  if rng.random() < config.shift_probability:
    dy, dx = rng.integers(-config.shift, config.shift + 1, 2)
    padded = np.pad(logits, ((0, 0), (config.shift,) * 2, (config.shift,) * 2), mode="edge")
    y, x = config.shift + dy, config.shift + dx
    logits = np.ascontiguousarray(padded[:, y : y + side, x : x + side])
  if rng.random() < config.noise_probability:
    noise = ndimage.gaussian_filter(
      rng.standard_normal(logits.shape, dtype=np.float32), (0.7, 2, 2), truncate=2.5)
    logits += np.float32(rng.uniform(0, config.noise)) * noise / max(float(noise.std()), 1e-6)
  if rng.random() < config.island_probability:
    centre = rng.uniform(0, side, 2)
    radius = rng.uniform(*config.island_radius)
    y, x = np.ogrid[:side, :side]
    distance = np.hypot(y - centre[0], x - centre[1])
    first = int(rng.integers(slices))
    last = int(rng.integers(first, min(first + 4, slices))) + 1
    island = np.clip(4 * (radius - distance), -LOGIT_LIMIT, 8).astype(np.float32)
    logits[first:last] = np.maximum(logits[first:last], island)
  logits[rng.random(slices) < config.drop_probability] = -LOGIT_LIMIT
  if rng.random() < config.lose_probability:
    logits[:] = -LOGIT_LIMIT
  return np.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT)
