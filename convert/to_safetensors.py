"""A checkpoint of ours as one file that describes itself, in half of the bytes: to pass it on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Passing, Report, silent
from rfmedsam2_jax.data.files import replacing_whole
from rfmedsam2_jax.weights.checkpoint import load_checkpoint, save_checkpoint
from rfmedsam2_jax.weights.single_file import read_single


@dataclasses.dataclass(frozen=True)
class Wanted:
  """about: KEY=TEXT each, what the file says of itself besides what the checkpoint says."""

  about: Sequence[str] = ()


def to_safetensors(
  source: Path, out: Path, wanted: Wanted, report: Report, progress: Report = silent
) -> str:
  """Writes the file `out`, which is replaced, values rounded to float16; returns what was done.

  Raises:
    UserError: no checkpoint, values that float16 does not hold, a text without a key.
  """
  progress(Passing(f"reading {source}"))
  config, params, about = load_checkpoint(source)
  # Those of the source are not those of the file.
  about = {key: x for key, x in about.items() if key not in ("checksum", "sha256", "parameters")}
  for text in wanted.about:
    key, given, words = text.partition("=")
    if not given or not key.isidentifier():
      raise UserError(f"--about {text}: is not of the form KEY=TEXT; correct it")
    if key in ("sam2", "config", "checksum", "sha256", "parameters"):
      raise UserError(f"--about {text}: the program itself says {key}; choose another key")
    about[key] = words
  progress(Passing(f"writing {out}"))
  with replacing_whole(out) as temporary:
    save_checkpoint(temporary, config, params, about)
    written = read_single(temporary)
  report(f"sha256 {written['sha256']}")
  return f"{written['parameters']} values in {out.stat().st_size / 1e6:.2f} MB"
