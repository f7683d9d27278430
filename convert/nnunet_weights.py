"""Tensors of a PlainConvUNet or ResidualEncoderUNet (dynamic-network-architectures) as parameters
of nn.unet, and back."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.nn.initialisation import init_generator
from rfmedsam2_jax.nn.unet import UNet

from .sources import as_float32, check_finite
from .torch_files import read_torch

# Their names and ours; {} is a number. Where two of theirs are one of ours, the first is the way
# back.
_LAYERS = (
  ("encoder.stages.{}.0.convs.{}.", "encoder/stages_{}/convs_{}/"),
  ("encoder.stages.{}.convs.{}.", "encoder/stages_{}/convs_{}/"),
  ("decoder.stages.{}.convs.{}.", "decoder/stages_{}/convs_{}/"),
  ("encoder.stem.convs.{}.", "encoder/stem/convs_{}/"),
  ("encoder.stages.{}.blocks.{}.conv{}.", "encoder/stages_{}/blocks_{}/conv{}/"),
  ("encoder.stages.{}.blocks.{}.skip.{}.", "encoder/stages_{}/blocks_{}/skip_{}/"),
  ("decoder.transpconvs.{}.", "decoder/transpconvs_{}/"),
  ("decoder.seg_layers.{}.", "decoder/seg_layers_{}/"),
)
_TENSORS = (
  ("conv.weight", "conv/kernel"), ("conv.bias", "conv/bias"), ("norm.weight", "norm/scale"),
  ("norm.bias", "norm/bias"), ("weight", "kernel"), ("bias", "bias"))


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
      raise UserError(f"{source}: tensor {full} has no place in the generator; only PlainConvUNet "
                      "and ResidualEncoderUNet without changes can be converted")
    if "/seg_layers_" in path and x.shape[-1] == len(head_order):
      x = x[..., list(head_order)]
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


def state_dict(params: Mapping[str, Any], head_order: Sequence[int]) -> dict[str, np.ndarray]:
  """The way back: a state dict that the official class loads strictly, from parameters of one
  network (no ensemble); head_order as in `network_params`."""
  found: dict[str, np.ndarray] = {}
  for path, x in flatten_dict(params, sep="/").items():
    x = np.asarray(x)
    x = x[..., np.argsort(head_order)] if "/seg_layers_" in path else x
    axes = _axes(path)
    x = np.ascontiguousarray(x.reshape((1,) * (len(axes) - x.ndim) + x.shape).transpose(
      np.argsort(axes)))
    name = _translated(path, [pair[::-1] for pair in _LAYERS], [pair[::-1] for pair in _TENSORS])
    assert name is not None, path
    names = [name]
    if match := re.fullmatch(r"(.*\.)(conv|norm)(\.\w+)", name):
      before, kind, after = match.groups()
      names.append(f"{before}all_modules.{('conv', 'norm').index(kind)}{after}")
    found |= dict.fromkeys(names, x)
    if name.startswith("encoder."):
      found |= {f"decoder.{name}": x for name in names}
  return found


def _placed(name: str, x: np.ndarray) -> tuple[str | None, np.ndarray]:
  path = _translated(name, _LAYERS, _TENSORS)
  if path is None or x.ndim != len(axes := _axes(path)):
    return None, x
  x = np.ascontiguousarray(x.transpose(axes))
  return path, x[0, 0, 0] if _is_dense(path) and x.shape[:3] == (1, 1, 1) else x


def _translated(name: str, layers: Iterable[Sequence[str]], tensors: Iterable[Sequence[str]]
                ) -> str | None:
  for (layer, other_layer), (tensor, other_tensor) in itertools.product(layers, tensors):
    pattern = re.escape(layer).replace(r"\{\}", r"(\d+)") + re.escape(tensor)
    if match := re.fullmatch(pattern, name):
      return other_layer.format(*match.groups()) + other_tensor
  return None


def _axes(path: str) -> tuple[int, ...]:
  """The order of a PyTorch tensor's axes in ours, a dense layer's with those of its kernel of 1."""
  if not path.endswith("/kernel"):
    return (0,)
  return (0, 2, 3, 4, 1) if "/transpconvs_" in path else (2, 3, 4, 1, 0)


def _is_dense(path: str) -> bool:
  return path.endswith("/kernel") and ("/seg_layers_" in path or "/skip_" in path)
