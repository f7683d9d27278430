"""The image encoder, its attention and its positions against sam2 1.1.0 (PyTorch)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfmedsam2_jax.nn import attention, positions, row_bands
from rfmedsam2_jax.nn.attention import apply_rope, axial_rope, dot_product_attention
from rfmedsam2_jax.nn.convolutions import Conv2D
from rfmedsam2_jax.nn.fpn import FpnNeck, ImageEncoder
from rfmedsam2_jax.nn.hiera import Hiera
from rfmedsam2_jax.nn.layers import MLP, ConvTranspose2x2, gelu, layer_norm

torch = pytest.importorskip("torch")
hieradet = pytest.importorskip("sam2.modeling.backbones.hieradet")
image_encoder = pytest.importorskip("sam2.modeling.backbones.image_encoder")
position_encoding = pytest.importorskip("sam2.modeling.position_encoding")
sam2_utils = pytest.importorskip("sam2.modeling.sam2_utils")

TINY = dict(embed_dim=16, num_heads=1, stages=(1, 2, 3, 2), window_spec=(8, 4, 14, 7),
            global_att_blocks=(4, 7), window_pos_embed_bkg_spatial_size=(7, 7))


def draw_weights(module, seed):
  """Draws every tensor anew: zero position embeddings and tiny gains would hide mistakes."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, tensor in module.named_parameters():
      noise = torch.randn(tensor.shape, generator=generator)
      if "norm" in name and name.endswith("weight"):
        tensor.copy_(1 + 0.2 * noise)
      elif name.endswith("weight"):
        tensor.copy_(noise * 0.6 / tensor[0].numel() ** 0.5)
      elif name.endswith("bias"):
        tensor.copy_(0.1 * noise)
      else:
        tensor.copy_(0.5 * noise)
  return module.eval()


def to_params(module):
  """A state dict of dense layers, convolutions, norms and position embeddings as a Linen tree."""
  params = {}
  for name, tensor in module.state_dict().items():
    x = tensor.numpy()
    *path, leaf = name.split(".")
    if leaf == "weight":
      leaf = "scale" if x.ndim == 1 else "kernel"
      x = {1: x, 2: x.T, 4: x.transpose(2, 3, 1, 0) if x.ndim == 4 else None}[x.ndim]
    elif leaf.startswith("pos_embed"):
      x = x.transpose(0, 2, 3, 1)
    scopes: list[str] = []
    for part in path:
      if part.isdigit():
        scopes[-1] += f"_{part}"
      else:
        scopes.append(part)
    node = params
    for scope in scopes:
      node = node.setdefault(scope, {})
    node[leaf] = jnp.asarray(x)
  return params


def assert_close(ours, theirs, tolerance=2e-5):
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def random(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def encoders(seed=0, **sizes):
  """The official encoder with drawn weights, ours, and the weights as our parameters."""
  sizes = TINY | sizes
  widths = [sizes["embed_dim"] * 2**i for i in (3, 2, 1, 0)]
  neck = image_encoder.FpnNeck(
    position_encoding.PositionEmbeddingSine(24), 24, widths, fpn_top_down_levels=[2, 3],
    fpn_interp_model="nearest",
  )
  theirs = image_encoder.ImageEncoder(hieradet.Hiera(**sizes), neck, scalp=1)
  draw_weights(theirs, seed)
  return theirs, ImageEncoder(Hiera(**sizes), FpnNeck(24)), to_params(theirs)


# 96 x 160: the third stage's windows (14) need padding both ways, and height is not width.
@pytest.mark.parametrize(
  "sizes",
  [{}, dict(num_heads=2, q_pool=2, window_spec=(8, 4, 16, 8), global_att_blocks=(0, 4, 5))],
)
def test_image_encoder_equals_the_official_one(sizes):
  theirs, ours, params = encoders(**sizes)
  images = random(1, 2, 96, 160, 3)
  if "q_pool" in sizes:  # the neck expects every stage to halve the resolution
    theirs, ours, params = theirs.trunk, Hiera(**TINY | sizes), params["trunk"]
  with torch.no_grad():
    result = theirs(torch.tensor(images).permute(0, 3, 1, 2))
  expected = result["backbone_fpn"] if isinstance(result, dict) else result
  outputs = jax.jit(ours.apply)({"params": params}, images)
  assert len(outputs) == len(expected)
  for out, reference in zip(outputs, expected, strict=True):
    assert_close(out, reference.permute(0, 2, 3, 1))


def test_encoder_in_pieces_equals_the_encoder_at_once(monkeypatch, quickly):
  """Values and gradients; pieces are rows of windows, images where windows are padded, rows."""
  _, ours, params = encoders(stages=(1, 1, 2, 1), global_att_blocks=(3,))
  images = random(1, 2, 96, 160, 3)

  def loss(params, images):
    levels = ours.apply({"params": params}, images)
    return sum((x**2).sum() for x in levels), levels

  cut = []
  divisor = row_bands.largest_divisor
  monkeypatch.setattr(
    row_bands, "largest_divisor", lambda *args: cut.append((args[0], divisor(*args))) or cut[-1][1]
  )
  (_, whole), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, images)
  assert all(size == count for count, size in cut)
  cut.clear()
  monkeypatch.setattr(row_bands, "BAND", 24 * 40 * 64 // 4)
  (_, levels), gradient_in_pieces = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, images)
  assert sum(size < count for count, size in cut) > 5
  for x, y in zip(levels, whole, strict=True):
    assert_close(x, y, 1e-6)
  jax.tree.map(lambda x, y: assert_close(x, y, 1e-4), gradient_in_pieces, gradient)


def test_image_encoder_has_exactly_the_official_parameters():
  _, ours, params = encoders()
  images = jnp.zeros((1, 64, 64, 3))
  own = jax.eval_shape(ours.init, jax.random.key(0), images)["params"]
  assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)


def test_bfloat16_encoder_keeps_float32_parameters_and_stays_close():
  sizes = TINY | dict(stages=(1, 1, 1, 1), global_att_blocks=())
  _, ours, params = encoders(**sizes)
  images = random(2, 1, 64, 64, 3)
  exact = jax.jit(ours.apply)({"params": params}, images)
  half = ImageEncoder(Hiera(**sizes, dtype=jnp.bfloat16), FpnNeck(24, dtype=jnp.bfloat16))
  own = jax.eval_shape(half.init, jax.random.key(0), images)["params"]
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(own))
  for out, reference in zip(jax.jit(half.apply)({"params": params}, images), exact, strict=True):
    assert out.dtype == jnp.bfloat16
    assert_close(out.astype(jnp.float32), reference, 0.1)


def test_image_that_windows_do_not_tile_is_refused():
  _, ours, params = encoders()
  with pytest.raises(ValueError, match="divisible by 32"):
    ours.apply({"params": params}, jnp.zeros((1, 80, 64, 3)))


def heads_first(x):
  return torch.tensor(np.asarray(x)).transpose(1, 2)


def reference_attention(q, k, v, mask=None):
  mask = None if mask is None else torch.tensor(mask)[:, None, None]
  out = torch.nn.functional.scaled_dot_product_attention(
    heads_first(q), heads_first(k), heads_first(v), attn_mask=mask
  )
  return out.transpose(1, 2)


# Scores at once, of 2 x 3 x 50 x 70 in the tests: all, one row of the batch, or blocks of 16
# queries and keys of one head (which divide neither 50 nor 70).
SCORES = {"whole": 2**20, "rows": 3 * 50 * 70, "blocks": 16 * 16}


@pytest.fixture(params=SCORES)
def in_pieces(request, monkeypatch):
  """Attention in pieces as on large images, with width 8 and in small."""
  monkeypatch.setattr(attention, "_CPU_SCORES_PER_CHANNEL", SCORES[request.param] // 8 + 1)
  monkeypatch.setattr(attention, "_CPU_BLOCK", 16)
  monkeypatch.setattr(attention, "_CPU_KEPT_SCORES", 0)


def test_attention_equals_torch_whole_and_in_pieces_with_and_without_mask(in_pieces):
  q, k, v = 3 * random(0, 2, 50, 3, 8), random(1, 2, 70, 3, 8), random(2, 2, 70, 3, 8)
  mask = np.random.default_rng(3).random((2, 70)) < 0.5
  mask[0, 16:48] = False  # two blocks of keys of which none takes part
  assert_close(dot_product_attention(q, k, v), reference_attention(q, k, v), 1e-6)
  assert_close(dot_product_attention(q, k, v, mask), reference_attention(q, k, v, mask), 1e-6)

  def loss(q, k, v):
    return (dot_product_attention(q, k, v, mask) ** 2).sum()

  tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
  out = torch.nn.functional.scaled_dot_product_attention(
    *(t.transpose(1, 2) for t in tensors), attn_mask=torch.tensor(mask)[:, None, None]
  )
  (out**2).sum().backward()
  for ours, theirs in zip(jax.grad(loss, (0, 1, 2))(q, k, v), tensors, strict=True):
    assert_close(ours, theirs.grad, 1e-5)


@pytest.mark.parametrize("per_channel", [2**20, 4, 1])  # 60 scores of width 8: all, 30, 4 at once
def test_row_without_keys_gives_zeros_and_zero_gradients(per_channel, monkeypatch):
  monkeypatch.setattr(attention, "_CPU_BLOCK", 2)
  monkeypatch.setattr(attention, "_CPU_SCORES_PER_CHANNEL", per_channel)
  q, k, v = random(0, 2, 5, 1, 8), random(1, 2, 6, 1, 8), random(2, 2, 6, 1, 8)
  mask = np.array([[False] * 6, [True] * 3 + [False] * 3])

  def loss(q, k, v):
    return (dot_product_attention(q, k, v, mask) ** 2).sum()

  out = dot_product_attention(q, k, v, mask)
  assert np.all(out[0] == 0) and np.all(np.isfinite(out))
  for gradient in jax.grad(loss, (0, 1, 2))(q, k, v):
    assert np.all(gradient[0] == 0) and np.all(np.isfinite(gradient)) and np.any(gradient[1] != 0)


def test_masked_keys_equal_the_keys_that_exist():
  q, k, v = random(0, 1, 5, 2, 8), random(1, 1, 6, 2, 8), random(2, 1, 6, 2, 8)
  mask = np.array([[True, False, True, True, False, False]])
  kept = dot_product_attention(q, k[:, mask[0]], v[:, mask[0]])
  v = v + np.float32(1e6) * ~mask[..., None, None]
  assert_close(dot_product_attention(q, k, v, mask), kept, 1e-6)


def test_rope_equals_the_official_one_on_queries_and_repeated_keys():
  height = width = 5
  q, k = random(0, 2, 25, 2, 16), random(1, 2, 75, 2, 16)
  cis = position_encoding.compute_axial_cis(16, width, height)
  theirs = position_encoding.apply_rotary_enc(heads_first(q), heads_first(k), cis, True)
  rope = axial_rope(height, width, 16)
  for ours, reference in zip((q, k), theirs, strict=True):
    assert_close(apply_rope(ours, rope), reference.transpose(1, 2), 1e-6)


def test_positions_equal_the_official_ones():
  sine = position_encoding.PositionEmbeddingSine(24)(torch.zeros(1, 1, 6, 9))[0]
  assert_close(positions.sine_positions_2d(6, 9, 24), sine.permute(1, 2, 0), 1e-5)

  offsets = np.array([[-0.4, 0.0, 1.0, 15.0]], np.float32)
  pointer = sam2_utils.get_1d_sine_pe(torch.tensor(offsets), 32)
  assert_close(positions.sine_positions_1d(offsets, 32), pointer, 1e-6)

  torch.manual_seed(0)
  fourier = position_encoding.PositionEmbeddingRandom(16)
  matrix = fourier.positional_encoding_gaussian_matrix.numpy()
  grid = fourier((6, 9)).permute(1, 2, 0)
  assert_close(positions.random_fourier_grid(matrix, 6, 9), grid, 1e-5)
  points = np.array([[[10.5, 3.5], [63.0, 0.0]]], np.float32)
  coded = fourier.forward_with_coords(torch.tensor(points), (32, 64))
  assert_close(positions.random_fourier(points / np.array([64.0, 32.0]), matrix), coded, 1e-5)


@pytest.mark.parametrize("size", [(24, 40), (8, 8)])
def test_hiera_positions_equal_torch_when_they_grow_and_when_they_shrink(size):
  trunk = draw_weights(hieradet.Hiera(**TINY | dict(window_pos_embed_bkg_spatial_size=(14, 14))), 0)
  params = to_params(trunk)
  with torch.no_grad():
    theirs = trunk._get_pos_embed(size)
  ours = positions.hiera_positions(params["pos_embed"], params["pos_embed_window"], *size)
  assert_close(ours, theirs, 1e-5)


def test_layers_equal_torch():
  x = random(0, 2, 5, 7, 6)
  x_BCHW = torch.tensor(x).permute(0, 3, 1, 2)

  up = draw_weights(torch.nn.ConvTranspose2d(6, 4, 2, 2), 1)
  kernel = up.weight.detach().numpy().transpose(0, 2, 3, 1)
  params = {"kernel": kernel, "bias": up.bias.detach().numpy()}
  expected = up(x_BCHW).detach().permute(0, 2, 3, 1)
  assert_close(ConvTranspose2x2(4).apply({"params": params}, x), expected, 1e-6)

  down = draw_weights(torch.nn.Conv2d(6, 4, 3, stride=2, padding=1), 2)
  expected = down(x_BCHW).detach().permute(0, 2, 3, 1)
  assert_close(Conv2D(4, 3, 2, 1).apply({"params": to_params(down)}, x), expected, 1e-6)

  mlp = draw_weights(sam2_utils.MLP(6, 8, 4, 3, torch.nn.GELU, sigmoid_output=True), 3)
  expected = mlp(torch.tensor(x)).detach()
  ours = MLP(8, 4, 3, activation=gelu, sigmoid_output=True)
  assert_close(ours.apply({"params": to_params(mlp)}, x), expected, 1e-6)

  # Mean a hundred deviations from zero: the one-pass variance fails here.
  far = x + 100
  expected = torch.nn.functional.layer_norm(torch.tensor(far), (6,))
  norm = layer_norm()
  assert_close(norm.apply(norm.init(jax.random.key(0), far), far), expected, 1e-4)
