"""What a checkpoint of the generator says of itself, and whether training may start from it."""

import json
from pathlib import Path
from typing import Any

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.nn.unet import UNet
from rfmedsam2_jax.weights.checkpoint import short
from rfmedsam2_jax.weights.orbax import read_about


def generator_json(unet: UNet, channels: int, structures: Any) -> dict[str, Any]:
  """What stands under "generator" in a checkpoint; `structures`: [name, label values] by output."""
  c = unet.config
  # As JSON gives it back, so that descriptions can be compared.
  return json.loads(json.dumps({
    "features": c.features, "strides": c.strides, "kernels": c.kernels,
    "convs_per_stage": c.convs_per_stage, "decoder_convs": c.decoder_convs or c.convs_per_stage,
    "mirrored": c.mirrored, "channels": channels, "outputs": unet.num_outputs,
    "structures": structures}))


def check_generator_start(folder: str | Path, expected: dict[str, Any]) -> None:
  """UserError unless a checkpoint is of the generator that `expected` (generator_json) tells of."""
  if not (Path(folder) / "about").is_dir():
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
