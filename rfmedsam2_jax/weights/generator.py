"""What a checkpoint of the generator says of itself, and whether training may start from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rfmedsam2_jax.base.buckets import staged
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.nn.unet import UNet, UNetConfig
from rfmedsam2_jax.weights.checkpoint import short
from rfmedsam2_jax.weights.orbax import read_about


def generator_json(unet: UNet, channels: int, structures: Any) -> dict[str, Any]:
  """What stands under "generator" in a checkpoint; `structures`: [name, label values] by output."""
  c = unet.config
  # What older checkpoints do not name is null where it is as it was then. As JSON gives it back, so
  # that descriptions can be compared.
  return json.loads(json.dumps({
    "features": c.features, "strides": c.strides, "kernels": c.kernels,
    "convs_per_stage": None if c.blocks else c.convs_per_stage, "blocks": c.blocks,
    "decoder_convs": c.convs_up, "mirrored": c.mirrored,
    "members": c.members if c.members > 1 else None, "channels": channels,
    "outputs": unet.num_outputs, "structures": structures}))


def generator_of(about: Mapping[str, Any], source: str | Path) -> tuple[UNet, int]:
  """The network that a checkpoint's `about` tells of, and its number of channels."""
  try:
    told = about["generator"]
    strides, kernels = (tuple((d, h, w) for d, h, w in told[key]) for key in ("strides", "kernels"))
    config = UNetConfig(
      tuple(told["features"]), strides, kernels, told["convs_per_stage"] or 1,
      decoder_convs=told["decoder_convs"], mirrored=tuple(told["mirrored"]),
      blocks=tuple(told["blocks"]) if told.get("blocks") else None,
      members=told.get("members") or 1)
    return UNet(config, int(told["outputs"])), int(told["channels"])
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f"{source}: was made by another version ({type(error).__name__}: {error} in "
                    "what it says of its generator); make it anew") from None


def check_generator_start(folder: str | Path, expected: dict[str, Any]) -> None:
  """UserError unless a checkpoint is of the generator that `expected` (generator_json) tells of."""
  if not (staged(folder) / "about").is_dir():
    raise UserError(f"{folder}: is no checkpoint of a generator; make one with rfmedsam2 convert "
                    "nnunet, or give generator/params of a run")
  found = read_about(folder).get("generator")
  if not isinstance(found, dict):
    raise UserError(f"{folder}: is a checkpoint, but does not say of which generator; give one "
                    "made by rfmedsam2 convert nnunet or by a run of this version")
  for key, value in expected.items():
    if found.get(key) != value:
      raise UserError(
        f"{folder}: its generator has {key}={short(found.get(key))}, the config and data set give "
        f"{short(value)}; train with the config.yaml that lies in the checkpoint's folder")
