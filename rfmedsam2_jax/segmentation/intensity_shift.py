"""How far an image's intensities are from those of the training cases, as the network sees them.

In: quantiles of images (data.fingerprint) and the plan's rule of a channel. Out: distances, of
which segmentation.notices makes a warning.
"""

from collections.abc import Sequence

import numpy as np

from rfmedsam2_jax.data.fingerprint import QUANTILES
from rfmedsam2_jax.data.plan import ChannelRule

_SHARES = np.array(QUANTILES) / 100


def distances(
  quantiles: Sequence[float], known: Sequence[Sequence[float]], rule: ChannelRule
) -> tuple[float, float]:
  """Of one channel, in standard deviations of the normalised intensities.

  The distance of two images is the mean difference of their quantiles (Wasserstein's, of order 1).

  Args:
    quantiles: of an image, see `image_quantiles`. known: of the training cases.
    rule: of the channel.

  Returns:
    The distance to the nearest training case; the largest distance of a training case to the
    nearest other one, 0 if there is only one.
  """
  mine = _seen(quantiles, rule)
  theirs = np.array([_seen(one, rule) for one in known])
  nearest = float(_apart(mine, theirs).min())
  if len(theirs) < 2:
    return nearest, 0.0
  among = np.array([_apart(one, theirs) for one in theirs])
  np.fill_diagonal(among, np.inf)
  return nearest, float(among.min(axis=1).max())


def _apart(one: np.ndarray, others: np.ndarray) -> np.ndarray:
  return np.trapezoid(np.abs(others - one), _SHARES, axis=-1) / (_SHARES[-1] - _SHARES[0])


def _seen(quantiles: Sequence[float], rule: ChannelRule) -> np.ndarray:
  """Quantiles after normalisation.

  Of CT, those of what lies above the lower end of the clip: how much air there is around a patient
  is the field of view's matter.
  """
  values = np.array(quantiles)
  if rule.kind == "ct":
    air = np.interp(rule.lower, values, _SHARES, left=0.0, right=1.0)
    rest = np.interp(air + (1 - air) * _SHARES, _SHARES, values)
    return (np.clip(rest, rule.lower, rule.upper) - rule.mean) / rule.std
  width = _SHARES[-1] - _SHARES[0]
  mean = np.trapezoid(values, _SHARES) / width
  variance = np.trapezoid((values - mean) ** 2, _SHARES) / width
  return (values - mean) / max(float(np.sqrt(variance)), 1e-8)
