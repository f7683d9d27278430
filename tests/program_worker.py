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
  for name in ("box", "point"):
    prompt = given[f"{name}_points"], given[f"{name}_labels"]
    results[f"{name}_logits"], results[f"{name}_presence"] = track(
      given["images"], *prompt, int(given["prompted"]))
  results["embedding"] = load("encoder")({"images": given["images"][:1]})["embedding"]
  results["voxel_logits"] = load("generator")({"patches": given["patches"]})["voxel_logits"]
  np.savez(out, **results)
  assert "rfmedsam2_jax" not in sys.modules


if __name__ == "__main__":
  main(*sys.argv[1:])
