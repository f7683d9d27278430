"""How long a synthetic run of slices takes, and what the stream looks like.

python benchmarks/synthetic.py [--sides 128 192 256] [--runs 40] [--seed 0] [--picture OUT.png]

Times are CPU seconds of one process, of the same runs at every side. The picture has one slice of
each of the first 40 runs, that on which its objects are largest, with their outlines.
"""

import argparse
import time

import numpy as np

from rfmedsam2_jax.data.colours import colour
from rfmedsam2_jax.data.synthetic import SyntheticConfig, synthetic_run

_COLUMNS, _ROWS, _SIDE = 8, 5, 136  # of the picture
_GAP = 2
_GREYS = 48


def outlined(image: np.ndarray, masks: np.ndarray) -> np.ndarray:
  """A slice [S, S] in greys with outlines of masks [T, S, S]: indices of the picture's palette."""
  shown = (image * (_GREYS - 1)).astype(np.uint8)
  for number, mask in enumerate(masks):
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    shown[mask & ~inner] = _GREYS + number
  return shown


def picture(seed: int, path: str) -> None:
  from PIL import Image

  step = _SIDE + _GAP
  sheet = np.full((_ROWS * step - _GAP, _COLUMNS * step - _GAP), _GREYS - 1, np.uint8)
  for index in range(_ROWS * _COLUMNS):
    run = synthetic_run(SyntheticConfig(), seed, index, _SIDE)
    z = int(run.objects.sum(axis=(0, 2, 3)).argmax())
    row, column = (step * n for n in divmod(index, _COLUMNS))
    sheet[row : row + _SIDE, column : column + _SIDE] = outlined(run.images[z], run.objects[:, z])
  greys = np.linspace(0, 255, _GREYS).astype(int)
  colours = [*((grey,) * 3 for grey in greys), *map(colour, range(3))]
  image = Image.fromarray(sheet)
  image.putpalette([int(value) for entry in colours for value in entry])
  image.save(path, optimize=True)


def main() -> None:
  arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  arguments.add_argument("--sides", type=int, nargs="*", default=[128, 192, 256])
  arguments.add_argument("--runs", type=int, default=40)
  arguments.add_argument("--seed", type=int, default=0)
  arguments.add_argument("--picture")
  given = arguments.parse_args()
  if given.picture:
    picture(given.seed, given.picture)
  for side in given.sides:
    synthetic_run(SyntheticConfig(), given.seed, 0, side)
    taken = []
    for index in range(given.runs):
      began = time.process_time()
      synthetic_run(SyntheticConfig(), given.seed, index, side)
      taken.append(1000 * (time.process_time() - began))
    print(f"{side} pixels, 8 slices: mean {np.mean(taken):.0f} ms, median {np.median(taken):.0f}, "
          f"longest {np.max(taken):.0f}")


if __name__ == "__main__":
  main()
