"""Back: a checkpoint of ours as a .pt file that the official class loads strictly."""

import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Passing, Report, silent
from rfmedsam2_jax.data.files import replacing_whole
from rfmedsam2_jax.weights.checkpoint import load_checkpoint
from rfmedsam2_jax.weights.names import to_official


def to_torch(folder: Path, out: Path, report: Report, progress: Report = silent) -> str:
  """Writes {"model": state dict} to the file `out`, which is replaced; returns what was done.

  Raises:
    UserError: no checkpoint, adapters that have learned something, drawn prompts, a full disk.
  """
  import torch

  progress(Passing(f"reading {folder}"))
  config, params, _ = load_checkpoint(folder)
  if config.drawn_prompts:
    raise UserError(f"{folder}: was trained with sam2.drawn_prompts, which the official class does "
                    "not do; it would compute another thing")
  adapters = _adapters(params)
  if learned := [name for name, fresh in adapters.items() if not fresh]:
    raise UserError(
      f"{folder}: {len(learned)} of its {len(adapters)} adapters are not the identity (the first: "
      f"{learned[0]}), and the official class has no place for them; it would compute another thing"
    )
  state = {name: torch.from_numpy(np.array(x)) for name, x in to_official(params).items()}
  progress(Passing(f"writing {out}"))
  with replacing_whole(out) as temporary:
    try:
      torch.save({"model": state}, temporary)
    except RuntimeError:  # whatever keeps its writer from writing
      raise UserError(f"{out}: cannot be written; is the disk full?") from None
  if adapters:
    report(f"left out {len(adapters)} adapters; they are the identity, so nothing changes")
  return f"{len(state)} tensors"


def _adapters(params: dict[str, Any]) -> dict[str, bool]:
  """Path of every adapter, and whether it is the identity: its last layer is zero."""
  flat = flatten_dict(params, sep="/")
  found: dict[str, bool] = {}
  for path in fnmatch.filter(flat, "*/adapter/up/*"):
    name = path.split("/adapter/")[0] + "/adapter"
    found[name] = found.get(name, True) and not np.any(flat[path])
  return found
