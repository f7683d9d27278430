"""What a person should know before trusting a segmentation: each notice is one sentence.

In: a volume and the fingerprint of the training cases, or the details of a segmentation. Out:
`Notice`s, which say what is unusual, compared to what, and what to do.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from rfmedsam2_jax.data.fingerprint import QUANTILES, image_quantiles
from rfmedsam2_jax.data.plan import ChannelRule
from rfmedsam2_jax.data.preprocessing import Restore
from rfmedsam2_jax.segmentation.config import WarningConfig
from rfmedsam2_jax.segmentation.segmenter import Segmenter
from rfmedsam2_jax.segmentation.structures import StructureDetails

_FEWEST = 3  # training cases, below which their distances say nothing about the next one's
_AXES = ("head-foot", "front-back", "left-right")
_SHARES = np.array(QUANTILES) / 100
_WIDTH = _SHARES[-1] - _SHARES[0]


@dataclasses.dataclass(frozen=True)
class Notice:
  """kind: of what it warns. message: one sentence for a person."""

  kind: Literal["stages", "spacing", "extent", "intensities", "file"]
  message: str


def input_notices(segmenter: Segmenter, restore: Restore, image: np.ndarray) -> Iterator[Notice]:
  """Where an input is far from the cases that were trained on; nothing if they are not known.

  Args:
    restore: of the prepared input. image: float32 [C, D, H, W], before it was prepared.
  """
  if segmenter.fingerprint is None:
    return
  config, cases = segmenter.inference.warnings, segmenter.fingerprint.cases
  spacings, cropped = np.array([case.spacing for case in cases]), segmenter.plan.crops_to_nonzero
  shapes = np.array([case.nonzero_shape if cropped else case.shape for case in cases])
  spacing = np.array(restore.native_spacing)
  size = spacing * (np.array(restore.upper) - np.array(restore.lower))
  yield from _outside(
    "spacing", "voxel size", spacing, spacings, config.spacing_factor,
    "check the header; if it is right, expect worse results or train with such volumes")
  yield from _outside(
    "extent", "field of view", size, shapes * spacings, config.extent_factor,
    "check that it shows what was trained on, and look at structures near its border")
  known = [case.quantiles for case in cases if case.quantiles is not None]
  if len(known) < _FEWEST:
    return
  channels = zip(segmenter.plan.channels, image_quantiles(image), strict=True)
  for channel, (rule, mine) in enumerate(channels):
    apart, among = _distances(mine, [quantiles[channel] for quantiles in known], rule)
    if apart > max(config.intensity_factor * among, config.intensity_distance):
      yield Notice("intensities", (
        f"the intensities of {rule.name} are {apart:.2f} standard deviations from those of the "
        f"nearest training case, where each of the {len(known)} training cases is within "
        f"{among:.2f} of another; check modality, units (Hounsfield for CT) and contrast phase, or "
        "train with such images"))


def _outside(
  kind: Literal["spacing", "extent"], what: str, values: np.ndarray, known: np.ndarray,
  factor: float, advice: str,
) -> Iterator[Notice]:
  """A notice per axis (z, y, x) on which mm lie beyond those of all cases [n, 3]."""
  lows, highs = known.min(axis=0), known.max(axis=0)
  for name, value, low, high in zip(_AXES, values, lows, highs, strict=True):
    if value > factor * high or value * factor < low:
      yield Notice(kind, f"the {what} along {name} is {_short(value)} mm, that of the {len(known)} "
                         f"training cases {_short(low)} to {_short(high)} mm; {advice}")


def _short(number: float) -> str:
  """Three digits, without an exponent."""
  return f"{float(f'{number:.3g}'):g}"


def stage_notices(
  structures: Mapping[str, StructureDetails], config: WarningConfig, coarse: bool = False
) -> Iterator[Notice]:
  """Structures that a stage saw otherwise than the last one.

  coarse: the generator's voxels are others than the stages', which are meant to change its masks:
  it counts only where nothing of its mask is left, or all is new.
  """
  for name, found in structures.items():
    apart = [(stage.dice_with_last, stage.stage, stage.volume_ml)
             for stage in found.stages if stage.dice_with_last is not None
             and not (coarse and stage.stage == 0 and stage.dice_with_last > 0)]
    dice, number, volume = min(apart, default=(math.inf, 0, 0.0))
    if dice < config.stage_dice:
      stage = f"stage {number}" if number else "the generator"
      yield Notice("stages", (
        f"{name}: {stage} found {_short(volume)} ml and the last stage {_short(found.volume_ml)} "
        f"ml with a Dice of {dice:.2f}, where stages usually agree by {config.stage_dice:.2f} or "
        "more; look at this structure in every stage (--save-stages)"))


def _distances(
  quantiles: Sequence[float], known: Sequence[Sequence[float]], rule: ChannelRule
) -> tuple[float, float]:
  """Of one channel, in standard deviations of the normalised intensities.

  The distance of two images is the mean difference of their quantiles (Wasserstein's, of order 1).

  Returns:
    The distance of an image to the nearest of the known (training) cases; the largest distance of
    one of these to the nearest other one.
  """
  theirs = np.array([_seen(one, rule) for one in known])
  nearest = float(_apart(_seen(quantiles, rule), theirs).min())
  among = np.array([_apart(one, theirs) for one in theirs])
  np.fill_diagonal(among, np.inf)
  return nearest, float(among.min(axis=1).max())


def _apart(one: np.ndarray, others: np.ndarray) -> np.ndarray:
  return np.trapezoid(np.abs(others - one), _SHARES, axis=-1) / _WIDTH


def _seen(quantiles: Sequence[float], rule: ChannelRule) -> np.ndarray:
  """Quantiles as the network sees them, normalised.

  Of CT, those of what lies above the lower end of the clip: how much air there is around a patient
  is the field of view's matter.
  """
  values = np.array(quantiles)
  if rule.kind == "ct":
    air = np.interp(rule.lower, values, _SHARES, left=0.0, right=1.0)
    rest = np.interp(air + (1 - air) * _SHARES, _SHARES, values)
    return (np.clip(rest, rule.lower, rule.upper) - rule.mean) / rule.std
  mean = np.trapezoid(values, _SHARES) / _WIDTH
  variance = np.trapezoid((values - mean) ** 2, _SHARES) / _WIDTH
  return (values - mean) / max(float(np.sqrt(variance)), 1e-8)
