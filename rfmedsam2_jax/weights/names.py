"""Where every tensor of an official SAM 2 checkpoint belongs in our parameter tree, and back.

Names are those of sam2 1.1.0 (`SAM2Base.state_dict()`). Our tree has the same submodules, but the
numbers of lists join the name before them, and axes of kernels differ:

    sam_mask_decoder.transformer.layers.0.self_attn.q_proj.weight  [out, in]
    sam_mask_decoder/transformer/layers_0/self_attn/q_proj/kernel  [in, out]
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rfmedsam2_jax.nn.adapters import AdapterConfig
from rfmedsam2_jax.nn.initialisation import param_shapes
from rfmedsam2_jax.nn.sam2 import SAM2Config

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a tensor differs between the two sides, besides the place that its name gives it."""
  leaf: str = ""  # what `weight` is called here; "" where it has the name of the module above it
  drop: tuple[int, ...] = ()  # official axes of length 1 that we do without
  axes: tuple[int, ...] = ()  # which of the other official axes are ours, in order; empty: all

  def to_ours(self, x: np.ndarray) -> np.ndarray:
    x = x.squeeze(self.drop)
    return x.transpose(self.axes) if self.axes else x

  def to_official(self, x: np.ndarray) -> np.ndarray:
    x = x.transpose(np.argsort(self.axes)) if self.axes else x
    return np.expand_dims(x, self.drop)


# The first pattern that fits the whole official name gives the layout.
_TABLE = (
  (r"maskmem_tpos_enc", Layout(drop=(1, 2))),
  (r"no_mem_embed|no_mem_pos_enc", Layout(drop=(0, 1))),
  (r"no_obj_ptr|no_obj_embed_spatial", Layout(drop=(0,))),
  (r"image_encoder\.trunk\.pos_embed(_window)?", Layout(axes=(0, 2, 3, 1))),
  # Tables of embeddings: theirs are modules with a `weight`, ours are parameters.
  (r"sam_prompt_encoder\.(point_embeddings\.\d|not_a_point_embed|no_mask_embed)\.weight", Layout()),
  (r"sam_mask_decoder\.(iou_token|mask_tokens|obj_score_token)\.weight", Layout()),
  # Transposed convolutions: [in, out, h, w] to [in, h, w, out].
  (r"sam_mask_decoder\.output_upscaling\.[03]\.weight", Layout("kernel", axes=(0, 2, 3, 1))),
  (r".*\.(bias|gamma|positional_encoding_gaussian_matrix)", Layout()),
)
# A `weight` that the table does not name is of one of these kinds.
_BY_RANK = {
  1: Layout("scale"),  # norms
  2: Layout("kernel", axes=(1, 0)),  # dense: [out, in] to [in, out]
  4: Layout("kernel", axes=(2, 3, 1, 0)),  # convolutions: [out, in, h, w] to [h, w, in, out]
}


def place(name: str, rank: int) -> tuple[Path, Layout]:
  """Our path and layout of the official tensor `name` with `rank` axes; ValueError if none."""
  layout = _table_layout(name) or (_BY_RANK.get(rank) if name.endswith(".weight") else None)
  if layout is None:
    raise ValueError(f"{name} with {rank} axes is no tensor of SAM 2")
  name = name.removesuffix(".weight")
  path = re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name).split(".")
  return (*path, layout.leaf) if layout.leaf else tuple(path), layout


def official_place(path: Path, rank: int) -> tuple[str, Layout]:
  """The inverse of `place`: the official name of our tensor at `path`, and its layout."""
  renamed = path[-1] in ("kernel", "scale")
  name = ".".join(re.sub(r"_(\d+)$", r".\1", part) for part in path[: -1 if renamed else None])
  if renamed or _table_layout(f"{name}.weight"):
    name += ".weight"
  return name, _table_layout(name) or _BY_RANK[rank]


def _table_layout(name: str) -> Layout | None:
  return next((layout for pattern, layout in _TABLE if re.fullmatch(pattern, name)), None)


def from_official(state: Mapping[str, np.ndarray], config: SAM2Config) -> dict[str, Any]:
  """The parameters of an official checkpoint as our tree, without adapters.

  `state` is the official model's `state_dict()` as float32 arrays. ValueError if tensors are
  missing, left over or of other shapes than `config` has.
  """
  expected = tensor_shapes(config)
  places = ((place(name, x.ndim), x) for name, x in state.items())
  found = {path: layout.to_ours(x) for (path, layout), x in places}
  complaints = [
    *(f"missing {'/'.join(path)}" for path in expected.keys() - found.keys()),
    *(f"left over {'/'.join(path)}" for path in found.keys() - expected.keys()),
    *(f"{'/'.join(path)} is {found[path].shape} and should be {expected[path]}"
      for path in expected.keys() & found.keys() if found[path].shape != expected[path])]
  if complaints:
    shown = "; ".join(sorted(complaints)[:5])
    raise ValueError(f"{len(complaints)} tensors do not fit this config: {shown}")
  return unflatten_dict({path: np.ascontiguousarray(x) for path, x in found.items()})


def to_official(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The inverse of `from_official`; adapters, which no official checkpoint has, are left out."""
  ours = {path: x for path, x in flatten_dict(params).items() if "adapter" not in path}
  places = ((official_place(path, x.ndim), x) for path, x in ours.items())
  return {name: np.ascontiguousarray(layout.to_official(np.asarray(x)))
          for (name, layout), x in places}


def official_shapes(config: SAM2Config) -> dict[str, tuple[int, ...]]:
  """Name and shape of every tensor of an official checkpoint of this size."""
  # Views of a single number: nothing of these sizes is made.
  views = {path: np.broadcast_to(np.float32(0), s) for path, s in tensor_shapes(config).items()}
  places = ((official_place(path, x.ndim), x) for path, x in views.items())
  return {name: layout.to_official(x).shape for (name, layout), x in places}


@functools.cache
def tensor_shapes(config: SAM2Config) -> dict[Path, tuple[int, ...]]:
  """Path and shape of every parameter but the adapters'."""
  config = dataclasses.replace(config, adapters=AdapterConfig(dwconv=False, cnn=False))
  return {path: x.shape for path, x in flatten_dict(param_shapes(config)).items()}
