"""A process that has what `pip install jax flatbuffers` brings: it runs exported programs.

Arguments: the folder `programs` of an unpacked model, an .npz of inputs, the .npz of results to
write.
"""

import sys
from importlib.abc import MetaPathFinder

import numpy as np


class Refused(MetaPathFinder):
  """Imports of what such a user lacks are mistakes."""

  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("rfmedsam2_jax", "flax", "safetensors", "optax", "orbax", "grain"):
      raise AssertionError(f"{name} is imported")


def main(folder, inputs, out):
  sys.meta_path.insert(0, Refused())
  sys.path.insert(0, folder)
  from run_programs import load, track

  given, results = np.load(inputs), {}
  images, (first, second) = given["images"], given["slices"]
  points, labels = given["points"], given["labels"]
  results["logits"], results["presence"] = track(images, points, labels, first)
  # The second slice prompted, too, each object as the other was on the first one.
  encoder, begin, sweep = map(load, ("encoder", "begin", "sweep"))
  features, found = encoder({"images": images}), {}
  for slot, z in enumerate((first, second)):
    here = {name: np.repeat(x[z : z + 1], 2, 0) for name, x in features.items()}
    turn = slice(None, None, -1 if slot else 1)
    empty = {x["name"]: np.zeros([2, *x["shape"][1:]]) for x in begin.about["inputs"]
             if x["name"].startswith("bank/")}
    found = begin(empty | found | here | {
      "points": points[turn], "labels": labels[turn], "slice": [z, z], "slot": [slot, slot]})
  way = np.arange(first + 1, len(images))
  found = sweep(found | {name: x[way] for name, x in features.items()} | {
    "slices": way, "run": np.tile(way != second, (2, 1)), "start": [first, first],
    "depth": len(images), "reverse": False})
  results["two_slices"] = np.asarray(found["logits"])[:, way != second]
  results["embedding"] = encoder({"images": images[:1]})["embedding"]
  results["voxel_logits"] = load("generator")({"patches": given["patches"]})["voxel_logits"]
  np.savez(out, **results)
  assert "rfmedsam2_jax" not in sys.modules


if __name__ == "__main__":
  main(*sys.argv[1:])
