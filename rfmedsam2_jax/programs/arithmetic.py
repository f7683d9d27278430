"""FLOP of products of matrices, convolutions, and calls of libraries that do either."""

import functools
import math
import re

from rfmedsam2_jax.programs.hlo import Computation, Instruction

# Calls that do no arithmetic to speak of, and move nothing.
FREE = frozenset((
  "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone",
  "ConcatBitcast", "GatherScatterIndicesBitpacked", "Sharding", "SPMDFullToShardShape",
  "SPMDShardToFullShape", "annotate_device_placement"))
# Kernels that sort or draw.
_NO_PRODUCTS = ("TopK", "cu_threefry2x32", "__cub$", "Sort")
_CONVOLUTIONS = {"__cudnn$convForward": "io", "__cudnn$convBiasActivationForward": "io",
                 "__cudnn$convBackwardInput": "oi", "__cudnn$convBackwardFilter": "if"}

Shape = tuple[int, ...]


def flops_of(within: Computation, x: Instruction) -> float | None:
  """FLOP of an instruction itself; None of a call whose FLOP are not known."""
  shapes = [operand.arrays[0].shape for operand in within.operands(x) if operand.arrays]
  if x.opcode == "dot":
    lhs = shapes[0]
    return 2.0 * _elements(x) * math.prod(lhs[axis] for axis in x.numbers("lhs_contracting_dims"))
  if x.opcode == "convolution":
    return _convolution(x, shapes[0], shapes[1], x.arrays[0].shape)
  return _call(x, shapes) if x.opcode == "custom-call" else 0.0


def _call(x: Instruction, shapes: list[Shape]) -> float | None:
  target = x.text("custom_call_target")
  if target in FREE or target.startswith(_NO_PRODUCTS):
    return 0.0
  if target in _CONVOLUTIONS:
    result = x.arrays[0].shape
    image, kernel, out = {
      "io": (*shapes[:2], result), "oi": (result, shapes[1], shapes[0]),
      "if": (shapes[0], result, shapes[1])}[_CONVOLUTIONS[target]]
    return _convolution(x, image, kernel, out)
  if target.startswith("__cublas$"):
    axes = _listed(x, "lhs_contracting_dimensions")
    return None if axes is None else 2.0 * _elements(x) * math.prod(shapes[0][n] for n in axes)
  if target.startswith("__cudnn$fmha"):
    # Batch, heads, queries, keys. Two products forwards; backwards the first once more, and four.
    scores = _listed(x, "dimensions")
    products = 5 if target.endswith("Backward") else 2
    return None if scores is None else 2.0 * products * math.prod(scores) * shapes[0][-1]
  # What a kernel of Pallas says of itself.
  told = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', x.rest)
  return float(told[1]) if told else None


def _listed(x: Instruction, name: str) -> Shape | None:
  found = re.search(rf'"{name}":\[([^\]]*)\]', x.rest.replace(" ", ""))
  return tuple(map(int, re.findall(r"\d+", found[1]))) if found else None


def _elements(x: Instruction) -> int:
  return math.prod(x.arrays[0].shape)


def _convolution(x: Instruction, image: Shape, kernel: Shape, out: Shape) -> float:
  """As XLA's HloCostAnalysis::HandleConvolution: what a window sees of padding or of holes is not
  counted. libtpu turns products into convolutions most of which is padding."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.rest)
  if labels is None:
    raise ValueError(f"{x.name}: a convolution without dim_labels")
  of_image, of_kernel, of_out = labels.groups()
  pairs = 1
  window = _Window(x.braced("window"))
  for axis, side in enumerate(sorted(filter(str.isdigit, of_image))):
    pairs *= _pairs(image[of_image.index(side)], kernel[of_kernel.index(side)],
                    out[of_out.index(side)], *window.along(axis))
  inputs, outputs = kernel[of_kernel.index("i")], kernel[of_kernel.index("o")]
  rows = image[of_image.index("b")] // x.integer("batch_group_count", 1)
  return 2.0 * rows * inputs * outputs * pairs


class _Window:
  """window={size=3x3 stride=2x2 pad=1_1x0_0 lhs_dilate=1x2 rhs_dilate=2x2}"""

  def __init__(self, text: str):
    self._values = dict(part.split("=") for part in text.split() if "=" in part)

  def along(self, axis: int) -> tuple[int, int, int, int]:
    """Stride, padding before, holes of the image and of the kernel."""
    def value(name: str, default: str) -> str:
      return self._values[name].split("x")[axis] if name in self._values else default

    return (int(value("stride", "1")), int(value("pad", "0_0").split("_")[0]),
            int(value("lhs_dilate", "1")), int(value("rhs_dilate", "1")))


@functools.cache
def _pairs(image: int, kernel: int, out: int, stride: int, pad: int, hole: int, spread: int) -> int:
  """Along one axis: places of the kernel in all places of the window that lie on a pixel."""
  last = (image - 1) * hole
  count = 0
  for k in range(kernel):
    at = k * spread - pad  # where the first window has it; the others every `stride`
    count += sum(0 <= at + n * stride <= last and (at + n * stride) % hole == 0 for n in range(out))
  return count
