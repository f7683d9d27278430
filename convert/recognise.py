"""Which SAM 2 a checkpoint is of: one of the eight official configurations, by names and shapes."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.nn.presets import PRESETS
from rfmedsam2_jax.nn.sam2 import SAM2Config

from .sources import OFFICIAL_ANCHOR

OFFICIAL = tuple(name for name in PRESETS if name.startswith("sam2"))
Shapes = Mapping[str, tuple[int, ...]]


def recognise(shapes: Shapes, source: str) -> str:
  """The name of the official configuration that has tensors of these official names and shapes.

  Width and number of blocks tell the four sizes apart, two tensors tell 2.1 from 2.0. Whether all
  tensors fit is for convert.report to say.

  Args:
    source: named in errors.

  Raises:
    UserError: none fits, or 2.0 and 2.1 cannot be told apart.
  """
  width = shapes[OFFICIAL_ANCHOR][0]
  pattern = re.compile(r"image_encoder\.trunk\.blocks\.(\d+)\.")
  blocks = len({match[1] for match in map(pattern.match, shapes) if match})
  fitting = [
    name for name in OFFICIAL
    if (PRESETS[name].embed_dim, sum(PRESETS[name].stages)) == (width, blocks)
  ]
  if not fitting:
    raise UserError(
      f"{source}: a trunk of width {width} with {blocks} blocks is none of the official sizes; "
      "name its config: a preset, or a training config that has it"
    )
  if not any(name.startswith("memory_attention.") for name in shapes):
    raise UserError(
      f"{source}: has no memory (it is the image half of SAM 2), so 2.0 and 2.1 cannot be told "
      f"apart; choose the config {' or '.join(fitting)}"
    )
  newer = "no_obj_embed_spatial" in shapes or "obj_ptr_tpos_proj.weight" in shapes
  return next(name for name in fitting if PRESETS[name].absent_embedding == newer)


def named_config(name: str) -> SAM2Config:
  """What names a network: an official name, `nano`, or a YAML file of a training config.

  Raises:
    UserError: neither.
  """
  if name in PRESETS:
    return PRESETS[name]
  if Path(name).suffix in (".yaml", ".yml"):
    return load_config(name).sam2
  raise UserError(f"config {name}: is neither a .yaml file nor one of {', '.join(PRESETS)}")


def choose_config(
  shapes: Shapes, source: str, forced: str | None, image_size: int | None
) -> tuple[str, SAM2Config]:
  """Name and config of the network.

  Args:
    forced: a name as of `named_config`, or None to recognise it.
    image_size: of another side than the config has.

  Raises:
    UserError: it cannot be recognised, or there is no such config.
  """
  name = forced or recognise(shapes, source)
  config = named_config(name)
  if image_size is None:
    return name, config
  if image_size <= 0 or image_size % 32:
    raise UserError(f"image_size {image_size}: the side must be a multiple of 32, such as 512")
  return name, dataclasses.replace(config, image_size=image_size)
