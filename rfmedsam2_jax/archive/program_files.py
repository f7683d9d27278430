"""The folder `programs` of an archive: a model's functions for people who do not have this package.

Every function is one file per platform, because the networks take another form on each. Weights
are not in them but in the archive, once; `programs.json` says which go where. `run_programs.py`
runs them without this package and compares with `check.safetensors` on whatever machine it is.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.interpreters import partial_eval
from safetensors.numpy import save

from rfmedsam2_jax.archive import program_functions as functions
from rfmedsam2_jax.archive import run_programs
from rfmedsam2_jax.archive.manifest import entry_of, json_bytes
from rfmedsam2_jax.archive.program_checks import SIZES, TOLERANCE, check_input, sized
from rfmedsam2_jax.archive.program_functions import Function, Given, Named, Part
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Passing, Report
from rfmedsam2_jax.nn import SAM2, Platform, UNet
from rfmedsam2_jax.programs.lowering import CUDNN_CALLS, lowered
from rfmedsam2_jax.segmentation.segmenter import Segmenter
from rfmedsam2_jax.tracking import TrackingConfig
from rfmedsam2_jax.weights.checkpoint import Checkpoint

FORMAT = 1
FOLDER = "programs"
MANIFEST, CHECK, RUNNER = (f"{FOLDER}/{x}" for x in (
  "programs.json", "check.safetensors", "run_programs.py"))
ENDING = ".jaxexport"
CPU = Platform("cpu")
# On a GPU what runs from Ampere on: of what Hopper alone can (heads wider than 128 in cuDNN) the
# plain form.
PLATFORMS = {"cpu": CPU, "cuda": Platform("gpu", (8, 0)), "tpu": Platform("tpu")}


class Network(NamedTuple):
  """A function, whatever the platform, with parameters by path, the file of the archive that has
  them, and the dtype that it computes in."""

  part: Callable[[Platform], Part]
  params: Named
  weights: str
  dtype: str


def program_files(
  model: Segmenter | None, tracker: Checkpoint | None, weights: dict[str, bytes], report: Report,
) -> dict[str, bytes]:
  """Files of an archive by their paths: the programs and what belongs to them.

  Args:
    model: of a run with a generator and a refiner. tracker: where there is one, SAM 2's functions
      are its, else the refiner's.
    weights: the files of parameters that the archive has.

  Raises:
    UserError: a package is missing.
  """
  _check_packages()
  files: dict[str, bytes] = {}
  listed: dict[str, Any] = {}
  stored: dict[str, np.ndarray] = {}
  before: Named = {}
  for name, network in _networks(model, tracker).items():
    part, exported = network.part(CPU), _exported(name, network, report)
    files |= {_path(name, platform): bytes(made.serialize()) for platform, made in exported.items()}
    listed[name] = about = _about(name, network, part, exported, before)
    report(Passing(f"checks of {name}"))
    tensors = {f"{name}/in/{value['name']}": check_input(value["name"], part.inputs)
               for value in about["inputs"] if value["check"] == "stored"}
    inputs = run_programs.check_inputs(name, about, tensors, before)
    found = _run(part.function, network.params, inputs)
    tensors |= {f"{name}/out/{key}": run_programs.sample(x) for key, x in found.items()}
    stored |= tensors
    before |= found
  files[CHECK] = save(dict(sorted(stored.items())))
  of_weights = {about["weights"] for about in listed.values()}
  hashed = files | {path: content for path, content in weights.items() if path in of_weights}
  files[RUNNER] = Path(run_programs.__file__).read_bytes()
  files[MANIFEST] = json_bytes({
    "format": FORMAT,
    "made_with": {x: importlib.metadata.version(x) for x in ("rfmedsam2-jax", "jax", "jaxlib")},
    "calling_convention_version": exported["cpu"].calling_convention_version,
    "arguments": "parameters in their order, then inputs in theirs; letters in shapes are any "
                 "number from 1 on, the same one wherever they stand",
    "programs": listed,
    "check": CHECK,
    "sha256": {path: entry_of(content).sha256 for path, content in sorted(hashed.items())},
  })
  return files


def _networks(model: Segmenter | None, tracker: Checkpoint | None) -> dict[str, Network]:
  found: dict[str, Network] = {}
  of_sam2 = None
  if tracker is not None:
    of_sam2 = tracker.config, tracker.params, "tracker", TrackingConfig()
  elif model is not None and model.refiner is not None:
    # Refinement trains the first of the decoder's masks alone.
    single = TrackingConfig(multimask=False, dynamic_multimask=False)
    of_sam2 = model.sam2.config, model.refiner, "refiner", single
  if of_sam2 is not None:
    config, params, name, tracking = of_sam2
    how, map_dtype = tracking.decoding(config.drawn_prompts), tracking.map_dtype
    rest = flatten_dict(params, sep="/"), f"{name}/params.safetensors", config.dtype
    found["encoder"] = Network(lambda kind: functions.encoder(SAM2(config, kind)), *rest)
    found["begin"] = Network(
      lambda kind: functions.begin(SAM2(config, kind), how, map_dtype), *rest)
    found["sweep"] = Network(
      lambda kind: functions.sweep(SAM2(config, kind), how, map_dtype), *rest)
  if model is not None:
    unet, plan = model.unet, model.plan
    found["generator"] = Network(
      lambda kind: functions.generator(
        UNet(unet.config, unet.num_outputs, kind), plan.patch_size, len(plan.channels)),
      flatten_dict(model.generator, sep="/"), "generator/params.safetensors", unet.config.dtype)
  return found


def _path(name: str, platform: str) -> str:
  return f"{FOLDER}/{name}.{platform}{ENDING}"


def _exported(name: str, network: Network, report: Report) -> dict[str, jax.export.Exported]:
  """A network's program for each platform, of the parameters that it looks at."""
  inputs = network.part(CPU).inputs
  used, whole = shapes_of(_used(network.part(CPU), network.params)), shapes_of(network.params)
  found = {}
  for platform, kind in PLATFORMS.items():
    report(Passing(f"{name} for {platform}"))
    function = _of_used(network.part(kind).function, whole)
    found[platform] = lowered(function, kind, used, symbolic(inputs))
  return found


def _about(
  name: str, network: Network, part: Part, exported: dict[str, jax.export.Exported], before: Named,
) -> dict[str, Any]:
  """What programs.json says of a program."""
  first = exported["cpu"]
  (params, inputs), _ = jax.tree.unflatten(first.in_tree, first.in_avals)
  outputs = jax.tree.unflatten(first.out_tree, first.out_avals)
  calls = {platform: [call for call in CUDNN_CALLS if f"@{call}(" in program.mlir_module()]
           for platform, program in exported.items()}
  return {
    "weights": network.weights,
    "files": {platform: _path(name, platform) for platform in exported},
    # What else has to be there: jax.export vouches for no program with such calls in other versions
    # of JAX.
    "custom_calls": {platform: found for platform, found in calls.items() if found},
    "parameters": list(params),
    "inputs": [
      {"name": key, "shape": list(given.shape), "dtype": given.dtype, "meaning": given.says,
       "check": "before" if key in before else "zeros" if key.startswith("bank/") else "stored"}
      for key, given in sorted(part.inputs.items())],
    "outputs": [
      {"name": key, "shape": [x if isinstance(x, int) else str(x) for x in aval.shape],
       "dtype": str(aval.dtype), "meaning": functions.meaning(key)}
      for key, aval in outputs.items()],
    "check": SIZES,
    "tolerance": TOLERANCE[network.dtype],
  }


def _used(part: Part, params: Named) -> Named:
  """The parameters that a function looks at."""
  sizes = {name: jax.ShapeDtypeStruct(sized(given), given.dtype)
           for name, given in part.inputs.items()}
  traced = jax.jit(part.function).trace(shapes_of(params), sizes).jaxpr.jaxpr
  _, used = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
  return {name: params[name] for name, one in zip(sorted(params), used, strict=False) if one}


def _of_used(function: Function, whole: Named) -> Function:
  """The same of the parameters that it looks at; Flax wants the others to be there."""
  def run(params: Named, inputs: Named) -> Named:
    unused = {name: jnp.zeros(x.shape, x.dtype) for name, x in whole.items() if name not in params}
    return function(unused | params, inputs)
  return run


def shapes_of(params: Named) -> Named:
  return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}


def symbolic(inputs: dict[str, Given]) -> Named:
  """Inputs whose letters stand for any number."""
  scope = jax.export.SymbolicScope()
  return {name: jax.ShapeDtypeStruct(
    jax.export.symbolic_shape(",".join(map(str, given.shape)), scope=scope), given.dtype)
    for name, given in inputs.items()}


def _run(function: Function, params: Named, inputs: Named) -> Named:
  """What a function gives, computed on the CPU whatever else there is."""
  device = jax.devices("cpu")[0]
  with jax.default_device(device):
    return jax.jit(function)(*jax.device_put((params, inputs), device))


def _check_packages() -> None:
  try:
    import flatbuffers  # noqa: F401
  except ImportError:
    raise UserError("--programs: needs flatbuffers, with which JAX writes programs; pip install "
                    "'rfmedsam2-jax[programs]'") from None
