"""Segments a volume and saves what every stage said, and on how many devices it was computed.

python tests/parallel/spread_worker.py RUN VOLUME OUT.npz
"""

import sys

import jax
import numpy as np

from rfmedsam2_jax.data.volumes import load_image
from rfmedsam2_jax.model import load
from rfmedsam2_jax.refinement import cell_batches, stage_run
from rfmedsam2_jax.segmentation import segmenter

run, volume, out = sys.argv[1:]


def counted(function, name, used):
  def call(*arguments):
    result = function(*arguments)
    used[name] = len(jax.tree.leaves(result)[0].sharding.device_set)
    return result

  return call


used: dict[str, int] = {}
for module, name in (
  (cell_batches, "_encode"), (stage_run, "_remember"), (stage_run, "_run"),
  (segmenter, "_unet_forward"),
):
  setattr(module, name, counted(getattr(module, name), name, used))
found = segmenter.segment_volume(load(run), load_image(volume, 1))
arrays = {
  f"{name}{stage}": getattr(result, name)
  for stage, result in enumerate(found.results) for name in result._fields
}
np.savez(out, log_odds=found.generated.log_odds, used=np.array(sorted(used.values())), **arrays)
