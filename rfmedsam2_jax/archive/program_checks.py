"""What exported programs are checked with: small inputs, and how far outputs may be from ours.

`run_programs` reads both. Slices and patches are stored coarse and repeated to their size; features
and memories are those of the programs before.
"""

from typing import Any

import numpy as np

from rfmedsam2_jax.archive.program_functions import TOKENS, Given
from rfmedsam2_jax.nn.prompt_encoder import ABSENT, BOX_END, BOX_START, NOT_A_POINT

SIZES = {"b": 3, "n": 2, "l": 3}  # for the letters in shapes
# What outputs may differ by, as run_programs.difference has it, where networks compute in float32
# or bfloat16. In float32 on a CPU it is rounding, most of it that of memories, which are kept in
# bfloat16: 4e-5 with the built-in weights. GPUs multiply float32 with the bits of TF32 where they
# can, TPUs with those of bfloat16; the built-in network as a whole in bfloat16 is 1e-2 away.
TOLERANCE = {"float32": {"cpu": 1e-3, "cuda": 2e-2, "tpu": 5e-2},
             "bfloat16": {"cpu": 5e-2, "cuda": 5e-2, "tpu": 5e-2}}
_COARSE = 16  # pixels or voxels along an axis, at most


def sized(given: Given) -> tuple[int, ...]:
  """The shape of an input in a check."""
  return tuple(SIZES[x] if isinstance(x, str) else x for x in given.shape)


def check_input(name: str, inputs: dict[str, Given]) -> np.ndarray:
  """A stored input of a program: a bright disc, prompted by a box and by a point, is followed over
  three slices."""
  shape = sized(inputs[name])
  values: dict[str, Any] = {
    "slice": np.zeros(shape), "slot": np.zeros(shape), "start": np.zeros(shape),
    "slices": 1 + np.arange(SIZES["l"]), "run": np.ones(shape), "depth": 1 + SIZES["l"],
    "reverse": False}
  if name in ("images", "patches"):
    values[name] = _discs(shape)
  elif name in ("points", "labels"):
    values[name] = _prompts(name, 16 * sized(inputs["embedding"])[1])
  return np.asarray(values[name], inputs[name].dtype)


def _discs(shape: tuple[int, ...]) -> np.ndarray:
  """Pictures [b, ..., H, W, C] that drift to the right, coarse."""
  coarse = [max(n for n in range(1, _COARSE + 1) if size % n == 0) for size in shape[1:-1]]
  number, *_, y, x = np.indices((shape[0], *coarse))
  apart = np.hypot(y - coarse[-2] / 2, x - coarse[-1] / 2 - number)
  noise = np.random.default_rng(0).normal(-1.0, 0.3, (shape[0], *coarse, shape[-1]))
  return 2.0 * (apart < coarse[-1] / 4)[..., None] + noise


def _prompts(name: str, side: int) -> np.ndarray:
  """Of the first object the disc's box, of the second its centre."""
  points = np.zeros((SIZES["n"], TOKENS, 2))
  labels = np.full((SIZES["n"], TOKENS), ABSENT)
  points[0, :2] = [[side // 4], [side * 3 // 4 - 1]]
  labels[0, :3] = BOX_START, BOX_END, NOT_A_POINT
  points[1, 0], labels[1, :2] = side // 2, (1, NOT_A_POINT)
  return points if name == "points" else labels
