"""Runs the programs beside this file, and checks them on this machine.

It needs what `pip install jax flatbuffers` brings and nothing else. From a shell it runs the
programs on stored inputs and compares with stored outputs:

    python run_programs.py
    python run_programs.py --platform cpu

In Python:

    from run_programs import load
    encoder = load("encoder")
    features = encoder({"images": images})  # programs.json has names, shapes, dtypes, meanings

`track` shows how the programs of SAM 2 work together.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).resolve().parent
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
           "I32": "int32", "U8": "uint8", "BOOL": "bool"}
_BACKENDS = {"cuda": "gpu"}  # what JAX calls platforms where it lists devices
Arrays = dict[str, Any]


def load(name: str, platform: str | None = None, folder: str | Path = HERE) -> "Program":
  """A program of a folder by its name.

  platform: cpu, cuda or tpu; None is the one that JAX uses here.

  Raises:
    ValueError: no such program or platform, or a file that is not the listed one.
  """
  return Program(_manifest(Path(folder)), name, platform or here(), Path(folder))


def here() -> str:
  """The platform that JAX uses on this machine."""
  backend = jax.default_backend()
  return {value: key for key, value in _BACKENDS.items()}.get(backend, backend)


class Program:
  """A program with its parameters; called with a dict of arrays, it gives one."""

  def __init__(self, manifest: dict[str, Any], name: str, platform: str, folder: Path):
    if name not in manifest["programs"]:
      raise ValueError(f"no program {name}; there are {', '.join(manifest['programs'])}")
    self.name, self.about = name, manifest["programs"][name]
    if platform not in self.about["files"]:
      raise ValueError(f"{name}: not for {platform}; for {', '.join(self.about['files'])}")
    self._device = jax.devices(_BACKENDS.get(platform, platform))[0]
    content = _content(manifest, folder, self.about["files"][platform])
    self._call = jax.jit(jax.export.deserialize(bytearray(content)).call)
    weights = read_tensors(_content(manifest, folder, self.about["weights"]))
    wanted = {path: weights[path] for path in self.about["parameters"]}
    self._parameters = jax.device_put(wanted, self._device)

  def __call__(self, inputs: Arrays) -> Arrays:
    """The outputs by their names, on the device. Inputs that the program does not take are left.

    Raises:
      ValueError: an input is missing or has another shape than the manifest says.
    """
    given: Arrays = {}
    sizes: dict[str, int] = {}
    with jax.default_device(self._device):
      for value in self.about["inputs"]:
        if value["name"] not in inputs:
          raise ValueError(f"{self.name}: needs {value['name']} {value['shape']}")
        x = jnp.asarray(inputs[value["name"]], value["dtype"])
        fits = len(x.shape) == len(value["shape"]) and all(
          found == (sizes.setdefault(wanted, found) if isinstance(wanted, str) else wanted)
          for found, wanted in zip(x.shape, value["shape"], strict=True))
        if not fits:
          raise ValueError(f"{self.name}: {value['name']} is {list(x.shape)}; it takes "
                           f"{value['shape']} ({', '.join(f'{k}={v}' for k, v in sizes.items())})")
        given[value["name"]] = jax.device_put(x, self._device)
      return self._call(self._parameters, given)


def track(
  images: np.ndarray, points: np.ndarray, labels: np.ndarray, prompted: int,
  platform: str | None = None, folder: str | Path = HERE,
) -> tuple[np.ndarray, np.ndarray]:
  """Follows N objects, prompted on one slice, through a volume in both directions.

  Args:
    images: [D, S, S, 3], as `encoder` takes them. points, labels: [N, 8, 2] and [N, 8], as `begin`.
    prompted: number of the slice that the points are on.

  Returns:
    float32: masks as logits [N, D, S / 4, S / 4], and presence [N, D], whether each object is on
    each slice; both positive where it is.
  """
  encoder, begin, sweep = (load(name, platform, folder) for name in ("encoder", "begin", "sweep"))
  (count, *_), depth = np.shape(points), len(images)
  features = encoder({"images": images})
  here = {name: jnp.repeat(x[prompted : prompted + 1], count, 0) for name, x in features.items()}
  # Memories are empty at first.
  empty = {x["name"]: jnp.zeros([count, *x["shape"][1:]]) for x in begin.about["inputs"]
           if x["name"].startswith("bank/")}
  start = {"slice": np.full(count, prompted), "slot": np.zeros(count)}
  found = begin(empty | here | start | {"points": points, "labels": labels})
  logits = np.zeros((count, depth, *found["logits"].shape[1:]), np.float32)
  presence = np.zeros((count, depth), np.float32)
  logits[:, prompted], presence[:, prompted] = found["logits"], found["presence"]
  for reverse in (False, True):
    way = np.arange(prompted - 1, -1, -1) if reverse else np.arange(prompted + 1, depth)
    if len(way):
      there = {name: x[way] for name, x in features.items()}
      course = {"slices": way, "run": np.ones((count, len(way))), "start": np.full(count, prompted),
                "depth": depth, "reverse": reverse}
      found = sweep(found | there | course)  # with the memories, and into them
      logits[:, way], presence[:, way] = found["logits"], found["presence"]
  return logits, presence


def check(
  name: str, platform: str | None = None, folder: str | Path = HERE, before: Arrays | None = None,
) -> tuple[dict[str, float], Arrays]:
  """Runs a program on the stored inputs.

  Args:
    before: outputs of the programs that stand before it, from which its inputs are taken where
      programs.json says so.

  Returns:
    Of every output the difference from the stored one (see `difference`), and all outputs.
  """
  folder = Path(folder)
  program, manifest = load(name, platform, folder), _manifest(folder)
  stored = read_tensors(_content(manifest, folder, manifest["check"]))
  found = program(check_inputs(name, program.about, stored, before or {}))
  differences = {}
  for output, x in found.items():
    differences[output] = difference(sample(x), stored[f"{name}/out/{output}"])
  return differences, found


def check_inputs(name: str, about: dict[str, Any], stored: Arrays, before: Arrays) -> Arrays:
  """Inputs of a check: stored and repeated to the full shape, of another program, or zeros."""
  inputs = {}
  for value in about["inputs"]:
    shape = [about["check"].get(x, x) for x in value["shape"]]
    if value["check"] == "stored":
      x = stored[f"{name}/in/{value['name']}"]
      for axis, size in enumerate(shape):
        x = np.repeat(x, size // x.shape[axis], axis)
    elif value["check"] == "zeros":
      x = jnp.zeros(shape, value["dtype"])
    else:
      x = before[value["name"]][: shape[0]]
    inputs[value["name"]] = x
  return inputs


def sample(x: Any, most: int = 2047) -> np.ndarray:
  """At most so many values of an array, spread evenly over it."""
  flat = np.asarray(x).reshape(-1)
  count = min(most, flat.size)
  return flat[np.arange(count) * flat.size // count]


def difference(found: np.ndarray, expected: np.ndarray) -> float:
  """Root mean square of the differences, relative to that of the expected values."""
  if found.shape != expected.shape:
    return float("inf")
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  size = np.sqrt(np.mean(expected**2))
  error = float(np.sqrt(np.mean((found - expected) ** 2)) / (size or 1.0))
  return error if np.isfinite(error) else float("inf")


def read_tensors(content: bytes) -> dict[str, np.ndarray]:
  """The tensors of a safetensors file: the length of a JSON header, the header, the values."""
  start = 8 + int.from_bytes(content[:8], "little")
  header = json.loads(content[8:start])
  tensors = {}
  for name, about in header.items():
    if name != "__metadata__":
      first, last = about["data_offsets"]
      values = np.frombuffer(content[start + first : start + last], jnp.dtype(
        _DTYPES[about["dtype"]]))
      tensors[name] = values.reshape(about["shape"])
  return tensors


def _manifest(folder: Path) -> dict[str, Any]:
  return json.loads((folder / "programs.json").read_text("utf-8"))


def _content(manifest: dict[str, Any], folder: Path, path: str) -> bytes:
  """A file of the model, by its path from the model's folder, if it is the listed one."""
  content = (folder.parent / path).read_bytes()
  if hashlib.sha256(content).hexdigest() != manifest["sha256"][path]:
    raise ValueError(f"{path}: does not have the SHA-256 of programs.json; unpack it again")
  return content


def main(arguments: list[str] | None = None, folder: Path = HERE) -> int:
  """The exit status: 1 where an output differs by more than its program allows."""
  parser = argparse.ArgumentParser(description="checks the programs of a model on this machine")
  parser.add_argument("--platform", help="cpu, cuda or tpu (what JAX uses here)")
  options = parser.parse_args(arguments)
  platform, wrong = options.platform or here(), 0
  before: Arrays = {}
  for name, about in _manifest(folder)["programs"].items():
    differences, found = check(name, platform, folder, before)
    before |= found
    most, limit = max(differences.items(), key=lambda x: x[1]), about["tolerance"][platform]
    said = "as expected" if most[1] <= limit else "WRONG"
    print(f"{name} on {platform}: {said}; {most[0]} differs most, {most[1]:.1e} (at most "
          f"{limit:.0e})", flush=True)
    wrong += most[1] > limit
  return 1 if wrong else 0


if __name__ == "__main__":
  try:
    sys.exit(main())
  except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
    print(f"run_programs.py: {str(error).splitlines()[0] if str(error) else repr(error)}",
          file=sys.stderr)
    sys.exit(2)
