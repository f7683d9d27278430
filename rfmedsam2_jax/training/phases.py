"""The phases of training as data: which network, what of it is trained, on what batches.

In: a config and a plan. Used where they are trained (networks) and where only their shapes are
looked at (the `shard` command).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rfmedsam2_jax.config import Config
from rfmedsam2_jax.config.training import GeneratorConfig, RefinerConfig, config_key
from rfmedsam2_jax.data.plan import Plan
from rfmedsam2_jax.model import generator_network, init_generator
from rfmedsam2_jax.nn import SAM2, init_params
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.parallel.mesh import check_batch
from rfmedsam2_jax.training.state import with_frozen_as
from rfmedsam2_jax.training.step import Loss, generator_loss_fn, refiner_loss_fn

PhaseName = Literal["generator", "mask_adapter", "refiner"]
Settings = GeneratorConfig | RefinerConfig


class Phase(NamedTuple):
  """What is trained.

  init: random parameters from a key. patterns: of the paths that are trained.
  batch: shapes of a whole batch, see data.pipeline.
  """

  name: PhaseName
  settings: Settings
  init: Callable[[jax.Array], Params]
  patterns: Sequence[str]
  loss: Loss
  batch: dict[str, jax.ShapeDtypeStruct]


def phases_of(config: Config) -> dict[PhaseName, Settings]:
  """What a run goes through, in this order: a refiner always, the others where they have steps."""
  others: dict[PhaseName, Settings] = {
    "generator": config.generator, "mask_adapter": mask_adapter_settings(config)
  }
  return {name: x for name, x in others.items() if x.loop.steps} | {"refiner": config.refiner}


def check_batches(phases: Mapping[PhaseName, Settings], mesh: Mesh) -> None:
  """Raises UserError unless the batch of every phase spreads over the mesh."""
  for name, settings in phases.items():
    check_batch(mesh, settings.batch_size, settings.microbatches, config_key(name))


def generator_phase(config: Config, plan: Plan) -> Phase:
  settings, labels = config.generator, plan.labels
  unet = generator_network(config, plan)
  size = (settings.batch_size, *plan.patch_size)
  return Phase(
    "generator",
    settings,
    functools.partial(init_generator, unet, len(plan.channels)),
    ("*",),
    generator_loss_fn(unet, settings, labels.membership, labels.regions),
    {
      "image": jax.ShapeDtypeStruct((*size, len(plan.channels)), jnp.float32),
      "target": jax.ShapeDtypeStruct(size, jnp.uint8),
    },
  )


def mask_adapter_settings(config: Config) -> RefinerConfig:
  """The refiner's, with what `refiner.mask_adapter` has of its own."""
  alone = config.refiner.mask_adapter
  return dataclasses.replace(
    config.refiner,
    trainable=("sam_mask_decoder/adapter/*",),
    **{name: getattr(alone, name) for name in ("batch_size", "microbatches", "loop", "optimizer")},
  )


def mask_adapter_phase(config: Config, plan: Plan) -> Phase:
  """The MaskAdapter alone, on the refiner's batches; its parameters are all of SAM 2's."""
  settings = mask_adapter_settings(config)
  phase = refiner_phase(dataclasses.replace(config, refiner=settings), plan)
  loss = refiner_loss_fn(SAM2(config.sam2.network), settings, config.refinement, masks_alone=True)
  return phase._replace(name="mask_adapter", loss=loss)


def refiner_phase(config: Config, plan: Plan) -> Phase:
  settings, side = config.refiner, config.sam2.image_size
  structures = min(settings.structures, len(plan.labels.structures))
  runs, length = settings.batch_size, settings.slices
  masks = jax.ShapeDtypeStruct((runs, structures, length, side // 4, side // 4), jnp.float32)
  return Phase(
    "refiner",
    settings,
    lambda key: with_frozen_as(
      settings.frozen_dtype, init_params(config.sam2.network, key), settings.trainable
    ),
    settings.trainable,
    refiner_loss_fn(SAM2(config.sam2.network), settings, config.refinement),
    {
      "images": jax.ShapeDtypeStruct((runs, length, side, side, 3), jnp.float32),
      "masks": masks,
      "known": masks,
      "logits": masks,
      "inside": jax.ShapeDtypeStruct((runs, length), jnp.bool_),
      "depth": jax.ShapeDtypeStruct((runs,), jnp.int32),
      "structures": jax.ShapeDtypeStruct((runs, structures), jnp.int32),
    },
  )


PHASES: dict[PhaseName, Callable[[Config, Plan], Phase]] = {
  "generator": generator_phase, "mask_adapter": mask_adapter_phase, "refiner": refiner_phase
}
