"""One training step of the generator and of the refiner: pure functions of (state, batch).

A batch in microbatches has the loss and the gradient of the whole batch. A loss is a function of
sums over the batch, some of which depend on what the network says: which cells are live, Dice. So a
forward pass over all parts comes first and gives the sums, and with them how the loss changes with
each; then every part adds its gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rfmedsam2_jax.config.training import GeneratorConfig, Optimizer, RefinerConfig
from rfmedsam2_jax.nn import SAM2, losses
from rfmedsam2_jax.nn.boxes import jittered
from rfmedsam2_jax.nn.layers import Array, Params
from rfmedsam2_jax.nn.remat import compiler_options
from rfmedsam2_jax.nn.unet import UNet
from rfmedsam2_jax.parallel.mesh import mesh_platform
from rfmedsam2_jax.parallel.rules import over_mesh, shardings
from rfmedsam2_jax.refinement.config import RefinementConfig
from rfmedsam2_jax.refinement.prompts import stage0_prompts
from rfmedsam2_jax.refinement.stages import all_stages_on_grid, masks_on_grid
from rfmedsam2_jax.training.state import TrainState, ema_update, merge

Batch = dict[str, Array]


class Keys(NamedTuple):
  """Random keys of the rows of a batch, [B] each.

  rows: one for each row. whole: the same in all of them, of what is drawn for the batch.
  """

  rows: Array
  whole: Array


@dataclasses.dataclass(frozen=True)
class Loss:
  """A loss in two halves, as in nn.losses.

  `sums`: of (params, rows of a batch, random keys), a tree of arrays that are added up over the
  batch. A row has a key of its own, and its part of the sums is the same with whatever others.
  `value`: the loss and its metrics, of the sums over a whole batch.
  """

  sums: Callable[[Params, Batch, Keys], Any]
  value: Callable[[Any], tuple[Array, dict[str, Array]]]

  def __call__(self, params: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    """Loss and metrics of a batch in one piece, on one device."""
    return self.value(self.sums(params, batch, row_keys(key, batch)))


Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def row_keys(key: Array, batch: Batch) -> Keys:
  """Random keys of the rows of a batch."""
  rows = jnp.arange(len(jax.tree.leaves(batch)[0]))
  of_rows = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
  return Keys(of_rows, jnp.broadcast_to(key, of_rows.shape))


def make_step(
  loss: Loss, optimizer: optax.GradientTransformation, config: Optimizer, mesh: Mesh | None = None,
  microbatches: int = 1,
) -> Step:
  """A step to be compiled.

  mesh: that states and batches are spread over; None: one device. microbatches: equal parts of a
  batch that are computed one after the other, forwards once more than a batch in one piece; row r
  belongs to part r % microbatches, however many devices share the batch. The result is the same.
  """
  spread = loss.sums if mesh is None else over_mesh(loss.sums, mesh)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    def sums(trained: Params, part: tuple[Batch, Keys]) -> Any:
      return spread(merge(trained, state.frozen), *part)

    whole = batch, row_keys(jax.random.fold_in(state.key, state.step), batch)
    if microbatches == 1:
      def of_whole(trained: Params) -> tuple[Array, dict[str, Array]]:
        return loss.value(sums(trained, whole))

      (value, metrics), gradients = jax.value_and_grad(of_whole, has_aux=True)(state.trained)
    else:
      value, metrics, gradients = _in_parts(sums, loss.value, state.trained, jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), whole))
    updates, opt_state = optimizer.update(gradients, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    ema = ema_update(state.ema, trained, config.ema_decay, state.step)
    new = state.replace(step=state.step + 1, trained=trained, ema=ema, optimizer=opt_state)
    return new, metrics | {"loss": value, "gradient_norm": optax.tree.norm(gradients)}

  return step


def _in_parts(
  sums: Callable[[Params, Any], Any], value_of: Callable[[Any], Any], params: Params, parts: Any
) -> tuple[Array, dict[str, Array], Params]:
  """Loss, metrics and gradient of a batch that is cut along the first axis of `parts`."""
  found = jax.lax.map(functools.partial(sums, params), parts)
  total = jax.tree.map(lambda x: x.sum(0), found)
  value, back, metrics = jax.vjp(value_of, total, has_aux=True)
  (slopes,) = back(jnp.ones_like(value))

  def add(gradients: Params, part: Any) -> tuple[Params, None]:
    _, back = jax.vjp(lambda params: sums(params, part), params)
    return jax.tree.map(jnp.add, gradients, back(slopes)[0]), None

  gradients, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
  return value, metrics, gradients


def generator_loss_fn(
  model: UNet, config: GeneratorConfig, membership: np.ndarray, regions: bool
) -> Loss:
  """Deeply supervised loss of a batch of patches, see data.pipeline.generator_batches."""
  member = jnp.asarray(membership)

  def sums(params: Params, batch: Batch, keys: Keys) -> Any:
    logits: Any = model.apply({"params": params}, batch["image"], deep_supervision=True)
    return losses.generator_sums(logits, batch["target"], member, regions, config.loss)

  return Loss(sums, lambda found: losses.generator_loss(found, config.loss))


def _jittered(boxes: Array, amount: float, side: int, keys: Array) -> Array:
  """Boxes [N, 4] with every edge moved by up to `amount` of the box's size, inside the image.

  Not further than SAM 2 moves them in its training. keys: of the rows [B] of the batch, each with
  N / B boxes.
  """
  count = len(boxes) // len(keys)
  draw = functools.partial(jax.random.uniform, shape=(count, 4), minval=-1.0, maxval=1.0)
  drawn = jax.vmap(draw)(keys).reshape(-1, 4)
  return jittered(boxes, drawn, amount, side)


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

  def sums(params: Params, batch: Batch, keys: Keys) -> list[dict[str, losses.Mean]]:
    runs, tracks, length, height, width = batch["logits"].shape
    side = model.config.image_size
    logits = batch["logits"].reshape(-1, height, width)
    cells = stage0_prompts(logits, side, refinement.box_margin)
    cells = cells._replace(boxes=_jittered(cells.boxes, config.box_jitter, side, keys.rows))
    slices = batch["images"].reshape(runs * length, side, side, 3)
    results = all_stages(model, params, refinement, slices, cells, batch["inside"], batch["depth"])
    target = batch["masks"].reshape(-1, height, width)
    known = batch["known"].reshape(-1, height, width)
    present, absent = batch["present"].reshape(-1), batch["absent"].reshape(-1)
    truth = losses.CellTruth(target, known, present)
    inside = jnp.broadcast_to(batch["inside"][:, None], (runs, tracks, length)).reshape(-1)
    # Where something is ignored nobody knows that a structure is absent.
    learnt = inside & (present | absent)
    return [
      losses.refiner_sums(
        out.logits, out.iou, out.presence, truth, (live | present) & learnt, weights)
      for out, live in results]

  def value(found: list[dict[str, losses.Mean]]) -> tuple[Array, dict[str, Array]]:
    total, metrics = jnp.float32(0), dict[str, Array]()
    for number, (stage, its) in enumerate(zip(refinement.stages, found, strict=True), 1):
      loss, parts = losses.refiner_loss(its, weights)
      total = total + stage.loss_weight * loss
      metrics |= {f"stage{number}/{name}": parts[name] for name in told}
    return total, metrics

  return Loss(sums, value)


def compile_step(step: Step, state: TrainState, mesh: Mesh) -> Callable[..., Any]:
  """The step, to be compiled for states like `state` laid out by the rules; it is donated."""
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings(state, mesh), None),
                 compiler_options=compiler_options(mesh_platform(mesh)))
