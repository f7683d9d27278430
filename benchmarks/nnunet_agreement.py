"""nnU-Net's own label maps beside those of its converted network, on cases that it never saw.

.venv-nnunet/bin/python benchmarks/accuracy/nnunet.py DATASET --splits splits.json --minutes 3
    --epochs 2 --work runs/nnunet
rfmedsam2 convert nnunet runs/nnunet/results/Dataset004_Benchmark/Trainer__nnUNetPlans__3d_fullres
    ckpt/nnunet --fold all --like DATASET/imagesTr/CASE.nii.gz
python benchmarks/nnunet_agreement.py ckpt/nnunet DATASET runs/nnunet/predictions
    --trained runs/nnunet/results/Dataset004_Benchmark/Trainer__nnUNetPlans__3d_fullres/fold_all

With `--planner nnUNetPlannerResEncM` the first command trains the residual encoder that nnU-Net
recommends. Both mirror and use windows of half a patch. Prints, for every case and in all, the
share of equal voxels and the Dice of the two label maps per structure; with `--trained` also the
largest difference of logits to nnU-Net's class with the same weights, in the middle of each case.
"""

import argparse
import pydoc
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.data.datasets import read_case, read_dataset
from rfmedsam2_jax.data.fingerprint import make_fingerprint
from rfmedsam2_jax.data.plan import make_plan
from rfmedsam2_jax.data.volumes import load_label_map
from rfmedsam2_jax.model import generator_network
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.nn.initialisation import init_generator
from rfmedsam2_jax.segmentation.segmenter import Segmenter, label_map, segment_volume
from rfmedsam2_jax.weights.orbax import load_params


def official_logits(file: Path) -> Callable[[np.ndarray], np.ndarray]:
  """nnU-Net's network: a patch [C, D, H, W] to logits [D, H, W, outputs], by label value."""
  import torch

  stored = torch.load(file, weights_only=False, map_location="cpu")
  init = stored["init_args"]
  told = init["plans"]["configurations"][init["configuration"]]["architecture"]
  kwargs = {key: pydoc.locate(value) if key in told["_kw_requires_import"] and value else value
            for key, value in told["arch_kwargs"].items()}
  network = pydoc.locate(told["network_class_name"])(
    len(init["dataset_json"]["channel_names"]), num_classes=len(init["dataset_json"]["labels"]),
    **kwargs)
  network.load_state_dict(stored["network_weights"])

  def run(patch: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
      return np.moveaxis(network.eval()(torch.tensor(patch.copy())[None])[0].numpy(), 0, -1)
  return run


def middle(image: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
  """The patch in the middle of [C, D, H, W], with zeros where the volume ends."""
  starts = [max((n - m) // 2, 0) for n, m in zip(image.shape[1:], size, strict=True)]
  part = image[:, *(slice(a, a + m) for a, m in zip(starts, size, strict=True))]
  return np.pad(part, [(0, 0), *((0, m - n) for n, m in zip(part.shape[1:], size, strict=True))])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("checkpoint", type=Path, help="made by rfmedsam2 convert nnunet")
  parser.add_argument("dataset", type=Path)
  parser.add_argument("predictions", type=Path, help="nnU-Net's label maps of cases of DATASET")
  parser.add_argument("--trained", type=Path, help="nnU-Net's folder of the fold")
  options = parser.parse_args()
  official = options.trained and official_logits(options.trained / "checkpoint_final.pth")
  config = load_config(options.checkpoint / "config.yaml")
  dataset = read_dataset(options.dataset)
  named = {file.name.removesuffix(".nii.gz"): file for file in options.predictions.glob("*.nii.gz")}
  cases = [case for case in dataset.cases if case.identifier in named]
  plan = make_plan(make_fingerprint(dataset, cases), config.plan)  # its rules are all given
  unet = generator_network(config.generator, plan)
  shapes = jax.eval_shape(
    lambda key: init_generator(unet, len(plan.channels), key), jax.random.key(0))
  segmenter = Segmenter(
    plan, unet, load_params(options.checkpoint, shapes), SAM2(config.sam2), None,
    config.refinement, config.inference)
  run = jax.jit(lambda params, x: unet.apply({"params": params}, x))
  values = dict(zip(plan.labels.names, plan.labels.output_values, strict=True))
  equal, total = 0, 0
  both = {name: np.zeros(2) for name in values}
  for case in cases:
    volume, _ = read_case(case, len(dataset.channels), dataset.labels)
    found = segment_volume(segmenter, volume)
    if official:
      patch = middle(found.prepared.image, plan.patch_size)
      x = np.flip(patch, [1 + axis for axis in unet.config.mirrored])
      logits = np.flip(official(x), unet.config.mirrored)
      mine = np.asarray(run(segmenter.generator, np.moveaxis(patch, 0, -1)[None])[0])
      print(f"{case.identifier}: logits differ by {np.abs(mine - logits).max():.2g} of "
            f"{np.abs(logits).max():.3g}")
    ours = label_map([found], 0)
    theirs = load_label_map(named[case.identifier], volume.geometry)
    equal, total = equal + int((ours == theirs).sum()), total + ours.size
    for name, value in values.items():
      a, b = ours == value, theirs == value
      both[name] += 2 * int((a & b).sum()), int(a.sum()) + int(b.sum())
    print(f"{case.identifier}: {100 * float((ours == theirs).mean()):.3f} % of voxels equal, "
          f"{int((ours != theirs).sum())} differ")
  dice = ", ".join(
    f"{name} {pair[0] / pair[1]:.4f}" if pair[1] else f"{name} in neither"
    for name, pair in both.items())
  print(f"{len(cases)} cases: {100 * equal / total:.4f} % of voxels equal; Dice of the two: {dice}")


if __name__ == "__main__":
  main()
