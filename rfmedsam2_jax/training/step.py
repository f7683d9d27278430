"""One training step of the generator and of the refiner: pure functions of (state, batch)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rfmedsam2_jax.losses import generator_loss, refiner_loss
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.nn.remat import compiler_options
from rfmedsam2_jax.nn.unet import UNet
from rfmedsam2_jax.refinement.config import RefinementConfig
from rfmedsam2_jax.refinement.prompts import CellPrompts, next_prompts
from rfmedsam2_jax.refinement.stages import all_stages_on_grid
from rfmedsam2_jax.training.config import GeneratorConfig, OptimizerConfig, RefinerConfig
from rfmedsam2_jax.training.state import Params, TrainState, ema_update, merge

Array = jax.Array
Batch = dict[str, Array]
Loss = Callable[[Params, Batch, Array], tuple[Array, dict[str, Array]]]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_step(loss: Loss, optimizer: optax.GradientTransformation, config: OptimizerConfig) -> Step:
  """A step (state, batch) -> (state, metrics), to be compiled.

  Args:
    loss: (params, batch, key) -> (scalar, metrics).
  """

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(state.key, state.step)

    def of_trained(trained: Params):
      return loss(merge(trained, state.frozen), batch, key)

    (value, metrics), gradients = jax.value_and_grad(of_trained, has_aux=True)(state.trained)
    updates, opt_state = optimizer.update(gradients, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    metrics = metrics | {"loss": value, "gradient_norm": optax.tree.norm(gradients)}
    new = state.replace(
      step=state.step + 1,
      trained=trained,
      ema=ema_update(state.ema, trained, config.ema_decay, state.step),
      optimizer=opt_state,
    )
    return new, metrics

  return step


def generator_loss_fn(
  model: UNet, config: GeneratorConfig, membership: np.ndarray, regions: bool
) -> Loss:
  """Deeply supervised loss of a batch of patches, see data.pipeline.generator_batches."""
  member = jnp.asarray(membership)

  def loss(params: Params, batch: Batch, key: Array):
    del key
    logits: Any = model.apply({"params": params}, batch["image"], deep_supervision=True)
    return generator_loss(logits, batch["target"], member, regions, config.loss)

  return loss


def jittered(boxes: Array, amount: float, side: int, key: Array) -> Array:
  """Boxes [N, 4] with every edge moved by up to `amount` of the box's size, inside the image."""
  size = jnp.concatenate([boxes[:, 2:] - boxes[:, :2]] * 2, axis=1) + 1.0
  moved = boxes + size * amount * jax.random.uniform(key, boxes.shape, minval=-1.0, maxval=1.0)
  moved = jnp.clip(moved, 0.0, side - 1.0)
  return jnp.concatenate(
    [jnp.minimum(moved[:, :2], moved[:, 2:]), jnp.maximum(moved[:, :2], moved[:, 2:])], axis=1
  )


def stage0_cells(batch: Batch, refinement: RefinementConfig, side: int) -> CellPrompts:
  """Stage-0 prompts [B * T * L] of a batch of runs; presence is any foreground in the mask."""
  logits = batch["logits"].reshape(-1, *batch["logits"].shape[-2:])
  certain = jnp.full(logits.shape[:1], 32.0)
  return next_prompts(logits, certain, side, refinement.box_margin)


def refiner_loss_fn(model: SAM2, config: RefinerConfig, refinement: RefinementConfig) -> Loss:
  """Sum over stages of the weighted losses of all live cells, see data.pipeline.refiner_batches."""

  def loss(params: Params, batch: Batch, key: Array):
    runs, tracks, length, height, width = batch["logits"].shape
    side = model.config.image_size
    cells = stage0_cells(batch, refinement, side)
    cells = cells._replace(boxes=jittered(cells.boxes, config.box_jitter, side, key))
    slices = batch["images"].reshape(runs * length, side, side, 3)
    results = all_stages_on_grid(
      model, params, refinement, slices, cells, batch["inside"], batch["depth"]
    )
    target = batch["masks"].reshape(-1, height, width)
    known = batch["known"].reshape(-1, height, width)
    present = jnp.max(target, axis=(1, 2)) > 0.5
    # That a structure is absent can only be learnt where nothing is ignored.
    certain = present | (jnp.min(known, axis=(1, 2)) > 0.5)
    inside = jnp.broadcast_to(batch["inside"][:, None], (runs, tracks, length)).reshape(-1)
    total = jnp.float32(0)
    metrics: dict[str, Array] = {}
    for number, (stage, (out, live)) in enumerate(
      zip(refinement.stages, results, strict=True), 1
    ):
      counts = (live | present) & inside & certain
      value, parts = refiner_loss(
        out.logits, out.iou, out.presence, target, known, present, counts, config.loss
      )
      total = total + stage.loss_weight * value
      metrics |= {f"stage{number}/{name}": part for name, part in parts.items()}
    return total, metrics

  return loss


def compile_step(step: Step) -> Callable[..., Any]:
  """The step, compiled; the state that goes in is donated."""
  return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
