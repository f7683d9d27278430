"""SAM 2.1's image encoder on the CPU: ours and the official one (PyTorch), in one run.

python benchmarks/image_encoder.py [--sizes tiny base_plus] [--sides 512 1024] [--threads 2]

One image, float32, random weights, the same on both sides, turn by turn in one process. Prints the
medians, how many times as fast we are (by the medians and by the best runs), the time to compile,
and the peak memory of a process of its own that does nothing else.
"""

import argparse
import dataclasses
import time

import numpy as np
import side_by_side

from rfmedsam2_jax.nn import PRESETS, SAM2, AdapterConfig, SAM2Config, init_params


def config_of(size: str, side: int) -> SAM2Config:
  adapters = AdapterConfig(dwconv=False, cnn=False)
  return dataclasses.replace(PRESETS[f"sam2.1_hiera_{size}"], image_size=side, adapters=adapters)


def image_of(side: int) -> np.ndarray:
  return np.random.default_rng(0).standard_normal((1, side, side, 3), np.float32)


def ours(config: SAM2Config, params: dict) -> tuple[side_by_side.Run, float]:
  """A function that encodes an image, and the seconds it took to compile."""
  import jax

  image = image_of(config.image_size)
  params = jax.tree.map(jax.numpy.asarray, params)

  @jax.jit
  def encode(params, image):
    return SAM2(config).apply({"params": params}, image, method="encode_image")

  began = time.perf_counter()
  compiled = encode.lower(params, image).compile()
  return lambda: jax.block_until_ready(compiled(params, image)), time.perf_counter() - began


def official(model) -> side_by_side.Run:
  import torch
  from torch_sam2 import nchw

  image = nchw(image_of(model.image_size))

  def run():
    with torch.inference_mode():
      return model.forward_image(image)

  return run


def peak(size: str, side: int, which: str) -> None:
  """Prints what this process holds at most when it has but one of the two."""
  import jax

  config = config_of(size, side)
  if which == "ours":
    run, _ = ours(config, init_params(config, jax.random.key(0)))
  else:
    import torch_sam2

    run = official(torch_sam2.official(config))
  for _ in range(2):
    run()
  side_by_side.report_peak()


def main() -> None:
  parser = side_by_side.parser(__doc__, repeats=7)
  parser.add_argument("--sizes", nargs="+", default=["tiny", "base_plus"])
  parser.add_argument("--sides", nargs="+", type=int, default=[512, 1024])
  parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
  parser.add_argument("--only", choices=["ours", "official"], help=argparse.SUPPRESS)
  options = parser.parse_args()
  side_by_side.use_cores(options.threads)
  if options.only:
    return peak(options.sizes[0], options.sides[0], options.only)
  import torch_sam2

  print(side_by_side.HEADER + "  compile s  peak GiB ours official")
  for size in options.sizes:
    for side in options.sides:
      config = config_of(size, side)
      model = torch_sam2.official(config)
      our_run, compilation = ours(config, torch_sam2.params_of(model, config))
      runs = {"ours": our_run, "official": official(model)}
      more = f" {compilation:10.1f}"
      for which in () if options.no_memory else runs:
        gib = side_by_side.peak_memory(
          __file__, "--only", which, "--sizes", size, "--sides", str(side)
        )
        more += f" {gib:10.2f}"
      times = side_by_side.alternate(runs, options.repeats)
      print(side_by_side.row(f"{size} {side}", times, more), flush=True)


if __name__ == "__main__":
  main()
