"""A process that has what `pip install jax flatbuffers` brings: it runs exported programs.

Arguments: the folder `programs` of an unpacked model, an .npz of inputs, the .npz of results to
write. The loop is what docs/models.md shows.
"""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

import numpy as np


class Refused(MetaPathFinder):
  """Imports of what such a user lacks are mistakes."""

  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("rfmedsam2_jax", "flax", "safetensors", "optax", "orbax", "grain"):
      raise AssertionError(f"{name} is imported")


def tracked(load, images, points, labels, prompted):
  """Masks of one object that is prompted on one slice, as logits [D, 4G, 4G], and presence [D]."""
  encoder, begin, sweep = map(load, ("encoder", "begin", "sweep"))
  depth = len(images)
  features = encoder({"images": images})
  here = {name: x[prompted : prompted + 1] for name, x in features.items()}
  bank = {value["name"]: np.zeros([1, *value["shape"][1:]], np.float32)
          for value in begin.about["inputs"] if value["name"].startswith("bank/")}
  found = begin(bank | here | {"points": points, "labels": labels, "slice": [prompted],
                               "slot": [0]})
  logits = np.zeros((depth, *found["logits"].shape[1:]), np.float32)
  presence = np.zeros(depth, np.float32)
  logits[prompted], presence[prompted] = found["logits"][0], found["presence"][0]
  for reverse in (False, True):
    way = np.arange(prompted - 1, -1, -1) if reverse else np.arange(prompted + 1, depth)
    if len(way) == 0:
      continue
    found = sweep(found | {name: x[way] for name, x in features.items()} | {
      "slices": way, "run": np.ones((1, len(way)), bool), "start": [prompted], "depth": depth,
      "reverse": reverse})
    logits[way], presence[way] = found["logits"][0], found["presence"][0]
  return logits, presence


def main(folder, inputs, out):
  sys.meta_path.insert(0, Refused())
  sys.path.insert(0, folder)
  from run_programs import load

  given, results = np.load(inputs), {}
  for name in ("box", "point"):
    labels, points = given[f"{name}_labels"], given[f"{name}_points"]
    results[f"{name}_logits"], results[f"{name}_presence"] = tracked(
      load, given["images"], points, labels, int(given["prompted"]))
  results["embedding"] = load("encoder")({"images": given["images"][:1]})["embedding"]
  results["voxel_logits"] = load("generator")({"patches": given["patches"]})["voxel_logits"]
  np.savez(out, **results)
  assert "rfmedsam2_jax" not in sys.modules


if __name__ == "__main__":
  main(*map(str, map(Path, sys.argv[1:])))
