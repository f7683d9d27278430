"""Shapes of no family: where one of several smooth random fields is the largest.

As in SynthMorph (Hoffmann et al., TMI 2022). No box or ellipse tells what such a shape is: what is
learned from them is to look at the picture.
"""

import numpy as np
from scipy import ndimage

from rfmedsam2_jax.data.synthetic_scene import Scene
from rfmedsam2_jax.data.synthetic_shapes import Level, log_uniform

_TISSUES = ("fat", "fluid", "muscle", "organ", "organ", "organ", "blood", "wall", "marrow", "food",
            "lung", "air")
_ASKED = 6  # parts of one field that may be asked for, the largest


def fields(scene: Scene) -> None:
  """Fills the picture with tissues that meet in irregular borders."""
  rng, space = scene.rng, scene.space
  count, wavelength = int(rng.integers(3, 8)), log_uniform(rng, 0.12, 0.6)
  levels = np.stack([space.field(rng, wavelength) for _ in range(count)])
  levels += rng.normal(0, 0.4, (count, 1, 1, 1)).astype(np.float32)
  largest = levels.argmax(axis=0)
  below, above = np.partition(levels, -2, axis=0)[-2:]
  away = (above - below) * np.float32(wavelength / 3)  # from the border, in widths, or so
  value = None
  for field in range(count):
    tissue = scene.palette.tissue(str(rng.choice(_TISSUES)), apart_from=value)
    value = tissue.value
    pieces, found = ndimage.label(largest == field)
    sizes = np.bincount(pieces.ravel())[1:]
    for rank, piece in enumerate(np.argsort(-sizes)):
      if rank >= _ASKED:
        break
      part = scene.new_part()
      scene.paint(Level(space.whole(), np.where(pieces == piece + 1, -away, away)), tissue, part)
      scene.ask("field", [part])
    if found > _ASKED:
      rest = np.isin(pieces, np.argsort(-sizes)[_ASKED:] + 1)
      scene.paint(Level(space.whole(), np.where(rest, -away, away)), tissue)
