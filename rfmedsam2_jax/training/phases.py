"""The phases of training as data: which network, what of it is trained, on what batches.

In: a config and a plan. Used by train_networks, and by shard for their shapes alone.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rfmedsam2_jax.config import Config
from rfmedsam2_jax.config.tracker import TrackerConfig
from rfmedsam2_jax.config.training import GeneratorConfig, RefinerConfig
from rfmedsam2_jax.data import pipeline
from rfmedsam2_jax.data.plan import Plan
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.model import Network, generator_network
from rfmedsam2_jax.nn import SAM2, init_params
from rfmedsam2_jax.nn.initialisation import init_generator
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.nn.platform import Platform
from rfmedsam2_jax.parallel.mesh import check_batch, mesh_platform
from rfmedsam2_jax.parallel.rules import whole
from rfmedsam2_jax.training import step as steps
from rfmedsam2_jax.training import tracker_data
from rfmedsam2_jax.training.state import TrainState, init_state, make_optimizer, with_frozen_as
from rfmedsam2_jax.training.tracker_step import tracker_loss_fn
from rfmedsam2_jax.weights.checkpoint import config_json
from rfmedsam2_jax.weights.generator import generator_json

PhaseName = Literal["generator", "tracker", "mask_adapter", "refiner"]
CONFIG_KEYS: dict[PhaseName, str] = {
  "generator": "generator", "tracker": "tracker", "mask_adapter": "refiner.mask_adapter",
  "refiner": "refiner"}
# (folder of the run, cases, rows, start): some rows of batch `start` and of those after it.
Batches = Callable[[Path, Sequence[str], Sequence[int], int], Iterator[dict[str, np.ndarray]]]


class Phase(NamedTuple):
  """What is trained."""

  name: str  # of its log, and of its folder in the run
  key: str  # of its settings in the config
  network: Network  # whose parameters it trains
  settings: GeneratorConfig | TrackerConfig | RefinerConfig
  init: Callable[[jax.Array], Params]  # random parameters from a key
  patterns: Sequence[str]  # of the paths that are trained
  loss: Callable[[Platform], steps.Loss]  # traced for what it will run on
  batch: dict[str, jax.ShapeDtypeStruct]  # of a whole batch, see data.pipeline
  batches: Batches  # "case" of one numbers the cases
  samples: dict[str, int]  # what one step goes through, by name; volumes are crops of one each
  about: dict[str, Any]  # what a checkpoint says of the network

  @property
  def optimizer(self) -> optax.GradientTransformation:
    return make_optimizer(self.settings.optimizer, self.settings.loop.steps)

  def start(self, params: Params, key: jax.Array) -> TrainState:
    """The state before the first step."""
    return init_state(params, self.patterns, self.optimizer, key)

  def step(self, state: TrainState, mesh: Mesh) -> Any:
    """The jitted step (state, batch) -> (state, metrics), see training.step.compile_step, in the
    form that suits the devices of the mesh."""
    loss = self.loss(mesh_platform(mesh))
    step = steps.make_step(loss, self.optimizer, self.settings.optimizer, mesh,
                           self.settings.microbatches)
    return steps.compile_step(step, state, mesh)

  def final(self, state: TrainState, mesh: Mesh) -> Params:
    """What is kept of a state: the averaged weights if there are any, and the frozen ones."""
    kept = state.ema if self.settings.optimizer.ema_decay else state.trained
    return whole(state.replace(trained=kept).params, mesh)


def phase_names(config: Config) -> list[PhaseName]:
  """What a run goes through, in this order: a refiner always, unless the tracker is trained alone,
  the others where they have steps."""
  if config.tracker_alone:
    return ["tracker"]
  has = {"tracker": config.tracker.parts, "refiner": True}
  return [name for name, key in CONFIG_KEYS.items()
          if has.get(name) or operator.attrgetter(key)(config).loop.steps]


def check_batches(config: Config, names: Sequence[PhaseName], mesh: Mesh) -> None:
  """Raises UserError unless the batch of each of these phases spreads over the mesh."""
  for key in (CONFIG_KEYS[name] for name in names):
    settings = operator.attrgetter(key)(config)
    for part in settings.parts if key == "tracker" else (settings,):
      check_batch(mesh, part.batch_size, part.microbatches, key)


def generator_phase(config: Config, plan: Plan) -> Phase:
  settings, labels, channels = config.generator, plan.labels, len(plan.channels)
  unet = generator_network(settings, plan)
  size = (settings.batch_size, *plan.patch_size)

  def loss(platform: Platform) -> steps.Loss:
    model = unet.clone(platform=platform)
    return steps.generator_loss_fn(model, settings, labels.membership, labels.regions)

  def batches(run: Path, cases: Sequence[str], rows: Sequence[int], start: int) -> Any:
    return pipeline.generator_batches(
      pipeline.Cases(RunFolder(run).prepared(plan, for_generator=True), cases, config.seed),
      plan.patch_size,
      settings.augmentation, settings.oversample_foreground,
      pipeline.BatchConfig(settings.batch_size, rows, start, config.data.loader))

  return Phase(
    "generator", CONFIG_KEYS["generator"], "generator", settings,
    init=functools.partial(init_generator, unet, channels), patterns=("*",),
    loss=loss,
    batch={"image": jax.ShapeDtypeStruct((*size, channels), jnp.float32),
           "target": jax.ShapeDtypeStruct(size, jnp.uint8)},
    batches=batches, samples={"volumes": settings.batch_size},
    about={"generator": generator_json(
      unet, channels, [[structure.name, structure.values] for structure in labels.structures])})


def tracker_phases(config: Config) -> list[Phase]:
  """SAM 2 on prompts, leg after leg; it knows no structures and needs no plan."""
  *legs, last = config.tracker.parts
  named = {f"tracker/leg-{n}": leg for n, leg in enumerate(legs, 1)} | {"tracker": last}
  return [_tracker_phase(config, name, leg, n) for n, (name, leg) in enumerate(named.items())]


def _tracker_phase(config: Config, name: str, settings: TrackerConfig, number: int) -> Phase:
  sam2 = config.sam2
  # Every leg has runs of its own.
  config = dataclasses.replace(config, tracker=settings)
  seed = config.seed + (number << 32)
  runs, objects, length, side = (
    settings.batch_size, settings.objects, settings.slices, sam2.image_size)

  def batches(run: Path, cases: Sequence[str], rows: Sequence[int], start: int) -> Any:
    return tracker_data.batches(run, config, seed, rows, start)

  def loss(platform: Platform) -> steps.Loss:
    return tracker_loss_fn(SAM2(sam2, platform), settings)

  return Phase(
    name, CONFIG_KEYS["tracker"], "refiner", settings, init=functools.partial(init_params, sam2),
    patterns=settings.trainable, loss=loss,
    batch={
      "images": jax.ShapeDtypeStruct((runs, length, side, side, 3), jnp.float32),
      "objects": jax.ShapeDtypeStruct((runs, objects, length, side, side), jnp.bool_),
      "has": jax.ShapeDtypeStruct((runs, objects), jnp.bool_),
    },
    batches=batches, about={"sam2": config_json(sam2)},
    samples={"volumes": runs, "slices": runs * length,
             "cells": runs * objects * settings.promptings * length})


def refiner_phase(config: Config, plan: Plan, masks_alone: bool = False) -> Phase:
  """SAM 2 as the refiner. masks_alone: see `refiner_loss_fn`."""
  settings, sam2 = config.refiner, config.sam2
  structures = min(settings.structures, len(plan.labels.structures))
  runs, length, side = settings.batch_size, settings.slices, sam2.image_size
  cells = runs, structures, length
  masks = jax.ShapeDtypeStruct((*cells, side // 4, side // 4), jnp.float32)
  facts = jax.ShapeDtypeStruct(cells, jnp.bool_)
  sample = pipeline.RunConfig(
    side, length, structures, config.data.sam_channels, config.data.sam_context,
    settings.oversample_foreground, cuts=bool(config.refinement.zoom))

  def loss(platform: Platform) -> steps.Loss:
    model = SAM2(sam2, platform)
    return steps.refiner_loss_fn(model, settings, config.refinement, masks_alone)

  def init(key: jax.Array) -> Params:
    return with_frozen_as(settings.frozen_dtype, init_params(sam2, key), settings.trainable)

  def batches(run: Path, cases: Sequence[str], rows: Sequence[int], start: int) -> Any:
    return pipeline.refiner_batches(
      pipeline.Cases(run / "preprocessed", cases, config.seed, run / "prompts"), sample,
      plan.labels.membership, settings.augmentation, settings.corruption,
      pipeline.BatchConfig(runs, rows, start, config.data.loader))

  return Phase(
    "refiner", CONFIG_KEYS["refiner"], "refiner", settings, init=init,
    patterns=settings.trainable, loss=loss,
    batch={
      "images": jax.ShapeDtypeStruct((runs, length, side, side, 3), jnp.float32),
      "masks": masks, "known": masks, "logits": masks, "present": facts, "absent": facts,
      "inside": jax.ShapeDtypeStruct((runs, length), jnp.bool_),
      "depth": jax.ShapeDtypeStruct((runs,), jnp.int32),
      "structures": jax.ShapeDtypeStruct((runs, structures), jnp.int32),
    },
    batches=batches, about={"sam2": config_json(sam2)},
    samples={"volumes": runs, "slices": runs * length, "cells": runs * structures * length})


def mask_adapter_phase(config: Config, plan: Plan) -> Phase:
  """The MaskAdapter alone, on the refiner's batches; its parameters are all of SAM 2's."""
  alone = config.refiner.mask_adapter
  settings = dataclasses.replace(
    config.refiner, trainable=("sam_mask_decoder/adapter/*",),
    **{field.name: getattr(alone, field.name) for field in dataclasses.fields(alone)})
  phase = refiner_phase(dataclasses.replace(config, refiner=settings), plan, masks_alone=True)
  return phase._replace(name="mask_adapter", key=CONFIG_KEYS["mask_adapter"])


# Of a data set's structures; the tracker has none.
PHASES: dict[PhaseName, Callable[[Config, Plan], Phase]] = {
  "generator": generator_phase, "mask_adapter": mask_adapter_phase, "refiner": refiner_phase}
