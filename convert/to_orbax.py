"""From a checkpoint of others to one of ours: read, recognise, match, verify, write."""

import argparse
import dataclasses
import json

import jax
import numpy as np

from convert import report as reporting
from convert.huggingface import to_official_names
from convert.outputs import check_target
from convert.recognise import choose_config
from convert.sources import Source, read_source
from convert.verify import Witness, check_installed, verify
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Passing, Report, silent
from rfmedsam2_jax.data.files import replacing_whole
from rfmedsam2_jax.data.run_folder import versions
from rfmedsam2_jax.nn.adapters import AdapterConfig
from rfmedsam2_jax.nn.initialisation import init_params
from rfmedsam2_jax.nn.sam2 import SAM2Config
from rfmedsam2_jax.weights.checkpoint import save_checkpoint, with_adapters
from rfmedsam2_jax.weights.names import from_official, official_shapes, to_official

KEY = 0  # of what is freshly initialised
NO_ADAPTERS = AdapterConfig(dwconv=False, cnn=False)


def to_orbax(
  options: argparse.Namespace, report: Report, progress: Report = silent
) -> str:
  """Converts `options.source` to `options.out`; see convert.command for the options.

  Returns what was done.

  Raises:
    UserError: whatever stops it; nothing was written then.
  """
  check_target(options.out, options.overwrite, is_ours=(options.out / "about").is_dir())
  if options.verify:
    check_installed(False)
  progress(Passing(f"reading {options.source}"))
  source = read_source(options.source)
  witness = check_installed(source.hugging_face) if options.verify else ""
  state = to_official_names(source.tensors) if source.hugging_face else source.tensors
  shapes = {name: x.shape for name, x in state.items()}
  side = source.image_size if options.image_size is None else options.image_size
  name, config = choose_config(shapes, str(options.source), options.config, side)
  adapted, config = config, dataclasses.replace(config, adapters=NO_ADAPTERS)
  kind = _kind(source)
  report(f"{options.source}: {kind}, {name}, image side {config.image_size}")
  result = reporting.match(shapes, official_shapes(config))
  for line in reporting.lines(result, options.allow):
    report(line)
  if refused := result.refused(options.allow):
    image_half = not any(name.startswith("memory_attention.") for name in shapes)
    raise UserError(
      f"{options.source}: {len(refused)} tensors do not match {name} (the first: {refused[0]}); "
      + ("it is the image half of SAM 2, start the rest afresh with --allow memory" if image_half
         else "force the right network with --config, or accept them by name with --allow")
    )
  state = {name: state[name] for name in result.matched}
  if result.fresh:
    fresh = to_official(init_params(config, jax.random.key(KEY)))
    state |= {name: fresh[name] for name in result.fresh}
  params = from_official(state, config)
  if options.verify:
    verify(_witness(witness, source, config, state), config, params,
           # transformers gets the file alone, in which these are missing.
           memory=witness == "sam2" or not result.fresh, report=report, progress=progress)
  if options.adapters:
    config = adapted
    params = with_adapters(params, config, jax.random.key(KEY))
  about = {
    "source": {"kind": kind, "name": options.source.name, "place": source.place,
               "sha256": source.files},
    "fresh": list(result.fresh),
    "left_out": list(result.unexpected),
    "versions": versions(),
  }
  progress(Passing(f"writing {options.out}"))
  with replacing_whole(options.out) as temporary:
    save_checkpoint(temporary, config, params, json.loads(json.dumps(about)))
  adapters = "fresh adapters" if options.adapters else "no adapters"
  return f"{len(result.matched)} tensors converted, {adapters}"


def _kind(source: Source) -> str:
  """What a source is, in words."""
  if source.hugging_face:
    return "Hugging Face names"
  if "medsam2" in source.path.name.lower():
    return "MedSAM2, official names"
  return "official names"


def _witness(
  package: str, source: Source, config: SAM2Config, state: dict[str, np.ndarray]
) -> Witness:
  if package == "transformers":
    from convert.transformers_model import Transformers

    return Transformers(config, source.tensors)
  from convert.official import Official

  return Official(config, state)
