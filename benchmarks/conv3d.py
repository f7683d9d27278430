"""3D convolution, forward and backward: our forms, lax's own and PyTorch's, in one run.

python benchmarks/conv3d.py [--repeats 5] [--quick]. Prints the best time of each, interleaved, and
its ratio to PyTorch (above 1: slower). It decides `nn.convolutions.winograd_pays`.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from rfmedsam2_jax.nn.convolutions import Triple, depth_taps_conv3d, native_conv3d
from rfmedsam2_jax.nn.winograd import winograd_conv3d

# batch, D, H, W, Cin, Cout, stride: the levels of a U-Net on patches of 40 x 56 x 40
SHAPES = (
  (2, 40, 56, 40, 32, 32, 1),
  (2, 40, 56, 40, 64, 32, 1),
  (2, 40, 56, 40, 32, 64, 2),
  (2, 20, 28, 20, 64, 64, 1),
  (2, 10, 14, 10, 128, 128, 1),
  (2, 5, 7, 5, 256, 256, 1),
)


def jax_run(f: Callable, x: np.ndarray, kernel: np.ndarray, dy: np.ndarray) -> Callable[[], list]:
  @jax.jit
  def run(x, kernel, dy):
    y, vjp = jax.vjp(f, x, kernel)
    return y, *vjp(dy)

  arrays = [jnp.asarray(a) for a in (x, kernel, dy)]
  return lambda: jax.block_until_ready(run(*arrays))


def torch_run(x: np.ndarray, kernel: np.ndarray, dy: np.ndarray, stride: Triple) -> Callable:
  x_t = torch.tensor(x.transpose(0, 4, 1, 2, 3).copy(), requires_grad=True)
  kernel_t = torch.tensor(kernel.transpose(4, 3, 0, 1, 2).copy(), requires_grad=True)
  dy_t = torch.tensor(dy.transpose(0, 4, 1, 2, 3).copy())

  def run():
    y = torch.nn.functional.conv3d(x_t, kernel_t, None, stride, 1)
    return y, *torch.autograd.grad(y, (x_t, kernel_t), dy_t)

  return run


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--quick", action="store_true", help="leave out lax's own, slow at stride 2")
  options = parser.parse_args()
  rng = np.random.default_rng(0)
  for batch, d, h, w, cin, cout, step in SHAPES:
    stride = (step, step, step)
    out = tuple((n - 1) // step + 1 for n in (d, h, w))
    x = rng.standard_normal((batch, d, h, w, cin), np.float32)
    kernel = rng.standard_normal((3, 3, 3, cin, cout), np.float32) / np.float32(27 * cin) ** 0.5
    dy = rng.standard_normal((batch, *out, cout), np.float32)

    def taps(x, k, stride=stride):
      return depth_taps_conv3d(x, k, stride)

    def native(x, k, stride=stride):
      return native_conv3d(x, k, stride)

    runs = {"torch": torch_run(x, kernel, dy, stride), "taps": jax_run(taps, x, kernel, dy)}
    if step == 1:
      runs["winograd"] = jax_run(winograd_conv3d, x, kernel, dy)
    if not options.quick:
      runs["lax"] = jax_run(native, x, kernel, dy)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
      run()
    for _ in range(options.repeats):
      for name, run in runs.items():
        begin = time.perf_counter()
        run()
        times[name].append(time.perf_counter() - begin)
    best = {name: min(values) for name, values in times.items()}
    gflop = 3 * 2 * 27 * batch * np.prod(out) * cin * cout / 1e9
    cells = [f"{n} {t * 1e3:.0f} ms ({t / best['torch']:.2f})" for n, t in best.items()]
    print(f"{d}x{h}x{w} {cin}->{cout} /{step}, {gflop:.1f} GFLOP: " + ", ".join(cells), flush=True)


if __name__ == "__main__":
  main()
