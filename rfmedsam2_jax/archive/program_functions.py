"""The functions that are given to other programs: flat dicts of named arrays in and out.

`encoder`: slices to features. `begin`: a person's prompts on a slice, into the memory of an object.
`sweep`: SAM 2's recurrence over further slices, with and into that memory. `generator`: patches of
a volume to logits. The first three are SAM 2's and together what `tracking` does; each does what
the package's own function does, for any number of slices, objects or patches, one after another:
networks choose their forms by sizes, which are therefore fixed within.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from rfmedsam2_jax.base.constants import IMAGE_MEAN, IMAGE_STD
from rfmedsam2_jax.nn import SAM2, Prompts, UNet, apply
from rfmedsam2_jax.nn import memory_bank as memory
from rfmedsam2_jax.nn.layers import Array, Params
from rfmedsam2_jax.nn.prompt_encoder import BOX_START
from rfmedsam2_jax.nn.sam2 import ImageFeatures
from rfmedsam2_jax.tracking import recurrence
from rfmedsam2_jax.tracking.recurrence import Cells, Course, Decoding

Named = dict[str, Any]  # arrays, or what describes them, by name
Function = Callable[[Named, Named], Named]  # parameters by path, inputs -> outputs

CONDITIONING = 4  # prompted slices that an object can have
TOKENS = 8  # of the prompts on a slice: two corners of a box, five points, and the closing one
_BANK = "bank/"


class Given(NamedTuple):
  """An array that a program takes: its shape, in which a letter is any number from 1 on, the name
  of its dtype, and what it is, with units."""

  shape: tuple[int | str, ...]
  dtype: str
  says: str


class Part(NamedTuple):
  """A function of a network for some platform, and what it takes; OUTPUTS tells of what it gives.
  """

  function: Function
  inputs: dict[str, Given]


# What the outputs are, with units; of the bank all that begins so.
OUTPUTS = {
  "embedding": "features of slices, at 1/16 of the image's side",
  "high_res_4": "fine features of slices for the decoder, at 1/4 of the image's side",
  "high_res_8": "the same at 1/8",
  _BANK: "what is remembered of objects, to be handed on as it is; zeros where nothing is yet",
  "logits": "masks at 1/4 of the image's side, positive inside; whatever the presence; -1024 where "
            "nothing was run",
  "iou": "predicted IoU of the mask, 0 to 1",
  "presence": "logit, positive where the object is on the slice; -1024 where nothing was run",
  "pointer": "SAM 2's object pointer",
  "voxel_logits": "of the plan's classes with background first, or of its regions; not normalised",
}


def meaning(output: str) -> str:
  return OUTPUTS[_BANK if output.startswith(_BANK) else output]


def encoder(model: SAM2) -> Part:
  """tracking.image.encode_images."""
  side = model.config.image_size

  def encode(params: Named, inputs: Named) -> Named:
    def one(image: Array) -> ImageFeatures:
      features = apply(model, unflatten_dict(params, sep="/"), image[None], method="encode_image")
      return jax.tree.map(lambda x: x[0], features)

    features = jax.lax.map(one, inputs["images"])
    fine, coarse = features.high_res
    return {"embedding": features.embedding, "high_res_4": fine, "high_res_8": coarse}

  mean, deviation = (", ".join(f"{x:g}" for x in values) for values in (IMAGE_MEAN, IMAGE_STD))
  says = (f"slices in three colours, in [0, 1] and then less the mean ({mean}) and divided by the "
          f"standard deviation ({deviation}) of ImageNet; the whole slice resized to a square")
  return Part(encode, {"images": Given(("b", side, side, 3), "float32", says)})


def begin(model: SAM2, how: Decoding, map_dtype: Any) -> Part:
  """tracking.conditioning.PromptDecoder on slices without memory, and the bank's conditioning
  slots; with `how.multimask` a single point, and nothing else, has the best of three masks."""

  def start(params: Named, inputs: Named) -> Named:
    tree = unflatten_dict(params, sep="/")
    return jax.lax.map(functools.partial(_begin, model, tree, how), inputs)

  prompts = {
    "points": Given(("n", TOKENS, 2), "float32", "x and y in pixels of the square image; a box is "
                    "its first and its last pixel; 0 where there is no point"),
    "labels": Given(("n", TOKENS), "int32", "of the points: 2 and 3 first and last pixel of a box, "
                    "before all others; 1 of the object, 0 not of it; then -1 once, and -2 from "
                    "there on"),
    "slice": Given(("n",), "int32", "number of the prompted slice in its volume"),
    "slot": Given(("n",), "int32", f"place in the memory, 0 to {CONDITIONING - 1}: another one for "
                  "each prompted slice of an object"),
  }
  return Part(start, _features(model, "n") | prompts | _bank(model, map_dtype))


def sweep(model: SAM2, how: Decoding, map_dtype: Any) -> Part:
  """tracking.sweep."""

  def follow(params: Named, inputs: Named) -> Named:
    tree = unflatten_dict(params, sep="/")
    features = ImageFeatures(inputs["embedding"], (inputs["high_res_4"], inputs["high_res_8"]))

    def one(mine: Named) -> Named:
      course = Course(inputs["slices"], mine["run"][None], mine["start"][None], inputs["depth"],
                      inputs["reverse"])
      bank, cells = recurrence.sweep(model, tree, _one_bank(mine), features, course, how)
      return _named(bank, cells, lambda x: x[:, 0])

    per_object = {name: x for name, x in inputs.items() if name.startswith(_BANK)}
    return jax.lax.map(one, per_object | {name: inputs[name] for name in ("run", "start")})

  course = {
    "slices": Given(("l",), "int32", "numbers of the slices in their volume, in the order of "
                    "travel"),
    "run": Given(("n", "l"), "bool", "slices that are followed; not the prompted ones"),
    "start": Given(("n",), "int32", "the slice that both directions set out from"),
    "depth": Given((), "int32", "number of slices of the volume"),
    "reverse": Given((), "bool", "towards smaller numbers; forward goes first"),
  }
  return Part(follow, _features(model, "l") | course | _bank(model, map_dtype))


def generator(unet: UNet, patch: tuple[int, int, int], channels: int) -> Part:
  """UNet's forward pass, as the sliding window calls it."""

  def predict(params: Named, inputs: Named) -> Named:
    tree = {"params": unflatten_dict(params, sep="/")}
    return {"voxel_logits": jax.lax.map(lambda x: unet.apply(tree, x[None])[0], inputs["patches"])}

  says = ("windows of a volume on the grid of plan.json and normalised as it says: slices, rows, "
          "columns, channels")
  return Part(predict, {"patches": Given(("b", *patch, channels), "float32", says)})


def _features(model: SAM2, leading: str) -> dict[str, Given]:
  c = model.config
  shapes = {"embedding": (c.grid, c.d_model), "high_res_4": (4 * c.grid, c.d_model // 8),
            "high_res_8": (2 * c.grid, c.d_model // 4)}
  return {name: Given((leading, side, side, width), c.dtype, OUTPUTS[name])
          for name, (side, width) in shapes.items()}


def _bank(model: SAM2, map_dtype: Any) -> dict[str, Given]:
  c = model.config
  empty = jax.eval_shape(lambda: memory.empty_bank(
    1, CONDITIONING, c.grid, c.mem_dim, c.d_model, c.compute_dtype, map_dtype, c.drawn_prompts))
  return {name: Given(("n", *x.shape[1:]), str(x.dtype), OUTPUTS[_BANK])
          for name, x in _named_bank(empty).items()}


def _named_bank(bank: memory.MemoryBank) -> Named:
  return {f"{_BANK}{ring}/{field}": x for ring, held in bank._asdict().items() if held is not None
          for field, x in held._asdict().items()}


def _one_bank(mine: Named) -> memory.MemoryBank:
  """The bank of one object, from arrays without a leading axis."""
  def ring(name: str) -> memory.Ring:
    return memory.Ring(*(mine[f"{_BANK}{name}/{field}"][None] for field in memory.Ring._fields))

  masks = ring("masks") if f"{_BANK}masks/values" in mine else None
  return memory.MemoryBank(ring("maps"), ring("pointers"), masks)


def _named(bank: memory.MemoryBank, cells: Cells, of_one: Callable[[Array], Array]) -> Named:
  """What one object has: the bank, and cells without the axis of objects."""
  return {name: x[0] for name, x in _named_bank(bank).items()} | {
    name: of_one(x) for name, x in cells._asdict().items()}


def _begin(model: SAM2, params: Params, how: Decoding, mine: Named) -> Named:
  """`begin` of one object, arrays without a leading axis."""
  one = {name: x[None] for name, x in mine.items() if not name.startswith(_BANK)}
  embedding, high_res = one["embedding"], (one["high_res_4"], one["high_res_8"])
  conditioned = apply(model, params, embedding, method="unconditioned")

  def decoded(multimask: bool) -> Cells:
    prompts = Prompts(one["points"], one["labels"])
    return recurrence.decode_cells(
      model, params, conditioned, high_res, prompts, how._replace(multimask=multimask))

  if how.multimask:
    labels = mine["labels"]
    point = ((labels == 0) | (labels == 1)).sum() == 1
    ambiguous = point & ~jnp.any(labels == BOX_START)
    cells = jax.lax.cond(ambiguous, lambda: decoded(True), lambda: decoded(False))
  else:
    cells = decoded(False)
  found = cells.logits, cells.presence
  maps = recurrence.remember_cells(model, params, embedding, *found, binarize=True)
  bank = _one_bank(mine)
  masks = None if bank.masks is None else recurrence.mask_to_follow(*found)
  bank = memory.add_conditioning(
    bank, one["slot"], jnp.ones(1, bool), maps, cells.pointer, one["slice"], masks)
  return _named(bank, cells, lambda x: x[0])
