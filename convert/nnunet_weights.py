"""Tensors of a PlainConvUNet (dynamic-network-architectures) as parameters of nn.unet."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.model import init_generator
from rfmedsam2_jax.nn.unet import UNet

from .sources import as_float32, check_finite
from .torch_files import read_torch

# Where each kind of tensor goes, and the order of its axes there.
_LAYER = r"(en|de)coder\.stages\.(\d+)\.(?:0\.)?convs\.(\d+)\."
_THERE = r"\1coder/stages_\2/convs_\3/"
_RULES = (
  (rf"{_LAYER}conv\.weight", rf"{_THERE}conv/kernel", (2, 3, 4, 1, 0)),
  (rf"{_LAYER}norm\.weight", rf"{_THERE}norm/scale", (0,)),
  (rf"{_LAYER}(conv|norm)\.bias", rf"{_THERE}\4/bias", (0,)),
  (r"decoder\.transpconvs\.(\d+)\.weight", r"decoder/transpconvs_\1/kernel", (0, 2, 3, 4, 1)),
  (r"decoder\.seg_layers\.(\d+)\.weight", r"decoder/seg_layers_\1/kernel", (2, 3, 4, 1, 0)),
  (r"decoder\.(transpconvs|seg_layers)\.(\d+)\.bias", r"decoder/\1_\2/bias", (0,)),
)


# nnU-Net's log has numbers of numpy, which nobody needs here.
_LOG = {"numpy.dtype": lambda *_: {}, "_codecs.encode": lambda *_: b"",
        "numpy.core.multiarray.scalar": lambda *_: None,
        "numpy._core.multiarray.scalar": lambda *_: None}


def load_checkpoint(file: Path) -> dict[str, Any]:
  """A checkpoint of nnU-Net, read as data only.

  Raises:
    UserError: it cannot be read, or is none of nnU-Net.
  """
  stored = read_torch(file, _LOG)
  if not isinstance(stored.get("network_weights"), Mapping):
    raise UserError(f"{file}: is no checkpoint of nnU-Net v2 (it has no network_weights); give "
                    "fold_X/checkpoint_final.pth")
  return stored


def network_params(
  weights: Mapping[str, Any], unet: UNet, channels: int, head_order: Sequence[int], source: str,
) -> tuple[dict[str, Any], list[str]]:
  """Parameters of `unet` from a state dict, every tensor of which is accounted for.

  Args:
    head_order: nnU-Net's output for each of ours.
    source: named in errors.

  Returns:
    float32 parameters, and lines for people.

  Raises:
    UserError: tensors that are missing, left over or of another shape.
  """
  expected = flatten_dict(jax.eval_shape(
    lambda key: init_generator(unet, channels, key), jax.random.key(0)), sep="/")
  found: dict[str, np.ndarray] = {}
  for full, tensor in weights.items():
    # The decoder holds the encoder again, a block its layers again under all_modules.
    name = full.removeprefix("module.").removeprefix("_orig_mod.")
    name = name.removeprefix("decoder.") if name.startswith("decoder.encoder.") else name
    name = re.sub(r"\.all_modules\.0\.", ".conv.", name)
    name = re.sub(r"\.all_modules\.1\.", ".norm.", name)
    values = as_float32(tensor, full, source)
    check_finite({full: values}, source)
    path, x = _placed(name, values)
    if path is None:
      raise UserError(f"{source}: tensor {full} has no place in a plain conv U-Net; only "
                      "PlainConvUNet without changes can be converted")
    if "/seg_layers_" in path and x.shape[-1] == len(head_order):
      x = x[..., list(head_order)]
      x = x[0, 0, 0] if path.endswith("kernel") else x
    if path in found and not np.array_equal(found[path], x):
      raise UserError(f"{source}: tensor {full} differs from its second copy; check the file")
    found[path] = x
  biases = [p for p in expected if re.search(r"(conv|transpconvs_\d+)/bias$", p)]
  without_bias = not found.keys() & set(biases)
  if without_bias:
    found |= {path: np.zeros(expected[path].shape, np.float32) for path in biases}
  if missing := sorted(expected.keys() - found.keys()):
    raise UserError(f"{source}: lacks {missing[0]} (and {len(missing) - 1} more tensors) of the "
                    "network in its plans; they do not belong together")
  for path, x in found.items():
    if path not in expected or expected[path].shape != x.shape:
      raise UserError(f"{source}: {path} has shape {x.shape}, the network in its plans "
                      f"{expected[path].shape if path in expected else 'has no such tensor'}; they "
                      "do not belong together")
  facts = [f"{len(found)} tensors, {sum(x.size for x in found.values()) / 1e6:.2f} M values"]
  if without_bias:
    facts.append("convolutions without bias (conv_bias false) get biases of zero")
  if list(head_order) != sorted(head_order):
    facts.append(f"outputs are put in the order of dataset.json: {list(head_order)}")
  return unflatten_dict(found, sep="/"), facts


def _placed(name: str, x: np.ndarray) -> tuple[str | None, np.ndarray]:
  for pattern, target, axes in _RULES:
    match = re.fullmatch(pattern, name)
    if match and x.ndim == len(axes):
      return match.expand(target), np.ascontiguousarray(x.transpose(axes))
  return None, x
