"""Work on large activations band by band of rows, so that what lies between operations is cached.

XLA:CPU runs one operation after the other over the whole array, and waits for memory where that is
larger than the caches: in SAM 2.1 tiny at 1024, on one core, the first block takes 198 ms for its
attention and 177 ms for its MLP at once, 79 and 120 ms in bands; its arithmetic alone would take 68
and 102. On accelerators nothing is cut.
"""

from collections.abc import Callable

import flax.linen as nn

from rfmedsam2_jax.nn.layers import Array
from rfmedsam2_jax.nn.platform import Platform

# Elements of the widest array within a band: 4 MB, about the second-level caches of two cores.
BAND = 2**20


def largest_divisor(count: int, most: int) -> int:
  """The largest divisor of `count` that is at most `most`, or 1."""
  return max(n for n in range(1, max(1, min(count, most)) + 1) if count % n == 0)


def map_bands(
  f: Callable, module: nn.Module, x_BHWC: Array, rows: int, elements: int, platform: Platform
) -> Array:
  """f(module, x) for a function that works on bands of rows without looking beyond them.

  f calls submodules of `module`; [b, h, W, C] to [b, h', W', C'], any b, h = H or `rows`, which
  divides H. `elements`: size of the widest array that f makes of one band.
  """
  batch, height, width, channels = x_BHWC.shape
  bands = batch * height // rows
  size = largest_divisor(bands, BAND // elements)
  if not platform.is_cpu or size == bands or module.is_initializing():
    return f(module, x_BHWC)
  mapped = nn.scan(
    lambda module, _, x: (None, f(module, x)), variable_broadcast="params",
    split_rngs={"params": False}
  )
  _, y = mapped(module, None, x_BHWC.reshape(-1, size, rows, width, channels))
  return y.reshape(batch, -1, *y.shape[3:])
