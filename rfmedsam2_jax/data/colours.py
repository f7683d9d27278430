"""One colour per structure, the same in pictures, in 3D Slicer and in ITK-SNAP."""

import colorsys
import functools

# Matplotlib's tab10, ordered so that neighbours differ most.
_FIRST = ("red", "green", "blue", "orange", "purple", "cyan", "pink", "olive", "brown", "gray")
_GOLDEN = 0.618034  # hues by the golden ratio never come close to those just before


@functools.cache
def colour(index: int) -> tuple[int, int, int]:
  """Red, green, blue from 0 to 255 of the structure at `index`, from 0."""
  if index < len(_FIRST):
    from matplotlib.colors import to_rgb  # takes its time, and loading a run needs no colour

    red, green, blue = to_rgb(f"tab:{_FIRST[index]}")
  else:
    saturation, value = ((0.9, 0.95), (0.5, 0.95), (0.9, 0.6))[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(index * _GOLDEN % 1, saturation, value)
  return round(red * 255), round(green * 255), round(blue * 255)
