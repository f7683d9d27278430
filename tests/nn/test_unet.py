"""The U-Net and its convolutions against PyTorch and lax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rfmedsam2_jax.nn import convolutions
from rfmedsam2_jax.nn.initialisation import init_generator
from rfmedsam2_jax.nn.platform import default_platform
from rfmedsam2_jax.nn.unet import ResidualBlock, UNet, UNetConfig
from rfmedsam2_jax.nn.winograd import winograd_conv3d

torch = pytest.importorskip("torch")


class TorchUNet(torch.nn.Module):
  """The same network from torch.nn's own layers, channels first."""

  def __init__(self, config: UNetConfig, channels: int, outputs: int):
    super().__init__()
    sizes = config.features

    def stage(cin, cout, kernel, stride):
      layers = []
      for i in range(config.convs_per_stage):
        layers += [
          torch.nn.Conv3d(
            cin if i == 0 else cout,
            cout,
            kernel,
            stride if i == 0 else 1,
            padding=[k // 2 for k in kernel],
          ),
          torch.nn.InstanceNorm3d(cout, affine=True, eps=1e-5),
          torch.nn.LeakyReLU(0.01),
        ]
      return torch.nn.Sequential(*layers)

    self.encoder = torch.nn.ModuleList()
    for i, cout in enumerate(sizes):
      cin = sizes[i - 1] if i else channels
      self.encoder.append(stage(cin, cout, config.kernels[i], config.strides[i]))
    self.up, self.decoder, self.heads = (torch.nn.ModuleList() for _ in range(3))
    for level in reversed(range(len(sizes) - 1)):
      stride = config.strides[level + 1]
      self.up.append(torch.nn.ConvTranspose3d(sizes[level + 1], sizes[level], stride, stride))
      self.decoder.append(stage(2 * sizes[level], sizes[level], config.kernels[level], 1))
      self.heads.append(torch.nn.Conv3d(sizes[level], outputs, 1))

  def forward(self, x):
    skips, outputs = [], []
    for stage in self.encoder:
      x = stage(x)
      skips.append(x)
    for up, stage, head, skip in zip(
      self.up, self.decoder, self.heads, reversed(skips[:-1]), strict=True
    ):
      x = stage(torch.cat([up(x), skip], 1))
      outputs.append(head(x))
    return outputs[::-1]


def to_torch(params: dict, network: TorchUNet) -> None:
  """Writes our parameters into the torch network."""

  def put(parameter, value, axes=None):
    value = np.asarray(value)
    parameter.data = torch.tensor(value if axes is None else value.transpose(axes).copy())

  def put_stage(stage, tree):
    for i in range(len(tree)):
      conv, norm = stage[3 * i], stage[3 * i + 1]
      put(conv.weight, tree[f"convs_{i}"]["conv"]["kernel"], (4, 3, 0, 1, 2))
      put(conv.bias, tree[f"convs_{i}"]["conv"]["bias"])
      put(norm.weight, tree[f"convs_{i}"]["norm"]["scale"])
      put(norm.bias, tree[f"convs_{i}"]["norm"]["bias"])

  for i, stage in enumerate(network.encoder):
    put_stage(stage, params["encoder"][f"stages_{i}"])
  for i, stage in enumerate(network.decoder):
    put_stage(stage, params["decoder"][f"stages_{i}"])
    up, head = params["decoder"][f"transpconvs_{i}"], params["decoder"][f"seg_layers_{i}"]
    put(network.up[i].weight, up["kernel"], (0, 4, 1, 2, 3))
    put(network.up[i].bias, up["bias"])
    network.heads[i].weight.data = torch.tensor(np.asarray(head["kernel"]).T[..., None, None, None])
    put(network.heads[i].bias, head["bias"])


def random_like(tree: dict, seed: int) -> dict:
  """Values that leave nothing at its neutral element (scales near 1, biases not 0)."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key == "kernel":
      fan_in = np.prod(leaf.shape[:-1])
      return (rng.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(np.float32)
    offset = 1 if path[-1].key == "scale" else 0
    return (offset + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, tree)


CONFIG = UNetConfig(
  features=(4, 6, 8),
  strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
  kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
)


def test_unet_equals_the_same_network_in_torch_at_every_resolution_and_in_its_gradient():
  unet = UNet(CONFIG, num_outputs=3)
  x = np.random.default_rng(0).standard_normal((2, 6, 12, 8, 2)).astype(np.float32)
  params = random_like(jax.eval_shape(unet.init, jax.random.key(0), x)["params"], 1)
  network = TorchUNet(CONFIG, 2, 3)
  to_torch(params, network)
  x_torch = torch.tensor(x.transpose(0, 4, 1, 2, 3).copy(), requires_grad=True)
  expected = network(x_torch)
  sum((y**2).sum() for y in expected).backward()

  def loss(p, x):
    outputs = unet.apply({"params": p}, x, deep_supervision=True)
    return sum((y**2).sum() for y in outputs), outputs

  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  (_, outputs), (grads, grad_x) = run(params, x)
  assert [y.shape for y in outputs] == [(2, 6, 12, 8, 3), (2, 6, 6, 4, 3)]
  for ours, theirs in zip(outputs, expected, strict=True):
    theirs = theirs.detach().numpy().transpose(0, 2, 3, 4, 1)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
  assert x_torch.grad is not None
  theirs = x_torch.grad.numpy().transpose(0, 2, 3, 4, 1)
  np.testing.assert_allclose(grad_x, theirs, atol=1e-4 * np.abs(theirs).max())
  first = network.encoder[0][0].weight.grad.numpy().transpose(2, 3, 4, 1, 0)
  ours = grads["encoder"]["stages_0"]["convs_0"]["conv"]["kernel"]
  np.testing.assert_allclose(ours, first, atol=1e-4 * np.abs(first).max())
  alone = jax.jit(unet.apply)({"params": params}, x)
  np.testing.assert_allclose(alone, outputs[0], atol=1e-6 * np.abs(alone).max())


def test_a_patch_that_does_not_divide_is_refused():
  with pytest.raises(ValueError, match="not divisible by \\(2, 4, 4\\)"):
    jax.eval_shape(UNet(CONFIG, 2).init, jax.random.key(0), jnp.zeros((1, 6, 12, 10, 1)))


def test_a_fresh_residual_block_is_its_skip_and_learns():
  block = ResidualBlock(4, (3, 3, 3), (1, 1, 1), jnp.float32, default_platform())
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 4, 4, 4)), jnp.float32)
  params = block.init(jax.random.key(0), x)
  np.testing.assert_array_equal(block.apply(params, x), jnp.where(x < 0, 0.01 * x, x))
  found = jax.grad(lambda p: (block.apply(p, x) ** 2).sum())(params)
  assert np.abs(found["params"]["conv2"]["norm"]["scale"]).min() > 0


def gradients(f, x, kernel, weight):
  """Output and both gradients of a weighted sum of it."""

  @jax.jit
  def run(x, kernel):
    y, vjp = jax.vjp(f, x, kernel)
    return y, *vjp(weight)

  return run(x, kernel)


def assert_same_convolution(ours, native, shape, kernel, tolerance):
  rng = np.random.default_rng(0)
  x, kernel = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (shape, kernel))
  weight = jnp.asarray(rng.standard_normal(jax.eval_shape(native, x, kernel).shape), jnp.float32)
  results = [gradients(f, x, kernel, weight) for f in (ours, native)]
  for a, b in zip(*results, strict=True):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
  "size, kernel",
  [((5, 8, 11), (3, 3, 3)), ((3, 4, 9), (1, 3, 3)), ((6, 2, 1), (3, 3, 3)), ((1, 5, 4), (3, 1, 3))],
)
def test_winograd_convolution_equals_the_native_one(size, kernel):
  assert_same_convolution(
    winograd_conv3d, convolutions.native_conv3d, (2, *size, 8), (*kernel, 8, 12), 1e-4
  )


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3)])
def test_depth_taps_equal_the_native_convolution(stride, kernel):
  assert_same_convolution(
    lambda x, k: convolutions.depth_taps_conv3d(x, k, stride),
    lambda x, k: convolutions.native_conv3d(x, k, stride),
    (2, 5, 6, 7, 3),
    (*kernel, 3, 4),
    1e-5,
  )


def test_the_layer_takes_winograd_only_where_it_pays():
  def taken(shape, kernel, stride=(1, 1, 1), dtype=jnp.float32):
    arguments = (jax.ShapeDtypeStruct(s, dtype) for s in (shape, kernel))
    run = jax.make_jaxpr(lambda x, k: convolutions.conv3d(x, k, stride))
    return "custom_vjp" in str(run(*arguments))

  if jax.default_backend() != "cpu":
    pytest.skip("the backend has a fast convolution of its own")
  large = (2, 20, 28, 20, 32)
  assert taken(large, (3, 3, 3, 32, 32))
  assert not taken(large, (3, 3, 3, 32, 32), stride=(2, 2, 2))
  assert not taken(large, (3, 3, 3, 32, 32), dtype=jnp.bfloat16)
  assert not taken((2, 20, 28, 20, 1), (3, 3, 3, 1, 32))
  assert not taken((2, 5, 7, 5, 256), (3, 3, 3, 256, 256))


@pytest.mark.parametrize("size", [(5, 7), (1, 2)])
def test_depthwise_convolution_equals_the_native_one(size):
  assert_same_convolution(
    convolutions.shifted_depthwise_conv2d,
    convolutions.native_depthwise_conv2d,
    (2, *size, 5),
    (3, 3, 1, 5),
    1e-5,
  )


def test_fresh_generators_have_the_distributions_of_the_modules():
  """numpy's draws against Linen's own, tensor by tensor, of a network that has all kinds."""
  config = UNetConfig((16, 24), ((1, 1, 1), (1, 2, 2)), ((1, 3, 3),) * 2, blocks=(1, 1))
  unet, key = UNet(config, 5), jax.random.key(0)
  ours = flatten_dict(init_generator(unet, 2, key), sep="/")
  # As one program: operation by operation they would be compiled one by one.
  draw = jax.jit(functools.partial(unet.init, deep_supervision=True))
  theirs = flatten_dict(draw(key, jnp.zeros((1, *config.divisor, 2)))["params"], sep="/")
  assert ours.keys() == theirs.keys()
  assert {path.split("/")[-2].rstrip("_0123456789") for path in ours} == {
    "conv", "norm", "transpconvs", "seg_layers"}
  for path, x in theirs.items():
    y, spread = np.asarray(ours[path]), float(x.std())
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    if np.ptp(x) == 0:
      np.testing.assert_array_equal(y, x, err_msg=path)
    else:
      bound = spread * (0.05 + 5 / np.sqrt(x.size))
      assert abs(y.std() - spread) < bound and abs(y.mean()) < bound, path
