"""Peak host memory of predicting a 512 x 512 x 300 CT with 15 classes.

python benchmarks/predict_memory.py [CT.nii.gz] [--depth 300] [--probabilities]

The volume is a CT tiled to that depth (without a file: noise about organ-like balls), the networks
are small and untrained; what is measured is what the arrays of a prediction take, beside the size
of one float32 array of all classes, which is never built. It does what `predict` does: all label
maps, the details, and with --probabilities a file per structure.
"""

import argparse
import dataclasses
import resource
import tempfile
import time
from pathlib import Path

import jax
import nibabel as nib
import numpy as np

from rfmedsam2_jax.config.training import GeneratorConfig
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.plan import ChannelRule, Plan
from rfmedsam2_jax.data.probabilities import write_probability
from rfmedsam2_jax.data.volumes import Geometry, Volume, load_image
from rfmedsam2_jax.model import generator_network
from rfmedsam2_jax.nn import PRESETS, SAM2, init_params
from rfmedsam2_jax.refinement import RefinementConfig
from rfmedsam2_jax.segmentation.config import InferenceConfig
from rfmedsam2_jax.segmentation.details import details_of
from rfmedsam2_jax.segmentation.segmenter import Segmenter, segment_volume

ORGANS = 14  # 15 classes with background


def peak() -> float:
  """GiB, the most that this process ever held."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def tiled_volume(path: Path | None, depth: int) -> Volume:
  if path is not None:
    volume = load_image(path)
    slices = volume.array.shape[1]
    array = np.tile(volume.array, (1, -(-depth // slices), 1, 1))[:, :depth]
    return Volume(array, volume.spacing, geometry_of(array, volume.spacing))
  rng = np.random.default_rng(0)
  array = rng.normal(0, 20, (1, depth, 512, 512)).astype(np.float32)
  z, y, x = np.ogrid[:depth, :512, :512]
  for _ in range(ORGANS):
    centre = rng.uniform(0.2, 0.8, 3) * (depth, 512, 512)
    distance = np.sqrt(4 * (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2)
    array[0][distance < 60] += 100
  spacing = (2.0, 0.977, 0.977)
  return Volume(array, spacing, geometry_of(array, spacing))


def geometry_of(array: np.ndarray, spacing: tuple[float, float, float]) -> Geometry:
  """Of a file whose axes are (z, y, x)."""
  affine = np.diag([*spacing, 1.0])[[2, 1, 0, 3]]
  header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine).header
  depth, height, width = array.shape[1:]
  shape = depth, height, width
  return Geometry(Path("ct"), header, affine, shape, (0, 1, 2), (False, False, False))


def small_segmenter(volume: Volume) -> Segmenter:
  structures = tuple(Structure(f"organ{k}", (k + 1,)) for k in range(ORGANS))
  labels = Labels(structures, False, tuple(range(1, ORGANS + 1)))
  a, b, c = volume.spacing
  plan = Plan(
    "memory", 0, (a, b, c), (300, 512, 512), (ChannelRule("CT", "ct", -200, 300, 50, 100),),
    (32, 128, 128), ((1, 1, 1), (2, 2, 2)), ((3, 3, 3), (3, 3, 3)), labels,
  )
  unet = generator_network(GeneratorConfig(features=(8, 16), convs_per_stage=1), plan)
  generator = unet.init(jax.random.key(0), np.zeros((1, 4, 8, 8, 1), np.float32))["params"]
  # Untrained logits are nearly equal; apart from each other, every class wins somewhere.
  decoder = generator["decoder"]
  decoder["seg_layers_0"] = jax.tree.map(lambda x: 50 * x, decoder["seg_layers_0"])
  sam2 = dataclasses.replace(PRESETS["nano"], image_size=128)
  return Segmenter(
    plan, unet, generator, SAM2(sam2), init_params(sam2, jax.random.key(1)),
    RefinementConfig(), InferenceConfig(overlap=0.25),
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("ct", nargs="?", type=Path)
  parser.add_argument("--depth", type=int, default=300)
  parser.add_argument("--probabilities", action="store_true")
  options = parser.parse_args()
  volume = tiled_volume(options.ct, options.depth)
  shape = volume.array.shape[1:]
  segmenter = small_segmenter(volume)
  before = peak()
  began = time.monotonic()
  found = segment_volume(segmenter, volume, progress=lambda line: print(line, flush=True))
  segmented = peak()
  with tempfile.TemporaryDirectory() as folder:

    def keep(organ: int, probability: np.ndarray) -> None:
      if options.probabilities:
        write_probability(Path(folder) / f"{organ}.nii.gz", probability, volume.geometry)

    details = details_of([found], volume, keep)
    written = sum(file.stat().st_size for file in Path(folder).iterdir()) / 2**20
  classes = ORGANS + 1
  whole = np.prod(shape) * classes * 4 / 2**30
  print(f"volume {' x '.join(map(str, shape))}, {classes} classes, "
        f"{len(np.unique(details.labels)) - 1} organs found, {time.monotonic() - began:.0f} s, "
        f"{written:.0f} MiB of probabilities")
  print(f"peak {peak():.2f} GiB (before the prediction {before:.2f}, before its label maps and "
        f"details {segmented:.2f}); "
        f"one float32 array of all classes alone would take {whole:.2f} GiB")


if __name__ == "__main__":
  main()
