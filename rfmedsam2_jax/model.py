"""The one factory: a config and a plan, or a run by its folder or name, become networks with
parameters."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.kept import no_run, run_at
from rfmedsam2_jax.config import Config, load_config
from rfmedsam2_jax.config.training import GeneratorConfig
from rfmedsam2_jax.data.files import load_json
from rfmedsam2_jax.data.fingerprint import Fingerprint
from rfmedsam2_jax.data.names import own_name
from rfmedsam2_jax.data.plan import Plan, load_plan
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.nn import SAM2, init_params
from rfmedsam2_jax.nn.initialisation import init_generator
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.nn.unet import UNet, UNetConfig
from rfmedsam2_jax.segmentation.segmenter import Segmenter
from rfmedsam2_jax.weights.orbax import load_params
from rfmedsam2_jax.weights.single_file import is_single, load_single

# Of a Segmenter, as its fields of parameters are called.
Network = Literal["generator", "refiner"]
NETWORKS: tuple[Network, ...] = ("generator", "refiner")


def load(path: str | Path) -> Segmenter:
  """The segmenter of a finished run: its folder, or as a text the name of an installed model.

  Raises:
    UserError: no run, or one that is not finished.
  """
  run = RunFolder(run_at(path))
  if not run.config.exists():
    raise no_run(path)
  config = load_config(run.config, trained=True)
  if config.tracker_alone:
    raise UserError(f"{path}: trained a tracker alone, which segments by prompts; give "
                    f"{run.params('tracker')} to track, serve or refiner.init_from")
  for network in NETWORKS:
    if not run.params(network).exists():
      raise UserError(f"{path}: its {network} is not trained yet; resume its training")
  plan = load_plan(run / "plan.json")
  segmenter = untrained(config, plan)
  params: Any = {name: _load(run.params(name), shapes(segmenter, name)) for name in NETWORKS}
  known = run / "fingerprint.json"
  fingerprint = load_json(known, Fingerprint) if known.exists() else None
  if fingerprint is not None and len(fingerprint.channels) != len(plan.channels):
    raise UserError(f"{known}: has {len(fingerprint.channels)} channels, plan.json "
                    f"{len(plan.channels)}; copy both from the run again")
  return dataclasses.replace(
    segmenter, name=own_name(run.path), fingerprint=fingerprint, **params)


def _load(place: Path, like: Params) -> Params:
  return (load_single if is_single(place) else load_params)(place, like)


def untrained(config: Config, plan: Plan) -> Segmenter:
  """A segmenter whose networks have no parameters yet.

  Raises:
    UserError: `data.sam_channels` names a channel that images do not have.
  """
  channels = len(plan.channels)
  wrong = [channel for channel in config.data.sam_channels if not 0 <= channel < channels]
  if wrong:
    raise UserError(
      f"data.sam_channels: has {wrong[0]}, but images have channels 0 to {channels - 1}")
  return Segmenter(
    plan=plan, unet=generator_network(config.generator, plan), generator={},
    sam2=SAM2(config.sam2), refiner=None, refinement=config.refinement, inference=config.inference,
    sam_channels=config.data.sam_channels, sam_context=config.data.sam_context)


def shapes(segmenter: Segmenter, network: Network) -> Any:
  """The tree of one network's parameters as shapes and dtypes."""
  init = (functools.partial(init_params, segmenter.sam2.config) if network == "refiner" else
          functools.partial(init_generator, segmenter.unet, len(segmenter.plan.channels)))
  return jax.eval_shape(init, jax.random.key(0))


def generator_network(config: GeneratorConfig, plan: Plan) -> UNet:
  """The generator that a plan asks for; by default nnU-Net's widths, 32 doubling up to 320.

  Raises:
    UserError: `features` or `blocks` has another number of stages than the plan.
  """
  stages = len(plan.strides)
  features = config.features
  if features is None:
    features = tuple(min(32 * 2**stage, 320) for stage in range(stages))
  for name, what, given in (("features", "widths", features), ("blocks", "numbers", config.blocks)):
    if given is not None and len(given) != stages:
      raise UserError(
        f"generator.{name}: has {len(given)} {what}, but the plan's U-Net has {stages} stages; "
        "give one per stage or set plan.poolings")
  outputs = len(plan.labels.structures) + (0 if plan.labels.regions else 1)
  return UNet(UNetConfig(
    features, plan.strides, plan.kernels, config.convs_per_stage, config.dtype, config.remat,
    config.decoder_convs, config.mirrored, config.blocks, config.members), outputs)
