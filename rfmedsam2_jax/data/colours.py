"""One colour per structure, the same in pictures, in 3D Slicer and in ITK-SNAP."""

import colorsys

# Matplotlib's tab10, ordered so that neighbours differ most.
_FIRST = (
  (214, 39, 40), (44, 160, 44), (31, 119, 180), (255, 127, 14), (148, 103, 189),
  (23, 190, 207), (227, 119, 194), (188, 189, 34), (140, 86, 75), (127, 127, 127),
)
_GOLDEN = 0.618034  # hues by the golden ratio never come close to those just before


def colour(index: int) -> tuple[int, int, int]:
  """Red, green, blue from 0 to 255 of the structure at `index`, from 0."""
  if index < len(_FIRST):
    return _FIRST[index]
  saturation, value = ((0.9, 0.95), (0.5, 0.95), (0.9, 0.6))[index % 3]
  red, green, blue = colorsys.hsv_to_rgb(index * _GOLDEN % 1, saturation, value)
  return round(red * 255), round(green * 255), round(blue * 255)
