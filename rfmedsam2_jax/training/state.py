"""What a training step takes and returns, and what of it is trained.

Parameters are nested dicts. `partition` splits them by path patterns, so that frozen ones have
neither gradients nor optimizer state.
"""

import fnmatch
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.config.training import Optimizer
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.nn.sam2 import BUFFERS


class TrainState(flax.struct.PyTreeNode):
  step: jax.Array  # int32
  trained: Params
  frozen: Params
  ema: Params  # with the paths of `trained`
  optimizer: Any
  key: jax.Array  # the run's; step n uses fold_in(key, n)

  @property
  def params(self) -> Params:
    return merge(self.trained, self.frozen)


def partition(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
  """Splits parameters into those whose path matches a pattern, and the others.

  patterns: of fnmatch, on paths joined by "/"; `*` also matches "/". Buffers never match.

  Raises:
    UserError: a pattern matches nothing.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  chosen = {path for path in flat
            if path not in BUFFERS and any(fnmatch.fnmatchcase(path, p) for p in patterns)}
  for pattern in patterns:
    if not fnmatch.filter(chosen, pattern):
      raise UserError(f"refiner.trainable: {pattern!r} matches no parameter; correct the pattern")
  trained, frozen = (
    traverse_util.unflatten_dict({p: x for p, x in flat.items() if (p in chosen) == wanted}, "/")
    for wanted in (True, False))
  return trained, frozen


def merge(first: Params, second: Params) -> Params:
  """The one parameter dict that `partition` split."""
  flat = traverse_util.flatten_dict(first) | traverse_util.flatten_dict(second)
  return traverse_util.unflatten_dict(flat)


def with_frozen_as(dtype: str, params: Params, patterns: Sequence[str]) -> Params:
  """Parameters whose frozen kernels are held in another dtype, rounded for good.

  Gains, biases, embeddings and buffers stay float32: they are a percent of the parameters, and what
  is added or turned by them would be moved as a whole. patterns: of what is trained.
  """
  trained, frozen = partition(params, patterns)
  flat = traverse_util.flatten_dict(frozen)
  held = {path: x.astype(dtype) if path[-1] == "kernel" else x for path, x in flat.items()}
  return merge(trained, traverse_util.unflatten_dict(held))


def silenced_decoder(params: Params) -> Params:
  """SAM 2's parameters with a mask decoder that decodes zero logits for masks and presence.

  From scratch, each residual stage then starts as the identity and learns corrections. Only the
  last layers are zero, so all others get gradients once these have moved.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  last = ("*/output_hypernetworks_mlps_*/layers_2/*", "*/pred_obj_score_head/layers_2/*")
  silent = {path for pattern in last for path in fnmatch.filter(flat, pattern)}
  flat = {path: jnp.zeros_like(x) if path in silent else x for path, x in flat.items()}
  return traverse_util.unflatten_dict(flat, sep="/")


def learning_rate(config: Optimizer, steps: int) -> optax.Schedule:
  """Linear warm-up, then decay to zero at `steps`."""
  warmup = min(config.warmup_steps, max(steps - 1, 0))
  first, peak = config.learning_rate / max(warmup, 1), config.learning_rate
  if config.schedule == "cosine":
    return optax.warmup_cosine_decay_schedule(first, peak, warmup, max(steps, 1))
  rise = optax.linear_schedule(first, peak, warmup)
  decay = optax.polynomial_schedule(peak, 0.0, 0.9, max(steps - warmup, 1))
  return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: Optimizer, steps: int) -> optax.GradientTransformation:
  rate = learning_rate(config, steps)
  matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # noqa: E731
  if config.name == "adamw":
    rule = optax.adamw(rate, weight_decay=config.weight_decay, mask=matrices)
  else:
    rule = optax.chain(optax.add_decayed_weights(config.weight_decay, mask=matrices),
                       optax.sgd(rate, momentum=0.99, nesterov=True))
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def init_state(
  params: Params, patterns: Sequence[str], optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
  trained, frozen = partition(params, patterns)
  # The average has buffers of its own: the step donates all of the state.
  return TrainState(step=jnp.zeros((), jnp.int32), trained=trained, frozen=frozen,
                    ema=jax.tree.map(jnp.array, trained), key=key,
                    optimizer=optimizer.init(trained))


def ema_update(ema: Params, trained: Params, decay: float, step: jax.Array) -> Params:
  """Averaged weights; the decay grows with the step, so that the first weights are forgotten.

  As in TensorFlow's ExponentialMovingAverage(num_updates).
  """
  rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if decay else 0.0
  # Optax moves its second tree towards its first: the new weights by `rate` towards the average.
  return optax.incremental_update(ema, trained, rate)
