"""What a data set looks like: spacings, shapes, intensities of what is segmented.

In: cases (data.datasets). Out: a `Fingerprint`, from which data.plan makes the plan.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from rfmedsam2_jax.data.datasets import IGNORED, Case, Dataset, Labels, read_case
from rfmedsam2_jax.data.files import STRICT
from rfmedsam2_jax.data.volumes import Volume

# Foreground voxels drawn from all cases together; enough for percentiles, and it fits in memory.
SAMPLED_VOXELS = 20_000_000

# Per cent, of a whole image's intensities; not quite to the ends, which single voxels decide.
QUANTILES = (0.5, *range(5, 100, 5), 99.5)
_DRAWN_FOR_QUANTILES = 1_000_000  # voxels


@dataclasses.dataclass(frozen=True)
class ChannelStatistics:
  """Intensities of one channel over the foreground voxels of all cases."""

  __pydantic_config__ = STRICT

  mean: float
  std: float
  median: float
  percentile_00_5: float
  percentile_99_5: float
  minimum: float
  maximum: float


@dataclasses.dataclass(frozen=True)
class CaseFingerprint:
  """One case, axes (z, y, x).

  Attributes:
    spacing: mm.
    shape: voxels.
    nonzero_shape: voxels of the box around the voxels that are not 0 in any channel.
    structure_voxels: number of voxels of each structure.
    quantiles: per channel, of the whole image, see `image_quantiles`; None in older runs.
  """

  __pydantic_config__ = STRICT

  identifier: str
  spacing: tuple[float, float, float]
  shape: tuple[int, int, int]
  nonzero_shape: tuple[int, int, int]
  structure_voxels: tuple[int, ...]
  quantiles: tuple[tuple[float, ...], ...] | None = None

  def __post_init__(self):
    numbers = (*self.spacing, *self.shape, *self.nonzero_shape)
    if not all(math.isfinite(n) and n > 0 for n in numbers):
      raise ValueError(f"case {self.identifier} has sizes that are not above 0")
    for row in self.quantiles or ():
      if len(row) != len(QUANTILES) or not all(map(math.isfinite, row)):
        raise ValueError(f"case {self.identifier} has quantiles that are not {len(QUANTILES)} "
                         "finite numbers")


@dataclasses.dataclass(frozen=True)
class Fingerprint:
  """Of a data set; `intensities` is None where no case has foreground."""

  __pydantic_config__ = STRICT

  name: str
  channels: tuple[str, ...]
  labels: Labels
  cases: tuple[CaseFingerprint, ...]
  intensities: tuple[ChannelStatistics, ...] | None

  def __post_init__(self):
    known = [case.quantiles for case in self.cases if case.quantiles is not None]
    if not self.cases or any(len(rows) != len(self.channels) for rows in known):
      raise ValueError("its cases are none, or have other channels")


def make_fingerprint(dataset: Dataset, cases: Sequence[Case] | None = None, seed: int = 1234,
                     progress: Callable[[int, int], None] = lambda done, total: None
                     ) -> Fingerprint:
  """Reads every case once.

  Args:
    cases: those to look at; None: all of the data set.
    seed: of the drawing of foreground voxels; each case draws its own.
    progress: called with (cases done, cases in all).

  Raises:
    UserError: a case that cannot be read, or labels outside dataset.json.
  """
  cases = dataset.cases if cases is None else cases
  limit = max(1, SAMPLED_VOXELS // len(cases))
  found, samples = [], []
  progress(0, len(cases))
  for done, case in enumerate(cases, 1):
    volume, atoms = read_case(case, len(dataset.channels), dataset.labels)
    assert atoms is not None, "training cases have labels"
    rng = np.random.default_rng([seed, zlib.crc32(case.identifier.encode())])
    found.append(fingerprint_case(case.identifier, volume, atoms, dataset.labels))
    samples.append(sample_foreground(volume.array, atoms, limit, rng))
    progress(done, len(cases))
  return Fingerprint(dataset.name, dataset.channels, dataset.labels, tuple(found),
                     channel_statistics(np.concatenate(samples, axis=1)))


def fingerprint_case(identifier: str, volume: Volume, atoms: np.ndarray,
                     labels: Labels) -> CaseFingerprint:
  """Of one case; atoms uint8 [D, H, W]."""
  counts = np.bincount(atoms.ravel(), minlength=len(labels.membership))[:len(labels.membership)]
  lower, upper = nonzero_box(volume.array)
  shape = volume.array.shape[1:]
  return CaseFingerprint(
    identifier, volume.spacing, (shape[0], shape[1], shape[2]),
    (upper[0] - lower[0], upper[1] - lower[1], upper[2] - lower[2]),
    tuple(int(n) for n in counts @ labels.membership), image_quantiles(volume.array))


def image_quantiles(image: np.ndarray) -> tuple[tuple[float, ...], ...]:
  """`QUANTILES` of every channel's voxels that are not 0 (of all, where there are no others).

  Of large volumes they are estimated from voxels that are drawn, always the same ones.

  Args:
    image: float32 [C, D, H, W].
  """
  rows = []
  for values in image.reshape(len(image), -1):
    if values.size > _DRAWN_FOR_QUANTILES:
      drawn = np.random.default_rng(0).integers(0, values.size, _DRAWN_FOR_QUANTILES)
      values = values[drawn]
    known = values[values != 0]
    found = np.percentile(known if known.size else values, QUANTILES)
    rows.append(tuple(float(f"{value:.6g}") for value in found))
  return tuple(rows)


def sample_foreground(image: np.ndarray, atoms: np.ndarray, limit: int,
                      rng: np.random.Generator) -> np.ndarray:
  """float32 [C, n <= limit]: intensities of voxels of any structure, without repetition."""
  places = np.flatnonzero((atoms != 0) & (atoms != IGNORED))
  if len(places) > limit:
    places = np.sort(rng.choice(places, limit, replace=False))
  return image.reshape(len(image), -1)[:, places]


def channel_statistics(samples: np.ndarray) -> tuple[ChannelStatistics, ...] | None:
  """Of float32 [C, n]; None if there is nothing."""
  if not samples.shape[1]:
    return None
  rows = []
  for values in samples:
    low, median, high = np.percentile(values, (0.5, 50, 99.5))
    rows.append(ChannelStatistics(
      float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64)), float(median),
      float(low), float(high), float(values.min()), float(values.max())))
  return tuple(rows)


def nonzero_box(image: np.ndarray) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
  """The box around voxels that are not 0 in any channel; the whole volume if there are none.

  Args:
    image: [C, D, H, W].

  Returns:
    First index and index behind the last, (z, y, x).
  """
  mask = (image != 0).any(axis=0)
  (box,) = ndimage.find_objects(mask.view(np.uint8), 1)
  z, y, x = box or (slice(0, size) for size in mask.shape)
  return (z.start, y.start, x.start), (z.stop, y.stop, x.stop)
