"""From a checkpoint of others to one of ours: read, recognise, match, verify, write."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Passing, Report, silent
from rfmedsam2_jax.data.files import replacing_whole
from rfmedsam2_jax.data.run_folder import versions
from rfmedsam2_jax.nn.adapters import AdapterConfig
from rfmedsam2_jax.nn.initialisation import init_params
from rfmedsam2_jax.nn.sam2 import SAM2Config
from rfmedsam2_jax.weights.checkpoint import save_checkpoint, with_adapters
from rfmedsam2_jax.weights.names import from_official, official_shapes, to_official

from .huggingface import to_official_names
from .recognise import choose_config
from .report import Match, Shapes, lines, match
from .sources import Source, check_finite, read_source
from .verify import Witness, check_installed, verify

KEY = 0  # of what is freshly initialised
NO_ADAPTERS = AdapterConfig(dwconv=False, cnn=False)


@dataclasses.dataclass(frozen=True)
class Wanted:
  """How a checkpoint is converted.

  Attributes:
    config: the network: a preset, or a YAML file of a training config; None to recognise it.
    image_size: side of the square image; None: what the source or the network says.
    allow: official names or patterns of tensors that may be missing (they start afresh), be left
      over or have another shape; `memory` is all that Sam2Model lacks.
    adapters: add fresh adapters, which change nothing.
    verify: compare with the PyTorch network first.
  """

  config: str | None = None
  image_size: int | None = None
  allow: Sequence[str] = ()
  adapters: bool = False
  verify: bool = False


def to_orbax(
  path: Path, out: Path, wanted: Wanted, report: Report, progress: Report = silent
) -> str:
  """Converts a checkpoint of others to the folder `out`, which is replaced; returns what was done.

  Raises:
    UserError: whatever stops it; nothing was written then.
  """
  if wanted.verify:
    check_installed(False)
  progress(Passing(f"reading {path}"))
  source = read_source(path)
  witness = check_installed(source.hugging_face) if wanted.verify else ""
  state = to_official_names(source.tensors) if source.hugging_face else source.tensors
  shapes = {name: x.shape for name, x in state.items()}
  side = source.image_size if wanted.image_size is None else wanted.image_size
  name, config = choose_config(shapes, str(path), wanted.config, side)
  adapted, config = config, dataclasses.replace(config, adapters=NO_ADAPTERS)
  kind = _kind(source)
  report(f"{path}: {kind}, {name}, image side {config.image_size}")
  result = _matched(shapes, name, config, path, wanted.allow, report)
  state = {name: state[name] for name in result.matched}
  check_finite(state, path)
  if result.fresh:
    fresh = to_official(init_params(config, jax.random.key(KEY)))
    state |= {name: fresh[name] for name in result.fresh}
  params = from_official(state, config)
  if wanted.verify:
    verify(_witness(witness, source, config, state), config, params,
           # transformers gets the file alone, in which these are missing.
           memory=witness == "sam2" or not result.fresh, report=report, progress=progress)
  if wanted.adapters:
    config, params = adapted, with_adapters(params, adapted, jax.random.key(KEY))
  about = {
    "source": {"kind": kind, "name": path.name, "place": source.place, "sha256": source.files},
    "fresh": list(result.fresh),
    "left_out": list(result.unexpected),
    "versions": versions(),
  }
  progress(Passing(f"writing {out}"))
  with replacing_whole(out) as temporary:
    save_checkpoint(temporary, config, params, json.loads(json.dumps(about)))
  adapters = "fresh adapters" if wanted.adapters else "no adapters"
  return f"{len(result.matched)} tensors converted, {adapters}"


def _matched(
  shapes: Shapes, name: str, config: SAM2Config, path: Path, allow: Sequence[str], report: Report
) -> Match:
  """Which tensors fit the network; UserError unless all others are allowed."""
  result = match(shapes, official_shapes(config))
  for line in lines(result, allow):
    report(line)
  if refused := result.refused(allow):
    image_half = not any(name.startswith("memory_attention.") for name in shapes)
    raise UserError(
      f"{path}: {len(refused)} tensors do not match {name} (the first: {refused[0]}); "
      + ("it is the image half of SAM 2, allow memory to start the rest afresh" if image_half
         else "force the right network (config), or accept them by name (allow)")
    )
  return result


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
    from .transformers_model import Transformers

    return Transformers(config, source.tensors)
  from .official import Official

  return Official(config, state)
