"""How synthetic anatomy looks: intensities of its tissues, and what a scanner adds to them.

Intensities are those that are shown, 0 to 1, and may leave that range until the very end. A palette
is of one picture: CT in Hounsfield units through some window, MRI in which any tissue may be bright
or dark, no order at all (the domain randomisation of SynthSeg, Billot et al. 2023), or plain
tissues that differ clearly, under little noise.
"""

import dataclasses
from typing import Literal

import numpy as np
from scipy import ndimage

from rfmedsam2_jax.data.synthetic_shapes import log_uniform, smooth_field

Modality = Literal["ct", "mr", "any", "plain"]

# Hounsfield units: the lowest and highest mean of a tissue, and the deviation of its texture.
_HOUNSFIELD = {
  "air": (-1000, -1000, 0), "gas": (-1000, -850, 8), "lung": (-880, -600, 50),
  "fat": (-120, -70, 10), "fluid": (-5, 25, 3), "muscle": (35, 75, 9), "organ": (20, 120, 7),
  "blood": (60, 380, 7), "wall": (20, 110, 8), "marrow": (80, 380, 60), "cortex": (350, 1500, 120),
  "food": (0, 110, 40), "skin": (0, 60, 10),
}
# The same of MRI, where blood, fluid, fat and marrow are bright in some sequences, dark in others.
_BRIGHTNESS = {
  "air": (0, 0, 0), "gas": (0, 0.04, 0.01), "lung": (0.02, 0.16, 0.03), "fat": (0.1, 1.0, 0.05),
  "fluid": (0.05, 1.0, 0.03), "muscle": (0.1, 0.5, 0.03), "organ": (0.1, 0.8, 0.03),
  "blood": (0.02, 1.0, 0.04), "wall": (0.1, 0.6, 0.03), "marrow": (0.1, 0.9, 0.05),
  "cortex": (0, 0.1, 0.02), "food": (0.1, 0.9, 0.1), "skin": (0.2, 0.8, 0.03),
}
# How far parts of one tissue are from each other in one picture: least and most, of its range.
_SPREAD = {"organ": (0.1, 0.8), "wall": (0.1, 0.8), "food": (0.5, 1.0)}
_OTHERS = (0.03, 0.2)
_CLEARLY = 0.07, 0.25  # how far plain tissues are from what lies around them, at least
_DRAWS = 5  # intensities tried, where a part should differ from what lies around it


@dataclasses.dataclass(frozen=True)
class Tissue:
  value: float
  texture: float = 0.0  # standard deviation of what varies inside
  grain: int = 0  # which of the scene's textures
  flips: tuple[int, ...] = (1, 1, 1)  # from which side it is seen


class Palette:
  """The tissues of one picture.

  Attributes:
    window: the Hounsfield units that CT shows as 0 and 1.
    noise: standard deviation of what the scanner will add.
  """

  GRAINS = 5

  def __init__(self, rng: np.random.Generator, modality: Modality):
    self.rng, self.modality, self.window = rng, modality, (0.0, 1.0)
    if modality == "ct":
      self.window = _window(rng)
    if modality == "mr":
      self.noise = log_uniform(rng, 0.004, 0.06)
    else:
      width = self.window[1] - self.window[0] if modality == "ct" else 700
      self.noise = min(log_uniform(rng, 3, 30) / width, 0.12)
    self._roughness = float(np.exp(rng.normal(0.1, 0.5)))
    # Mean, spread and texture of every tissue.
    self._tissues: dict[str, tuple[float, float, float]] = {}
    for name, (low, high, texture) in (_HOUNSFIELD if modality == "ct" else _BRIGHTNESS).items():
      mean = rng.uniform(low, high)
      spread = (high - low) * rng.uniform(*_SPREAD.get(name, _OTHERS))
      if modality == "ct" and name == "blood" and rng.random() < 0.3:
        mean, spread = rng.uniform(35, 60), 10  # without contrast medium
      if modality == "mr" and name == "fat" and rng.random() < 0.3:
        mean = rng.uniform(0.03, 0.2)  # suppressed
      if modality == "any" and (name != "air" or rng.random() < 0.2):
        mean, spread, texture = rng.random(), rng.uniform(0.1, 0.6), rng.uniform(0.01, 0.08)
      if modality == "plain":  # any intensity for every part, see `tissue`
        mean, spread, texture = 0.5, 0.5, rng.uniform(0, 0.04)
      self._tissues[name] = mean, spread, texture

  def tissue(self, name: str, apart_from: float | None = None) -> Tissue:
    """A part's own tissue; most differ a little at least from the intensity that is around them."""
    rng = self.rng
    low, high = self.window
    mean, spread, texture = self._tissues[name]
    values = (mean + spread * rng.uniform(-1, 1, _DRAWS) - low) / (high - low)
    least = rng.uniform(0.03, 0.12) + rng.uniform(0, 1.5) * self.noise
    if self.modality == "plain":
      least = rng.uniform(*_CLEARLY)
    elif rng.random() < 0.1:
      least = 0.0
    away = np.abs(np.clip(values, 0, 1) - (9 if apart_from is None else np.clip(apart_from, 0, 1)))
    chosen = int(np.argmax(away >= least if (away >= least).any() else away))
    return Tissue(
      float(values[chosen]),
      float(texture / (high - low) * self._roughness * rng.uniform(0.3, 1.6)),
      int(rng.integers(self.GRAINS)), tuple(int(f) for f in 2 * rng.integers(0, 2, 3) - 1))


def _window(rng: np.random.Generator) -> tuple[float, float]:
  kind = rng.random()
  if kind < 0.5:  # a radiologist's
    centre, width = rng.uniform(30, 110), log_uniform(rng, 250, 700)
    return centre - width / 2, centre + width / 2
  if kind < 0.75:  # percentiles of a volume with its air
    return -1000.0, rng.uniform(200, 900)
  return rng.uniform(-900, -20), rng.uniform(200, 1200)  # percentiles of structures


def acquire(rng: np.random.Generator, image: np.ndarray, palette: Palette) -> np.ndarray:
  """What a scanner makes of slices [L, H, W]: blur, artefacts, noise; float32 cut to [0, 1]."""
  if palette.modality == "plain":
    image = _blur(image, rng.uniform(0, 0.7))
    noise = np.float32(log_uniform(rng, 0.003, 0.06))
    return np.clip(image + noise * rng.standard_normal(image.shape, dtype=np.float32), 0, 1)
  if palette.modality == "ct" or (palette.modality == "any" and rng.random() < 0.4):
    image = _tomography(rng, image, palette.noise)
  else:
    image = _resonance(rng, image, palette.noise)
  if rng.random() < 0.15:  # another window
    image = image * np.float32(rng.uniform(0.7, 1.3)) + np.float32(rng.uniform(-0.1, 0.1))
  image = np.clip(image, 0, 1)
  if rng.random() < 0.25:
    image = image ** np.float32(np.exp(rng.normal(0, 0.3)))
  return 1 - image if palette.modality == "any" and rng.random() < 0.3 else image


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
  return ndimage.gaussian_filter(image, (0, sigma, sigma), truncate=2.5) if sigma > 0.25 else image


def _tomography(rng: np.random.Generator, image: np.ndarray, deviation: float) -> np.ndarray:
  """Point spread, edges that a sharp kernel exaggerates, noise with a grain, streaks."""
  image = _blur(image, rng.uniform(0, 0.9))
  if rng.random() < 0.25:
    image = image + np.float32(rng.uniform(0.2, 0.9)) * (image - _blur(image, 1.0))
  grain = rng.uniform(0, 1.1)
  noise = _blur(rng.standard_normal(image.shape, dtype=np.float32), grain)
  # What blurring took of the deviation, roughly.
  noise *= np.float32(deviation * (1 + 3.0 * max(grain - 0.25, 0)))
  if rng.random() < 0.3:
    noise += np.float32(deviation * rng.uniform(0.3, 1.2)) * _streaks(rng, image.shape)
  return image + noise


def _streaks(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  """Noise that is back-projected from few directions, most of them close to one; deviation 1."""
  depth, height, width = shape
  y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
  out, main = np.zeros(shape, np.float32), rng.uniform(0, np.pi)
  bins, directions = max(height, width), 8
  for angle in rng.normal(main, 0.35, directions):
    place = ((np.cos(angle) * y + np.sin(angle) * x + 1.5) * (bins / 3)).astype(np.intp)
    profile = rng.standard_normal((depth, bins), dtype=np.float32)
    out += np.take(profile, place, axis=1)
  return out / np.float32(np.sqrt(directions))


def _resonance(rng: np.random.Generator, image: np.ndarray, deviation: float) -> np.ndarray:
  """Bias of the coil, gain per slice, ringing of a finite k-space, ghosts, Rician noise."""
  image, shape = np.maximum(image, 0), image.shape
  if rng.random() < 0.8:
    bias = smooth_field(rng, shape, (shape[0] * 1.5, shape[1] * 0.6, shape[2] * 0.6))
    image *= np.exp(np.float32(rng.uniform(0.03, 0.35)) * bias)
  if rng.random() < 0.3:
    image *= np.exp(rng.normal(0, 0.08, (shape[0], 1, 1))).astype(np.float32)
  image = _blur(image, rng.uniform(0, 1.0))
  if rng.random() < 0.3:
    # A sinc of a few lobes: what is left when high frequencies are cut off along both axes.
    kernel = np.sinc(np.arange(-5, 6) * rng.uniform(0.55, 0.9)) * np.hamming(11)
    for axis in (1, 2):
      image = ndimage.correlate1d(image, kernel / kernel.sum(), axis)
  if rng.random() < 0.15:
    axis = int(rng.integers(1, 3))
    moved = np.roll(image, int(shape[axis] * rng.uniform(0.1, 0.5)), axis)
    image = image + np.float32(rng.uniform(0.02, 0.12)) * moved
  real, imaginary = np.float32(deviation) * rng.standard_normal((2, *shape), dtype=np.float32)
  real += image
  real *= real
  imaginary *= imaginary
  real += imaginary
  image = np.sqrt(real)
  if rng.random() < 0.7:  # the window's upper end is a percentile
    top = np.percentile(image[:, ::2, ::2], rng.uniform(97, 100))
    image /= max(np.float32(top), np.float32(0.2))
  return image
