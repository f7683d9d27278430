"""Memory encoder and memory attention against sam2 1.1.0 (PyTorch) with the same weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_sam2
from torch_sam2 import TINY, nchw, relative_error

from rfmedsam2_jax.nn.memory_attention import MemorySlots
from rfmedsam2_jax.nn.sam2 import SAM2

torch = torch_sam2.torch
TOLERANCE = 5e-6  # about ten times what is seen
N, G, C, MEM = 2, TINY.grid, TINY.d_model, TINY.mem_dim
CONFIGS = {
  "2.1": TINY,
  "2.0": dataclasses.replace(TINY, absent_embedding=False),
}
FRAME, DEPTH = 5, 10
# Conditioning slices behind and ahead (its pointer does not count), and two of the six others.
CONDITIONING, OTHERS = (1, 8), (3, 4)


def random(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


EMBEDDING = random(1, N, G, G, C)
MAPS = {t: random(10 + t, N, G, G, MEM) for t in CONDITIONING + OTHERS}
POINTERS = {t: 3 * random(30 + t, N, C) for t in CONDITIONING + OTHERS}


@functools.cache
def models(version):
  model = torch_sam2.official(CONFIGS[version])
  if version == "2.1":
    # Twelve pointer tokens among hundreds of spatial ones: their positions must be heard.
    model.obj_ptr_tpos_proj.weight.data *= 10
  return model, torch_sam2.params_of(model, CONFIGS[version])


@functools.partial(jax.jit, static_argnames="version")
def condition(params, slots, version="2.1", embedding=EMBEDDING):
  model = SAM2(CONFIGS[version])
  return model.apply({"params": params}, embedding, slots, method="condition")


def flat(x):
  """[N, H, W, C] to the official [HW, N, C]."""
  return torch.from_numpy(x.reshape(len(x), -1, x.shape[-1])).permute(1, 0, 2)


def official_condition(model):
  positions = model.image_encoder.neck.position_encoding(nchw(EMBEDDING))
  memory_positions = model.memory_encoder.position_encoding(torch.zeros(N, MEM, G, G))
  frame = lambda t: dict(  # noqa: E731
    maskmem_features=nchw(MAPS[t]), maskmem_pos_enc=[memory_positions],
    obj_ptr=torch.from_numpy(POINTERS[t]),
  )
  with torch.no_grad():
    y = model._prepare_memory_conditioned_features(
      FRAME, False, [flat(EMBEDDING)], [positions.flatten(2).permute(2, 0, 1)], [(G, G)],
      dict(cond_frame_outputs={t: frame(t) for t in CONDITIONING},
           non_cond_frame_outputs={t: frame(t) for t in OTHERS}),
      DEPTH,
    )
  return y.permute(0, 2, 3, 1)


def slots_of(order, pointer_order, holes=0):
  """Slots as a caller makes them, with `holes` empty ones in front that hold NaN."""
  hole = lambda *shape: np.full((N, holes, *shape), np.nan, np.float32)  # noqa: E731
  last = TINY.num_maskmem - 1
  rows = [last if t in CONDITIONING else FRAME - t - 1 for t in order]
  positions = [(FRAME - t) / (min(DEPTH, 16) - 1) for t in pointer_order]
  per_cell = lambda x, dtype: np.tile(np.array(x, dtype), (N, 1))  # noqa: E731
  maps = [np.stack([MAPS[t] for t in order], 1)] if order else []
  pointers = [np.stack([POINTERS[t] for t in pointer_order], 1)] if pointer_order else []
  return MemorySlots(
    maps=np.concatenate([hole(G, G, MEM), *maps], 1),
    rows=per_cell([3] * holes + rows, np.int32),
    valid=per_cell([False] * holes + [True] * len(order), bool),
    pointers=np.concatenate([hole(C), *pointers], 1),
    pointer_positions=per_cell([0.5] * holes + positions, np.float32),
    pointer_valid=per_cell([False] * holes + [True] * len(pointer_order), bool),
  )


@pytest.mark.parametrize("holes", [0, 2])
@pytest.mark.parametrize("version", CONFIGS)
def test_conditioned_features_are_the_official_ones(version, holes):
  """Any order of slots, with empty ones that hold NaN or without."""
  model, params = models(version)
  slots = slots_of((4, 1, 8, 3), (3, 1, 4), holes)
  error = relative_error(condition(params, slots, version), official_condition(model))
  assert error < TOLERANCE, error


def test_each_fact_about_memory_shows_in_the_figures():
  """Deliberate mistakes are far outside the tolerance: the parity test can fail."""
  model, params = models("2.1")
  expected = official_condition(model)
  right = slots_of((4, 1, 8, 3), (3, 1, 4))
  mistakes = {
    "rows in another order": right._replace(rows=right.rows[:, ::-1]),
    "depth of a bucket instead of the true depth": right._replace(
      pointer_positions=right.pointer_positions * (9 / 15)
    ),
    "unsigned pointer distances": right._replace(
      pointer_positions=-right.pointer_positions
    ),
    "a pointer from ahead": right._replace(
      pointers=np.stack([POINTERS[8], *right.pointers.swapaxes(0, 1)[1:]], 1)
    ),
    "a missing slot": right._replace(valid=right.valid & (np.arange(4) > 0)),
  }
  for name, slots in mistakes.items():
    assert relative_error(condition(params, slots), expected) > 1e-3, name


def test_the_weights_that_one_can_look_at_are_those_that_were_used():
  """Weights times projected values are what the attention gave to its output projection."""
  _, params = models("2.1")
  slots = slots_of((4, 1), (3,), holes=1)
  run = lambda **options: SAM2(TINY).apply(  # noqa: E731
    {"params": params}, EMBEDDING, slots, method="condition", **options)
  seen = run(mutable=["intermediates"], capture_intermediates=True)[1]["intermediates"]
  attention = seen["memory_attention"]["layers_0"]["cross_attn_image"]
  (weights,) = attention["weights"]
  tokens = 3 * G * G + 2 * (C // MEM)  # three slots of maps, two of pointers; the first is empty
  assert weights.shape == (N, G * G, tokens) and weights.dtype == np.float32
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
  empty = np.r_[: G * G, 3 * G * G : 3 * G * G + C // MEM]
  assert not weights[..., empty].any() and (np.delete(weights, empty, -1) > 0).all()

  values = np.concatenate([
    np.where(slots.valid[..., None, None, None], slots.maps, 0).reshape(N, -1, MEM),
    np.where(slots.pointer_valid[..., None], slots.pointers, 0).reshape(N, -1, MEM)], 1)
  own = params["memory_attention"]["layers_0"]["cross_attn_image"]
  project = lambda name, x: x @ own[name]["kernel"] + own[name]["bias"]  # noqa: E731
  expected = project("out_proj", weights @ project("v_proj", values))
  np.testing.assert_allclose(attention["__call__"][0], expected, rtol=2e-4, atol=2e-5)


def test_cells_without_memory_are_unconditioned_and_differentiable():
  """Beside a cell that has memory; empty slots hold NaN."""
  _, params = models("2.1")
  slots = slots_of((4, 1, 8, 3), (3, 1, 4), holes=1)
  alone = np.array([[False], [True]])  # the first cell has nothing
  slots = slots._replace(valid=slots.valid & alone, pointer_valid=slots.pointer_valid & alone)
  slots.maps[0], slots.pointers[0] = np.nan, np.nan

  def loss(params, embedding, maps):
    y = condition(params, slots._replace(maps=maps), embedding=embedding)
    return (y**2).sum(), y

  (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
    params, EMBEDDING, slots.maps
  )
  np.testing.assert_array_equal(y[0], EMBEDDING[0] + params["no_mem_embed"])
  assert relative_error(y[1], condition(params, slots_of((4, 1, 8, 3), (3, 1, 4)))[1]) < 1e-5
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
  assert not gradients[2][0].any() and gradients[2][1, 1:].any()


def test_pointers_alone_and_maps_alone_are_memory():
  _, params = models("2.1")
  slots = slots_of((4, 1, 8, 3), (3, 1, 4))
  blind = slots._replace(valid=np.zeros_like(slots.valid))
  fewer = slots._replace(
    pointers=slots.pointers[:, :0],
    pointer_positions=slots.pointer_positions[:, :0],
    pointer_valid=slots.pointer_valid[:, :0],
  )
  masked = slots._replace(pointer_valid=np.zeros_like(slots.pointer_valid))
  unconditioned = EMBEDDING + params["no_mem_embed"]
  assert relative_error(condition(params, blind), unconditioned) > 0.1
  assert relative_error(condition(params, masked), condition(params, fewer)) < 1e-5


@pytest.mark.parametrize("binarize", [False, True])
@pytest.mark.parametrize("version", CONFIGS)
def test_memories_are_the_official_ones(version, binarize):
  model, params = models(version)
  logits = 3 * random(5, N, 4 * G, 4 * G)
  presence = np.array([2.0, -1.0], np.float32)
  logits[1] = -1024
  model.binarize_mask_from_pts_for_mem_enc = True
  with torch.no_grad():
    high = torch.nn.functional.interpolate(
      torch.from_numpy(logits)[:, None], size=(16 * G, 16 * G), mode="bilinear",
      align_corners=False,
    )
    theirs, positions = model._encode_new_memory(
      [flat(EMBEDDING)], [(G, G)], high, torch.from_numpy(presence)[:, None], binarize
    )
  ours = jax.jit(
    lambda params: SAM2(CONFIGS[version]).apply(
      {"params": params}, EMBEDDING, logits, presence > 0, binarize, method="remember"
    )
  )(params)
  error = relative_error(ours, theirs.permute(0, 2, 3, 1))
  assert error < TOLERANCE, error


def test_bfloat16_computes_in_bfloat16_and_stays_near_float32():
  """Parameters stay float32 in the tree."""
  _, params = models("2.1")
  config = dataclasses.replace(TINY, dtype="bfloat16")
  slots = jax.tree.map(jnp.asarray, slots_of((4, 1), (4,)))
  y = jax.jit(
    lambda params: SAM2(config).apply({"params": params}, EMBEDDING, slots, method="condition")
  )(params)
  assert y.dtype == jnp.bfloat16
  assert relative_error(y.astype(jnp.float32), condition(params, slots)) < 0.03
