"""The folder of a run: who may write to it, and what lies where.

config.yaml, dataset facts (splits.json, fingerprint.json, plan.json), versions.json,
log.jsonl, preprocessed/, prompts/, generator/ and refiner/ (checkpoints and final params), where
it is trained apart mask_adapter/, validation.json.
"""

import contextlib
import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

from rfmedsam2_jax.data.files import replacing


class RunFolder:
  """Paths of a run, and its log.

  Args:
    writes: whether this process writes; where there are several, one does.
  """

  def __init__(self, path: str | Path, writes: bool = True):
    self.path = Path(path)
    self.writes = writes

  def __truediv__(self, name: str) -> Path:
    return self.path / name

  @property
  def config(self) -> Path:
    return self.path / "config.yaml"

  def checkpoints(self, phase: str) -> Path:
    return self.path / phase / "checkpoints"

  def params(self, phase: str) -> Path:
    return self.path / phase / "params"

  def write(self, name: str, text: str) -> None:
    if not self.writes:
      return
    with replacing(self.path / name) as temporary:
      temporary.write_text(text, encoding="utf-8")

  def log(self, phase: str, step: int, values: dict[str, Any]) -> None:
    """Appends a line to log.jsonl."""
    if not self.writes:
      return
    line = {"phase": phase, "step": step, "time": round(time.time(), 1)} | values
    with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")

  def logged(self) -> list[dict[str, Any]]:
    """The lines of log.jsonl, but for one that a kill has cut off."""
    path = self.path / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for line in lines:
      with contextlib.suppress(ValueError):
        found.append(json.loads(line))
    return found

  def forget_after(self, phase: str, step: int) -> None:
    """Drops lines of the log that a resumed phase will write again, and a torn last line."""
    if self.writes and (self.path / "log.jsonl").exists():
      kept = [x for x in self.logged() if x["phase"] != phase or x["step"] <= step]
      self.write("log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def versions() -> dict[str, str]:
  """What a run was made with."""
  packages = (
    "rfmedsam2-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"
  )
  machine = f"{platform.system()} {platform.machine()}"
  found = {"python": platform.python_version(), "machine": machine}
  for package in packages:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found
