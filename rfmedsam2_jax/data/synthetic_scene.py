"""The picture that synthetic anatomy is painted into: intensities, owners, what may be asked.

Used by synthetic_organs and synthetic_bodies, which say what is painted.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from rfmedsam2_jax.data.synthetic_scanner import Palette, Tissue
from rfmedsam2_jax.data.synthetic_shapes import (
  Level,
  Space,
  joined,
  log_uniform,
  rotation,
  smooth_field,
)

_PARTS = 255  # that a uint8 can tell apart; what comes later shares the last
# Knots of the textures, in pixels: fine, middle, coarse; two more are mixtures of these.
_GRAINS = (1.2, 4.0, 14.0)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """What may be asked for, and the parts that belong to it."""

  kind: str
  parts: tuple[int, ...]
  focus: bool  # of the organ that the picture is made around


class Scene:
  """A picture that is being painted, later parts over earlier ones.

  Attributes:
    image: float32 [L, H, W], intensities.
    owner: uint8 [L, H, W], to which part a voxel belongs, 0 none.
    candidates: what may be asked for.
    focus: whether what is painted now is what the picture is made around.
    limit: where parts end, as organs do at the wall of a body.
    lower: float32 [1, H, W], how far down a voxel lies, in widths: fluid sinks.
    gravity: y and x of the way down.
  """

  def __init__(self, rng: np.random.Generator, space: Space, palette: Palette):
    self.rng, self.space, self.palette = rng, space, palette
    depth, height, width = space.shape
    shape = (depth // space.parts, height, width)
    self.image = np.zeros(shape, np.float32)
    self.owner = np.zeros(shape, np.uint8)
    self.candidates: list[Candidate] = []
    self.focus = False
    self.limit: Level | None = None
    self._parts = 0
    step = space.parts * space.spacing[0] / space.pixel  # of slices, in pixels
    fine, middle, coarse = (smooth_field(rng, shape, (w / step, w, w)) for w in _GRAINS)
    self.grains = [fine, middle, coarse, (fine + middle) * np.float32(0.7),
                   (0.5 * fine + 0.5 * middle + coarse) * np.float32(0.8)]
    down = rng.normal(0, 0.15) + (0 if rng.random() < 0.7 else rng.uniform(-np.pi, np.pi))
    self.gravity = float(np.cos(down)), float(np.sin(down))
    _, y, x = space.axes
    self.lower = (self.gravity[0] * y[:, None] + self.gravity[1] * x).astype(np.float32)[None]

  def new_part(self) -> int:
    self._parts = min(self._parts + 1, _PARTS)
    return self._parts

  def ask(self, kind: str, parts: Iterable[int]) -> None:
    self.candidates.append(Candidate(kind, tuple(parts), self.focus))

  def paint(self, level: Level | None, tissue: Tissue, part: int | None = 0) -> None:
    """Paints what lies inside of a level; of voxels at its surface the share that is inside.

    `part` owns what is painted from now on; None: who had it.
    """
    if level is not None and self.limit is not None:
      level = level.within(self.limit)
    if level is None:
      return
    planes = self.space.parts
    share = level.values * np.float32(-1 / self.space.pixel)
    share += np.float32(0.5)
    np.clip(share, 0, 1, out=share)
    if planes > 1:
      share = share.reshape(-1, planes, *share.shape[1:]).mean(axis=1)
    box = (slice(level.box[0].start // planes, level.box[0].stop // planes), *level.box[1:])
    picture = self.image[box]
    change = np.float32(tissue.value) - picture
    if tissue.texture > 0:
      grain = self.grains[tissue.grain][tuple(slice(None, None, f) for f in tissue.flips)]
      change += np.float32(tissue.texture) * grain[box]
    change *= share
    picture += change
    if part is not None:
      self.owner[box][share > 0.5] = part

  def around(self, level: Level | None) -> float | None:
    """Mean intensity just outside of a shape that is not painted yet, of every second pixel."""
    if level is None:
      return None
    planes = self.space.parts
    slices = slice(level.box[0].start // planes, level.box[0].stop // planes)
    seen = self.image[slices, level.box[1], level.box[2]][:, ::2, ::2]
    values = level.values[::planes, ::2, ::2]
    rim = (values > 0) & (values < 4 * self.space.pixel)
    return float(seen[rim].mean()) if rim.any() else None

  def tissue(self, name: str, level: Level | None = None) -> Tissue:
    """A tissue of the palette, different from what lies around the level that it will fill."""
    return self.palette.tissue(name, self.around(level))

  def flips(self) -> tuple[int, ...]:
    return tuple(int(f) for f in 2 * self.rng.integers(0, 2, 3) - 1)

  def bump(self, level: Level, size: float) -> np.ndarray:
    """A random field of unit deviation on the level's box; about `size` between its bumps."""
    return self.space.bump(level.box, size, self.flips())

  def rough(self, level: Level, size: float, amount: float) -> Level:
    """A surface with bumps: `size` between them, `amount` their deviation, in widths."""
    return level + np.float32(amount) * self.bump(level, size)

  def blob(self, centre: np.ndarray, radius: float, stretch: float = 0.5) -> Level | None:
    """A closed shape of one to three lobes, perhaps hollowed; None where it is out of sight."""
    rng = self.rng
    radii = radius * np.exp(rng.uniform(-stretch, 0.6 * stretch, 3))
    spare = 0.25 * radius + 4 * self.space.pixel
    level = self.space.ellipsoid(centre, radii, rotation(rng), rng.random() < 0.25, spare)
    for _ in range(int(rng.choice(3, p=[0.5, 0.3, 0.2]))):
      aside = centre + direction(rng) * radius * rng.uniform(0.4, 0.9)
      level = joined(level, self.space.ellipsoid(
        aside, radii * rng.uniform(0.4, 0.9, 3), rotation(rng), spare=spare))
    if level is None:
      return None
    if rng.random() < 0.5:
      # From a notch to a crescent around something else.
      hollow = radius * log_uniform(rng, 0.25, 1.3)
      aside = centre + direction(rng) * (radius * rng.uniform(0.3, 0.8) + 0.6 * hollow)
      level = level.without(self.space.ellipsoid(
        aside, hollow * rng.uniform(0.6, 1.2, 3), rotation(rng), spare=spare))
    level = self.rough(level, radius * 1.2, radius * rng.uniform(0, 0.2))
    return self.rough(level, radius * 0.4, radius * rng.uniform(0, 0.05))


def direction(rng: np.random.Generator) -> np.ndarray:
  """A unit vector [3], uniform over all."""
  v = rng.standard_normal(3)
  return v / np.linalg.norm(v)
