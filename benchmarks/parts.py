"""The parts of SAM 2.1 that tracking is made of, on the CPU: ours and the official ones.

python benchmarks/parts.py [--size tiny] [--side 512] [--objects 1 3] [--threads 2]

Per slice: the image encoder once; for every object memory attention (seven memory maps and sixteen
object pointers), the mask decoder (a box) and the memory encoder. float32, the same random weights
and inputs on both sides, turn by turn in one process; medians.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import side_by_side
from image_encoder import config_of, official, ours

from rfmedsam2_jax.nn import SAM2, MemorySlots, SAM2Config, box_prompts

MAPS, POINTERS = 7, 16
Sides = dict[str, side_by_side.Run]


def random(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def flat(x: np.ndarray):
  """[N, ..., C] to the official [tokens, N, C]."""
  import torch

  return torch.from_numpy(x.reshape(len(x), -1, x.shape[-1])).permute(1, 0, 2)


def both(config: SAM2Config, params: dict, method: str, inputs: tuple, theirs: Callable) -> Sides:
  """Ours is a method of SAM2 on `inputs`, compiled; theirs is called under inference mode."""
  import jax
  import torch

  inputs = jax.tree.map(jax.numpy.asarray, inputs)

  def call(params, inputs):
    return SAM2(config).apply({"params": params}, *inputs, method=method)

  compiled = jax.jit(call).lower(params, inputs).compile()

  def run_official() -> Any:
    with torch.inference_mode():
      return theirs()

  return {"ours": lambda: jax.block_until_ready(compiled(params, inputs)), "official": run_official}


def memory_attention(config: SAM2Config, params: dict, model: Any, n: int) -> Sides:
  import torch

  grid, dim = config.grid, config.mem_dim
  embedding = random(0, n, grid, grid, config.d_model)
  maps, pointers = random(1, n, MAPS, grid, grid, dim), random(2, n, POINTERS, config.d_model)
  slots = MemorySlots(
    maps=maps,
    rows=np.tile(np.arange(MAPS), (n, 1)),
    valid=np.ones((n, MAPS), bool),
    pointers=pointers,
    pointer_positions=np.tile(np.linspace(0, 1, POINTERS, dtype=np.float32), (n, 1)),
    pointer_valid=np.ones((n, POINTERS), bool),
  )
  memory = torch.cat([flat(maps), flat(pointers.reshape(n, -1, dim))])
  arguments = dict(
    curr=[flat(embedding)], curr_pos=[torch.randn(grid * grid, n, config.d_model)], memory=memory,
    memory_pos=torch.randn(memory.shape), num_obj_ptr_tokens=POINTERS * config.d_model // dim,
  )
  return both(
    config, params, "condition", (embedding, slots), lambda: model.memory_attention(**arguments)
  )


def mask_decoder(config: SAM2Config, params: dict, model: Any, n: int) -> Sides:
  import torch
  from torch_sam2 import nchw

  grid, width = config.grid, config.d_model
  embedding = random(0, n, grid, grid, width)
  high_res = (
    random(1, n, 4 * grid, 4 * grid, width // 8), random(2, n, 2 * grid, 2 * grid, width // 4)
  )
  boxes = np.tile(np.float32([50, 60, 200, 300]), (n, 1))
  points = dict(
    point_coords=torch.from_numpy(boxes).reshape(n, 2, 2),
    point_labels=torch.tensor([[2, 3]]).repeat(n, 1),
  )
  embedding_t, high_res_t = nchw(embedding), [nchw(x) for x in high_res]
  return both(
    config, params, "decode", (embedding, high_res, box_prompts(boxes)),
    lambda: model._forward_sam_heads(embedding_t, points, None, high_res_t, False),
  )


def memory_encoder(config: SAM2Config, params: dict, model: Any, n: int) -> Sides:
  import torch

  grid, side = config.grid, config.image_size
  embedding, logits = random(0, n, grid, grid, config.d_model), random(1, n, side, side)
  features, logits_t = flat(embedding), torch.from_numpy(logits)[:, None]
  return both(
    config, params, "remember", (embedding, logits, np.ones(n, bool)),
    lambda: model._encode_new_memory(
      [features], [(grid, grid)], logits_t, torch.ones(n, 1), False
    ),
  )


def main() -> None:
  parser = side_by_side.parser(__doc__, repeats=9)
  parser.add_argument("--size", default="tiny")
  parser.add_argument("--side", type=int, default=512)
  parser.add_argument("--objects", nargs="+", type=int, default=[1, 3])
  options = parser.parse_args()
  side_by_side.use_cores(options.threads)
  import jax
  import torch_sam2

  config = config_of(options.size, options.side)
  model = torch_sam2.official(config)
  params = jax.tree.map(jax.numpy.asarray, torch_sam2.params_of(model, config))
  print(side_by_side.HEADER)

  def show(label: str, sides: Sides) -> None:
    print(side_by_side.row(label, side_by_side.alternate(sides, options.repeats)), flush=True)

  show("image encoder", {"ours": ours(config, params)[0], "official": official(model)})
  for part in (memory_attention, mask_decoder, memory_encoder):
    for n in options.objects:
      label = f"{part.__name__.replace('_', ' ')}, {n} object{'s' if n > 1 else ''}"
      show(label, part(config, params, model, n))


if __name__ == "__main__":
  main()
