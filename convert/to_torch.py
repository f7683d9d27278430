"""Back: a checkpoint of ours as a .pt file that the official class loads strictly: SAM 2's, or of a
generator nnU-Net's."""

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Passing, Report, silent
from rfmedsam2_jax.data.files import replacing_whole
from rfmedsam2_jax.nn.initialisation import init_generator
from rfmedsam2_jax.weights.checkpoint import load_checkpoint
from rfmedsam2_jax.weights.generator import generator_of
from rfmedsam2_jax.weights.names import to_official
from rfmedsam2_jax.weights.orbax import load_params, read_about
from rfmedsam2_jax.weights.single_file import is_single, load_single, read_single

from .nnunet_plans import architecture
from .nnunet_weights import state_dict


def to_torch(source: Path, out: Path, report: Report, progress: Report = silent) -> str:
  """Writes the file `out`, which is replaced; returns what was done.

  It holds {"model": state dict} of SAM 2, or of a generator {"network_weights": state dict,
  "architecture": of nnU-Net's plans}.

  Raises:
    UserError: no checkpoint, what the official class has no place for, a full disk.
  """
  import torch

  progress(Passing(f"reading {source}"))
  told = _told_of_generator(source)
  key, state, more = _sam2(source, report) if told is None else _generator(source, told, report)
  tensors = {id(x): torch.from_numpy(np.array(x)) for x in state.values()}  # one for all its names
  content = {key: {name: tensors[id(x)] for name, x in state.items()}, **more}
  progress(Passing(f"writing {out}"))
  with replacing_whole(out) as temporary:
    try:
      torch.save(content, temporary)
    except RuntimeError:  # whatever keeps its writer from writing
      raise UserError(f"{out}: cannot be written; is the disk full?") from None
  return f"{len(state)} tensors"


# Key and names of the state dict, and what else is in the file.
_Content = tuple[str, Mapping[str, Any], dict[str, Any]]


def _sam2(source: Path, report: Report) -> _Content:
  config, params, _ = load_checkpoint(source)
  if config.drawn_prompts:
    raise UserError(f"{source}: was trained with sam2.drawn_prompts, which the official class does "
                    "not do; it would compute another thing")
  adapters = _adapters(params)
  if learned := [name for name, fresh in adapters.items() if not fresh]:
    raise UserError(
      f"{source}: {len(learned)} of its {len(adapters)} adapters are not the identity (the first: "
      f"{learned[0]}), and the official class has no place for them; it would compute another thing"
    )
  if adapters:
    report(f"left out {len(adapters)} adapters; they are the identity, so nothing changes")
  return "model", to_official(params), {}


def _told_of_generator(source: Path) -> dict[str, Any] | None:
  """What a checkpoint says of itself, if it is one of a generator."""
  if is_single(source):
    about = read_single(source)
  elif (source / "about").is_dir():
    about = read_about(source)
  else:
    return None
  return about if isinstance(about, dict) and "generator" in about else None


def _generator(source: Path, told: dict[str, Any], report: Report) -> _Content:
  unet, channels = generator_of(told, source)
  config = unet.config
  if config.members > 1:
    raise UserError(f"{source}: is an ensemble of {config.members} networks, which are as nnU-Net "
                    "left them; take its own files")
  shapes = jax.eval_shape(lambda key: init_generator(unet, channels, key), jax.random.key(0))
  params = (load_single if is_single(source) else load_params)(source, shapes)
  order = _head_order(told["generator"]["structures"], unet.num_outputs)
  if list(order) != sorted(order):
    report(f"outputs are put in the order of label values: {np.argsort(order).tolist()}")
  if config.mirrored:
    report(f"  differs: here it sees axes {list(config.mirrored)} mirrored, there it takes them as "
           "they lie in a file")
  return ("network_weights", state_dict(params, order),
          {"architecture": architecture(config, channels, unet.num_outputs)})


def _head_order(structures: Sequence[tuple[str, Sequence[int]]], outputs: int) -> tuple[int, ...]:
  """nnU-Net's output for each of ours; it numbers labels by their values, regions as they come."""
  if outputs == len(structures):
    return tuple(range(outputs))
  values = [min(values) for _, values in structures]
  return (0, *(1 + sorted(values).index(value) for value in values))


def _adapters(params: dict[str, Any]) -> dict[str, bool]:
  """Path of every adapter, and whether it is the identity: its last layer is zero."""
  flat = flatten_dict(params, sep="/")
  found: dict[str, bool] = {}
  for path in fnmatch.filter(flat, "*/adapter/up/*"):
    name = path.split("/adapter/")[0] + "/adapter"
    found[name] = found.get(name, True) and not np.any(flat[path])
  return found
