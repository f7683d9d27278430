"""What a data set looks like: spacings, shapes, intensities of what is segmented."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from rfmedsam2_jax.data.datasets import IGNORED, Case, Dataset, Labels, read_case
from rfmedsam2_jax.data.files import Stored
from rfmedsam2_jax.data.volumes import Volume

# Foreground voxels drawn from all cases together; enough for percentiles, and it fits in memory.
SAMPLED_VOXELS = 20_000_000
# Per cent, of a whole image's intensities; not quite to the ends, which single voxels decide.
QUANTILES = (0.5, *range(5, 100, 5), 99.5)
_DRAWN_FOR_QUANTILES = 1_000_000  # voxels


@dataclasses.dataclass(frozen=True)
class ChannelStatistics(Stored):
  """Intensities of one channel over the foreground voxels of all cases."""

  mean: float
  std: float
  median: float
  percentile_00_5: float
  percentile_99_5: float
  minimum: float
  maximum: float


@dataclasses.dataclass(frozen=True)
class CaseFingerprint(Stored):
  """One case, axes (z, y, x)."""

  identifier: str
  spacing: tuple[float, float, float]  #: mm
  shape: tuple[int, int, int]  #: voxels
  nonzero_shape: tuple[int, int, int]  #: voxels of the box around those not 0 in any channel
  structure_voxels: tuple[int, ...]  #: number of voxels of each structure
  #: Per channel, of the whole image, see `image_quantiles`; None in older runs.
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
class Fingerprint(Stored):
  """Of a data set; `intensities` is None where no case has foreground."""

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
  """Reads every case once; UserError if one cannot be read or has labels outside dataset.json.

  Without `cases`, all of the data set. Each draws its own foreground voxels, by `seed`. `progress`
  is called with (cases done, cases in all).
  """
  cases = dataset.cases if cases is None else cases
  limit = max(1, SAMPLED_VOXELS // len(cases))
  found, samples = [], []
  progress(0, len(cases))
  for done, case in enumerate(cases, 1):
    volume, atoms = read_case(case, len(dataset.channels), dataset.labels)
    assert atoms is not None, "training cases have labels"
    rng = np.random.default_rng([seed, zlib.crc32(case.identifier.encode())])
    found.append(_fingerprint_case(case.identifier, volume, atoms, dataset.labels))
    places = draw_places((atoms != 0) & (atoms != IGNORED), limit, rng)
    samples.append(volume.array.reshape(len(volume.array), -1)[:, places])
    progress(done, len(cases))
  return Fingerprint(dataset.name, dataset.channels, dataset.labels, tuple(found),
                     _channel_statistics(np.concatenate(samples, axis=1)))


def _fingerprint_case(identifier: str, volume: Volume, atoms: np.ndarray, labels: Labels
                      ) -> CaseFingerprint:
  counts = np.bincount(atoms.ravel(), minlength=len(labels.membership))[:len(labels.membership)]
  a, b, c = np.diff(nonzero_box(volume.array), axis=0)[0].tolist()
  return CaseFingerprint(
    identifier, volume.spacing, volume.geometry.canonical_shape, (a, b, c),
    tuple(int(n) for n in counts @ labels.membership), image_quantiles(volume.array))


def image_quantiles(image: np.ndarray) -> tuple[tuple[float, ...], ...]:
  """`QUANTILES` of voxels that are not 0 (else of all) of every channel of float32 [C, D, H, W].

  Of large volumes they are estimated from voxels that are drawn, always the same ones.
  """
  rows = []
  for values in image.reshape(len(image), -1):
    if values.size > _DRAWN_FOR_QUANTILES:
      values = values[np.random.default_rng(0).integers(0, values.size, _DRAWN_FOR_QUANTILES)]
    known = values[values != 0]
    found = np.percentile(known if known.size else values, QUANTILES)
    rows.append(tuple(float(f"{value:.6g}") for value in found))
  return tuple(rows)


def draw_places(mask: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
  """int [n <= limit]: flat indices in a mask where it is true, rising, without repetition."""
  places = np.flatnonzero(mask)
  return places if len(places) <= limit else np.sort(rng.choice(places, limit, replace=False))


def _channel_statistics(samples: np.ndarray) -> tuple[ChannelStatistics, ...] | None:
  """Of float32 [C, n]; None if there is nothing."""
  if not samples.shape[1]:
    return None
  return tuple(ChannelStatistics(*map(float, (
    values.mean(dtype=np.float64), values.std(dtype=np.float64),
    *np.percentile(values, (50, 0.5, 99.5)), values.min(), values.max()))) for values in samples)


def nonzero_box(image: np.ndarray) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
  """First index and index behind the last (z, y, x) of what is not 0 in [C, D, H, W], or of all."""
  mask = (image != 0).any(axis=0)
  (box,) = ndimage.find_objects(mask.view(np.uint8), 1)
  z, y, x = box or (slice(0, size) for size in mask.shape)
  return (z.start, y.start, x.start), (z.stop, y.stop, x.stop)
