"""A training step of the prompt generator beside nnU-Net's network in PyTorch, in one process.

python benchmarks/unet_step.py [--threads 2] [--repeats 5] [--features 32 64 128 256]
    [--patch 40 56 40] [--batch 2] [--official-features 32 64 128 256] [--cpu-devices 2]

`--cpu-devices` is mesh.cpu_devices: ours shares the batch between so many.

Both sides: the same patches, Dice and cross-entropy with deep supervision, gradient, clipping,
optimizer (ours AdamW with averaged weights, PyTorch's SGD with Nesterov momentum, as nnU-Net has
it). The official network is `PlainConvUNet` of dynamic-network-architectures.
"""

import dataclasses
import time

import numpy as np
from side_by_side import HEADER, alternate, parser, row, use_cores


def ours(features, patch, batch, image, target):
  import jax

  from rfmedsam2_jax.config.training import GeneratorConfig
  from rfmedsam2_jax.nn.initialisation import init_generator
  from rfmedsam2_jax.nn.unet import UNet, UNetConfig
  from rfmedsam2_jax.parallel.mesh import MeshConfig, make_mesh, place_batch
  from rfmedsam2_jax.parallel.rules import place
  from rfmedsam2_jax.training.state import init_state, make_optimizer
  from rfmedsam2_jax.training.step import compile_step, generator_loss_fn, make_step

  stages = len(features)
  unet = UNet(
    UNetConfig(tuple(features), ((1, 1, 1),) + ((2, 2, 2),) * (stages - 1), ((3, 3, 3),) * stages),
    num_outputs=3,
  )
  settings = dataclasses.replace(GeneratorConfig(), batch_size=batch)
  loss = generator_loss_fn(unet, settings, np.array([[0, 0], [1, 0], [0, 1]], bool), False)
  optimizer = make_optimizer(settings.optimizer, 1000)
  params = jax.jit(lambda key: init_generator(unet, 1, key))(jax.random.key(0))
  mesh = make_mesh(MeshConfig())
  state = place(init_state(params, ("*",), optimizer, jax.random.key(1)), mesh)
  data = place_batch({"image": image, "target": target}, mesh)
  began = time.perf_counter()
  step = compile_step(make_step(loss, optimizer, settings.optimizer, mesh), state, mesh)
  step = step.lower(state, data).compile()
  print(f"ours: compiled in {time.perf_counter() - began:.0f} s")

  def run():
    nonlocal state
    state, metrics = step(state, data)
    return float(metrics["loss"])

  return run


def official(features, patch, batch, image, target):
  import torch
  from dynamic_network_architectures.architectures.unet import PlainConvUNet
  from torch import nn

  stages = len(features)
  network = PlainConvUNet(
    1, stages, list(features), nn.Conv3d, [[3, 3, 3]] * stages, [1] + [2] * (stages - 1),
    [2] * stages, 3, [2] * (stages - 1), conv_bias=True, norm_op=nn.InstanceNorm3d,
    norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
    nonlin_kwargs={"inplace": True}, deep_supervision=True,
  )
  rule = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True)
  x = torch.tensor(np.ascontiguousarray(np.moveaxis(image, -1, 1)))
  labels = [
    torch.tensor(target[:, h::2 * h or 1, h::2 * h or 1, h::2 * h or 1].astype(np.int64))
    for h in (0, 1, 2)
  ][: stages - 1]
  weights = np.array([0.5**i for i in range(stages - 1)])
  weights[-1] = 0
  weights = weights / weights.sum()

  def loss_of(logits, label):
    p = logits.softmax(1)[:, 1:]
    truth = nn.functional.one_hot(label, 3).movedim(-1, 1)[:, 1:].float()
    axes = (0, 2, 3, 4)
    dice = (2 * (p * truth).sum(axes) + 1e-5) / (p.sum(axes) + truth.sum(axes) + 1e-5)
    return nn.functional.cross_entropy(logits, label) + 1 - dice.mean()

  def run():
    rule.zero_grad()
    outputs = network(x)
    total = sum(
      w * loss_of(o, y) for w, o, y in zip(weights, outputs, labels, strict=True) if w
    )
    total.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
    rule.step()
    return float(total.detach())

  return run


def main() -> None:
  p = parser(__doc__, repeats=5)
  p.add_argument("--features", type=int, nargs="+", default=[32, 64, 128, 256])
  p.add_argument("--official-features", type=int, nargs="*", default=[32, 64, 128, 256])
  p.add_argument("--patch", type=int, nargs=3, default=[40, 56, 40])
  p.add_argument("--batch", type=int, default=2)
  p.add_argument("--cpu-devices", type=int, default=1)
  options = p.parse_args()
  use_cores(options.threads)
  from rfmedsam2_jax.parallel.devices import divide_cpu

  divide_cpu(options.cpu_devices)
  rng = np.random.default_rng(0)
  image = rng.standard_normal((options.batch, *options.patch, 1), np.float32)
  target = rng.integers(0, 3, (options.batch, *options.patch), np.uint8)
  data = (options.patch, options.batch, image, target)
  runs = {"ours": ours(options.features, *data)}
  if options.official_features:
    runs["official"] = official(options.official_features, *data)
  times = alternate(runs, options.repeats)
  if "official" in times:
    print(HEADER)
    print(row("step", times))
  else:
    print(f"ours: {np.median(times['ours'][:, 0]):.3f} s per step")


if __name__ == "__main__":
  main()
