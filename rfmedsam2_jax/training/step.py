"""One training step of the generator and of the refiner: pure functions of (state, batch)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rfmedsam2_jax.config.training import GeneratorConfig, Optimizer, RefinerConfig
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.nn.layers import Array, Params
from rfmedsam2_jax.nn.losses import CellTruth, generator_loss, refiner_loss
from rfmedsam2_jax.nn.remat import compiler_options
from rfmedsam2_jax.nn.unet import UNet
from rfmedsam2_jax.parallel.mesh import mesh_platform
from rfmedsam2_jax.parallel.rules import over_mesh, shardings
from rfmedsam2_jax.refinement.config import RefinementConfig
from rfmedsam2_jax.refinement.prompts import stage0_prompts
from rfmedsam2_jax.refinement.stages import all_stages_on_grid, masks_on_grid
from rfmedsam2_jax.training.state import TrainState, ema_update, merge

Batch = dict[str, Array]
# (params, batch, key, axes): a batch that is spread over devices comes with the axes of the mesh.
Loss = Callable[[Params, Batch, Array, tuple[str, ...]], tuple[Array, dict[str, Array]]]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]

_JITTER_BOUND = 20 / 1024  # of the image's side: SAM 2's noise_bound, pixels of its 1024


def make_step(
  loss: Loss, optimizer: optax.GradientTransformation, config: Optimizer, mesh: Mesh | None = None,
  microbatches: int = 1,
) -> Step:
  """A step to be compiled.

  mesh: that states and batches are spread over; None: one device. microbatches: equal parts of a
  batch whose gradients are computed one after the other and averaged; row r belongs to part
  r % microbatches, however many devices share the batch.
  """
  spread: Callable[..., Any] = loss if mesh is None else over_mesh(loss, mesh)

  def gradient(state: TrainState, batch: Batch, key: Array):
    def of_trained(trained: Params):
      return spread(merge(trained, state.frozen), batch, key)

    (value, metrics), gradients = jax.value_and_grad(of_trained, has_aux=True)(state.trained)
    return gradients, metrics | {"loss": value}

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(state.key, state.step)
    if microbatches == 1:
      gradients, metrics = gradient(state, batch, key)
    else:
      parts = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), batch)
      keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(microbatches))

      def add(total: Any, part: tuple[Batch, Array]):
        return jax.tree.map(jnp.add, total, gradient(state, *part)), None

      shapes = jax.eval_shape(gradient, state, jax.tree.map(lambda x: x[0], parts), key)
      zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      total, _ = jax.lax.scan(add, zero, (parts, keys))
      gradients, metrics = jax.tree.map(lambda x: x / microbatches, total)
    updates, opt_state = optimizer.update(gradients, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    ema = ema_update(state.ema, trained, config.ema_decay, state.step)
    new = state.replace(step=state.step + 1, trained=trained, ema=ema, optimizer=opt_state)
    return new, metrics | {"gradient_norm": optax.tree.norm(gradients)}

  return step


def generator_loss_fn(
  model: UNet, config: GeneratorConfig, membership: np.ndarray, regions: bool
) -> Loss:
  """Deeply supervised loss of a batch of patches, see data.pipeline.generator_batches."""
  member = jnp.asarray(membership)

  def loss(params: Params, batch: Batch, key: Array, axes: tuple[str, ...] = ()):
    logits: Any = model.apply({"params": params}, batch["image"], deep_supervision=True)
    return generator_loss(logits, batch["target"], member, regions, config.loss, axes)

  return loss


def _jittered(boxes: Array, amount: float, side: int, key: Array, axes: tuple[str, ...]) -> Array:
  """Boxes [N, 4] with every edge moved by up to `amount` of the box's size, inside the image.

  Not further than SAM 2 moves them in its training (sam2_utils.py: sample_box_points).
  """
  size = jnp.concatenate([boxes[:, 2:] - boxes[:, :2]] * 2, axis=1)
  furthest = jnp.minimum(size * amount, _JITTER_BOUND * side)
  # Drawn for the whole batch, so that a box is moved alike on however many devices.
  count = len(boxes)
  devices = jax.lax.axis_size(axes) if axes else 1
  drawn = jax.random.uniform(key, (devices * count, 4), minval=-1.0, maxval=1.0)
  if axes:
    drawn = jax.lax.dynamic_slice_in_dim(drawn, jax.lax.axis_index(axes) * count, count)
  return jnp.clip(boxes + furthest * drawn, 0.0, side - 1.0)


def refiner_loss_fn(
  model: SAM2, config: RefinerConfig, refinement: RefinementConfig, masks_alone: bool = False
) -> Loss:
  """Sum over stages of the weighted losses of all live cells, see data.pipeline.refiner_batches.

  masks_alone: of the masks as the MaskAdapter alone corrects them, see `masks_on_grid`.
  """
  all_stages, weights = all_stages_on_grid, config.loss
  told: tuple[str, ...] = ("focal", "dice", "iou", "presence")
  if masks_alone:  # they come without a predicted IoU or presence
    all_stages, weights = masks_on_grid, dataclasses.replace(weights, iou=0.0, presence=0.0)
    told = ("focal", "dice")

  def loss(params: Params, batch: Batch, key: Array, axes: tuple[str, ...] = ()):
    runs, tracks, length, height, width = batch["logits"].shape
    side = model.config.image_size
    logits = batch["logits"].reshape(-1, height, width)
    cells = stage0_prompts(logits, side, refinement.box_margin)
    cells = cells._replace(boxes=_jittered(cells.boxes, config.box_jitter, side, key, axes))
    slices = batch["images"].reshape(runs * length, side, side, 3)
    results = all_stages(model, params, refinement, slices, cells, batch["inside"], batch["depth"])
    target = batch["masks"].reshape(-1, height, width)
    known = batch["known"].reshape(-1, height, width)
    present = jnp.max(target, axis=(1, 2)) > 0.5
    # That a structure is absent can only be learnt where nothing is ignored.
    learnt = present | (jnp.min(known, axis=(1, 2)) > 0.5)
    truth = CellTruth(target, known, present)
    inside = jnp.broadcast_to(batch["inside"][:, None], (runs, tracks, length)).reshape(-1)
    total, metrics = jnp.float32(0), dict[str, Array]()
    for number, (stage, (out, live)) in enumerate(zip(refinement.stages, results, strict=True), 1):
      counts = (live | present) & inside & learnt
      value, parts = refiner_loss(out.logits, out.iou, out.presence, truth, counts, weights, axes)
      total = total + stage.loss_weight * value
      metrics |= {f"stage{number}/{name}": parts[name] for name in told}
    return total, metrics

  return loss


def compile_step(step: Step, state: TrainState, mesh: Mesh) -> Callable[..., Any]:
  """The step, to be compiled for states like `state` laid out by the rules; it is donated."""
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings(state, mesh), None),
                 compiler_options=compiler_options(mesh_platform(mesh)))
