"""The folder of a run: who may write to it, and what lies where.

Of a run in a bucket it is the copy that this machine works in (base.buckets).

config.yaml, splits.json, cases.json, fingerprint.json, plan.json, versions.json, log.jsonl,
preprocessed/ (and in it generator/ where that sees another grid), prompts/, checkpoints and final
params in generator/, refiner/ and, where it is trained apart, mask_adapter/, validation.json.
"""

import contextlib
import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

from rfmedsam2_jax.base.addresses import copy_of
from rfmedsam2_jax.base.buckets import fetched, push
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.files import replacing
from rfmedsam2_jax.data.plan import Plan


class RunFolder:
  """Paths of a run, and its log; of several processes, one `writes`.

  lost: why it must not be written any more, if another one may hold it.
  """

  lost = ""

  def __init__(self, path: str | Path, writes: bool = True):
    self.path, self.writes = copy_of(path, "written"), writes

  def __truediv__(self, name: str) -> Path:
    return self.path / name

  @property
  def config(self) -> Path:
    return self.path / "config.yaml"

  def checkpoints(self, phase: str) -> Path:
    return self.path / phase / "checkpoints"

  def params(self, phase: str) -> Path:
    """The averaged weights: a folder, or one file where a model was installed."""
    file = self.path / phase / "params.safetensors"
    return file if file.is_file() else self.path / phase / "params"

  def prepared(self, plan: Plan, for_generator: bool = False) -> Path:
    """Where prepared training cases lie, those that the generator sees or those of the slices."""
    whole = self.path / "preprocessed"
    return whole / "generator" if for_generator and plan.generator_spacing else whole

  def write(self, name: str, text: str) -> None:
    if self.writes:
      with replacing(self.path / name) as temporary:
        temporary.write_text(text, encoding="utf-8")

  def log(self, phase: str, step: int, values: dict[str, Any]) -> None:
    """Appends a line to log.jsonl."""
    line = {"phase": phase, "step": step, "time": round(time.time(), 1)} | values
    if self.writes:
      with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")

  def logged(self) -> list[dict[str, Any]]:
    """The lines of log.jsonl, but for one that a kill has cut off."""
    path, found = fetched(self.path / "log.jsonl"), []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
      with contextlib.suppress(ValueError):
        found.append(json.loads(line))
    return found

  def forget_after(self, phase: str, step: int) -> None:
    """Drops lines of the log that a resumed phase will write again, and a torn last line."""
    if self.writes and (self.path / "log.jsonl").exists():
      kept = [x for x in self.logged() if x["phase"] != phase or x["step"] <= step]
      self.write("log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

  def sync(self) -> None:
    """Sends to its bucket, if the run lies in one, what is not written whole there and then.

    UserError if the run is lost.
    """
    if self.lost:
      raise UserError(self.lost)
    if self.writes:
      push(self.path / "log.jsonl")
      push(self.path / "tensorboard")
    push(self.path / "profile")  # in which every process has files of its own


def versions() -> dict[str, str]:
  """What a run was made with."""
  found = {"python": platform.python_version(),
           "machine": f"{platform.system()} {platform.machine()}"}
  for package in ("rfmedsam2-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain",
                  "numpy"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found
