"""The PyTorch network beside ours, part by part, on random input.

The witness gets the tensors as they are in the file. Every part gets the same input on both sides,
so that a difference belongs to its part.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Passing, Report, silent
from rfmedsam2_jax.nn.memory_attention import MemorySlots
from rfmedsam2_jax.nn.prompt_encoder import Prompts
from rfmedsam2_jax.nn.sam2 import SAM2, SAM2Config

from .witness import Prompted, Witness

# Largest difference relative to the largest value; float32 leaves about 1e-6.
TOLERANCE = 1e-4


def check_installed(hugging_face: bool) -> str:
  """The package that can be the witness: transformers for its own names, else sam2.

  Raises:
    UserError: it is not installed.
  """
  has = {name: importlib.util.find_spec(name) is not None for name in
         ("torch", "sam2", "transformers")}
  # Its own names go into its own class: sam2 would only see them after our renaming.
  if hugging_face and has["torch"] and has["transformers"]:
    return "transformers"
  if has["torch"] and has["sam2"]:
    return "sam2"
  missing = "torch" if not has["torch"] else "sam2"
  raise UserError(f"verify: {missing} is not installed; install it (docs/convert.md says how) or "
                  "convert without verifying")


def verify(
  witness: Witness, config: SAM2Config, params: dict[str, Any], memory: bool,
  report: Report, progress: Report = silent,
) -> None:
  """Compares all parts and reports a line for each.

  Args:
    config: without adapters.
    memory: compare the parts of the memory too.

  Raises:
    UserError: a part differs by more than TOLERANCE.
  """
  import torch

  report(f"  largest difference to {witness.name}, relative to the largest value, on random input:")
  worst: dict[str, float] = {}
  # Reduced precision is for users to choose, not for a comparison.
  with torch.inference_mode(), jax.default_matmul_precision("highest"):
    for part, ours, theirs in _parts(witness, config, params, memory, progress):
      errors = {name: _difference(ours[name], theirs[name]) for name in theirs}
      worst[part] = max(errors.values())
      each = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
      report(f"    {part:16s} {worst[part]:.1e}  ({each})")
  part = max(worst, key=lambda part: worst[part])
  if not worst[part] < TOLERANCE:  # a NaN is not
    raise UserError(
      f"verify: the {part} differs from {witness.name} by {worst[part]:.1e} of its scale, more "
      f"than {TOLERANCE:g}; the checkpoint was not converted"
    )


def _parts(
  witness: Witness, config: SAM2Config, params: dict[str, Any], memory: bool, progress: Report
):
  """Yields the name of a part, our answers and the witness's."""
  c, rng = config, np.random.default_rng(0)
  side, grid = c.image_size, c.grid

  def draw(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)

  def run(method: Any, *inputs: Any, **options: Any) -> Any:
    part = method if isinstance(method, str) else "prompts"
    progress(Passing(f"comparing with {witness.name}: {part}, compiled first"))
    call = jax.jit(lambda params, inputs: SAM2(c).apply(
      {"params": params}, *inputs, method=method, **options))
    return jax.tree.map(np.asarray, call(params, inputs))

  images = draw(1, side, side, 3)
  features = run("encode_image", images)
  ours = {"stride 4": features.high_res[0], "stride 8": features.high_res[1],
          "embedding": features.embedding}
  yield "image encoder", ours, witness.image(images)

  prompted = Prompted(
    rng.uniform(0, side, (1, 2, 2)).astype(np.float32), np.array([[1, 0]], np.int32),
    4 * draw(1, 4 * grid, 4 * grid),
  )
  prompts = Prompts(
    jnp.pad(prompted.points, [(0, 0), (0, 1), (0, 0)]),
    jnp.pad(prompted.labels, [(0, 0), (0, 1)], constant_values=-1), jnp.asarray(prompted.mask),
  )
  tokens, _, dense = run(lambda module, prompts: module.sam_prompt_encoder(prompts), prompts)
  yield "prompt encoder", {"tokens": tokens, "dense": dense}, witness.prompts(prompted)

  embedding, high_res = draw(1, grid, grid, c.d_model), list(features.high_res)
  for part, multimask in (("mask decoder", False), ("three masks", True)):
    decoded = run("decode", embedding, tuple(high_res), prompts, multimask=multimask)
    theirs = witness.decode(embedding, high_res, prompted, multimask)
    if not memory:
      theirs = {name: x for name, x in theirs.items() if name != "pointer"}
    yield part, decoded._asdict(), theirs
  if not memory:
    return

  embedding, logits = draw(2, grid, grid, c.d_model), 4 * draw(2, side, side)
  present = np.array([True, False])
  maps = run("remember", embedding, logits, present)
  yield "memory encoder", {"memory": maps}, witness.remember(embedding, logits, present)

  embedding, maps = draw(1, grid, grid, c.d_model), draw(1, 2, grid, grid, c.mem_dim)
  pointers = draw(1, 2, c.d_model)
  slots = MemorySlots(
    maps=jnp.asarray(maps), rows=jnp.array([[c.num_maskmem - 1, 0]]), valid=jnp.ones((1, 2), bool),
    pointers=jnp.asarray(pointers), pointer_positions=jnp.array([[1.0, 0.5]]),
    pointer_valid=jnp.ones((1, 2), bool),
  )
  conditioned = run("condition", embedding, slots)
  yield ("memory attention", {"conditioned": conditioned},
         witness.condition(embedding, maps, pointers))


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
  if ours.shape != theirs.shape:
    raise UserError(f"verify: shapes differ, {ours.shape} and {theirs.shape}; this is a mistake "
                    "of ours, please report it")
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
