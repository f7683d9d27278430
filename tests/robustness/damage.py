"""Ways to damage bytes."""

import numpy as np


def flipped(content: bytes, rng: np.random.Generator, first: int = 0, behind: int | None = None,
            bits: int = 1) -> bytes:
  """`bits` random bits turned, in bytes from `first` to `behind`."""
  result = bytearray(content)
  behind = len(result) if behind is None else min(behind, len(result))
  for at in rng.choice(range(first, behind), bits, replace=False):
    result[at] ^= 1 << int(rng.integers(8))
  return bytes(result)


def overwritten(content: bytes, rng: np.random.Generator) -> bytes:
  """A run of up to 64 random bytes over what was there."""
  result = bytearray(content)
  length = int(rng.integers(1, min(65, len(result))))
  at = int(rng.integers(len(result) - length + 1))
  result[at:at + length] = rng.bytes(length)
  return bytes(result)


def cut(content: bytes, rng: np.random.Generator) -> bytes:
  """The beginning, of any length."""
  return content[:int(rng.integers(len(content)))]


def without(content: bytes, rng: np.random.Generator) -> bytes:
  """A piece in the middle is gone."""
  a, b = sorted(int(n) for n in rng.integers(0, len(content), 2))
  return content[:a] + content[min(b, a + 4096) + 1:]


def longer(content: bytes, rng: np.random.Generator) -> bytes:
  """Random bytes at the end."""
  return content + rng.bytes(int(rng.integers(1, 200)))


WAYS = {
  "flip": flipped, "flip 8": lambda content, rng: flipped(content, rng, bits=8),
  "overwrite": overwritten, "cut": cut, "without": without, "longer": longer,
}
