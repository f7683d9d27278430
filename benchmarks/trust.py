"""What a prediction says of itself, and what is true: the figures behind docs/trust.md.

python benchmarks/trust.py RUN [DATASET] [--cases 16]

Labelled cases that the run was not trained on (without a data set: fresh phantoms) are segmented
as they are and degraded: coarser voxels, noise, other intensities, a smaller field of view. Printed
are, per degradation, mean Dice, cases with a warning of each kind, and Dice of the structures whose
stages disagree and of all others; then, of the cases as they are, how often a probability is right.
"""

import argparse
import collections
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from rfmedsam2_jax.data.datasets import read_case, read_dataset
from rfmedsam2_jax.data.phantom import PhantomConfig, write_phantom
from rfmedsam2_jax.data.resampling import antialiased_matrix, apply_separable, nearest_matrix
from rfmedsam2_jax.data.splits import load_split
from rfmedsam2_jax.data.volumes import Geometry, Volume
from rfmedsam2_jax.evaluation.metrics import dice
from rfmedsam2_jax.model import load
from rfmedsam2_jax.segmentation.details import Details, details_of
from rfmedsam2_jax.segmentation.segmenter import Segmenter, segment_volume

KINDS = ("spacing", "extent", "intensities", "stages")
BINS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0001)
Change = Callable[[Volume, np.ndarray], tuple[Volume, np.ndarray]]


def on_grid(volume: Volume, array: np.ndarray, factors: tuple[float, float, float]) -> Volume:
  """`array` [C, D, H, W] where a volume is, with voxels that are `factors` times as large."""
  old = volume.geometry
  scale = np.ones(4)
  scale[list(old.axes)] = factors
  shape = np.empty(3, int)
  shape[list(old.axes)] = array.shape[1:]
  i, j, k = (int(n) for n in shape)
  affine = old.affine @ np.diag(scale)
  geometry = Geometry(old.path, old.header, affine, (i, j, k), old.axes, old.flipped)
  return Volume(array, geometry.spacing, geometry)


def coarser(z: float, y: float, x: float) -> Change:
  def change(volume: Volume, truth: np.ndarray) -> tuple[Volume, np.ndarray]:
    shape = truth.shape
    new = [max(1, round(n / f)) for n, f in zip(shape, (z, y, x), strict=True)]
    images, masks = (
      [matrix(n, m) for n, m in zip(shape, new, strict=True)]
      for matrix in (antialiased_matrix, nearest_matrix)
    )
    a, b, c = (n / m for n, m in zip(shape, new, strict=True))
    return (
      on_grid(volume, apply_separable(volume.array, images), (a, b, c)),
      apply_separable(truth.astype(np.float32), masks).astype(truth.dtype),
    )

  return change


def cropped(factor: float) -> Change:
  def change(volume: Volume, truth: np.ndarray) -> tuple[Volume, np.ndarray]:
    kept = round(len(truth) / factor)
    first = (len(truth) - kept) // 2
    part = np.ascontiguousarray(volume.array[:, first : first + kept])
    return on_grid(volume, part, (1, 1, 1)), truth[first : first + kept]

  return change


def intensities(of: Callable[[np.ndarray], np.ndarray]) -> Change:
  return lambda volume, truth: (
    dataclasses.replace(volume, array=of(volume.array).astype(np.float32)), truth
  )


def noise(share: float) -> Change:
  """Normal noise, in shares of the image's standard deviation."""
  rng = np.random.default_rng(0)
  return intensities(lambda x: x + rng.normal(0, share * x.std(), x.shape))


def gamma(power: float) -> Change:
  return intensities(lambda x: ((x - x.min()) / np.ptp(x)) ** power)


def changes(ct: bool) -> dict[str, Change]:
  found: dict[str, Change] = {"as they are": lambda volume, truth: (volume, truth)}
  found |= {f"slices {f} times as thick": coarser(f, 1, 1) for f in (1.25, 1.5, 2, 3)}
  found |= {f"voxels {f} times as large": coarser(f, f, f) for f in (1.25, 1.5, 2, 3)}
  found |= {f"1/{f} of the height": cropped(f) for f in (1.2, 1.5, 2)}
  found |= {f"noise, {s} of its std": noise(s) for s in (0.125, 0.25, 0.5)}
  if ct:
    shifts = (25, 50, 100, 200, 1024)
    return found | {f"{s} HU added": intensities(lambda x, s=s: x + s) for s in shifts}
  found |= {f"gamma {p}": gamma(p) for p in (0.5, 2)}
  return found | {"inverted": intensities(lambda x: x.max() - x)}


def truths(details: Details, atoms: np.ndarray, model: Segmenter) -> Iterator[tuple]:
  """Name, predicted mask and true mask of every structure."""
  for organ, (name, found) in enumerate(details.structures.items()):
    member = np.flatnonzero(model.plan.labels.membership[:, organ])
    yield name, details.maps[-1] == found.label, np.isin(atoms, member)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("run", type=Path)
  parser.add_argument("dataset", nargs="?", type=Path)
  parser.add_argument("--cases", type=int, default=16)
  options = parser.parse_args()
  model = load(options.run)
  with tempfile.TemporaryDirectory() as folder:
    if options.dataset is None:
      write_phantom(Path(folder) / "p", PhantomConfig(cases=options.cases, test_cases=0, seed=77))
    dataset = read_dataset(options.dataset or Path(folder) / "p")
    trained = load_split(options.run / "splits.json").train if options.dataset else ()
    cases = [case for case in dataset.cases if case.identifier not in trained][: options.cases]
    study(model, [read_case(c, len(dataset.channels), model.plan.labels) for c in cases])


def study(model: Segmenter, cases: list[tuple]) -> None:
  limit = model.inference.warnings.stage_dice
  right, bins = np.zeros((2, len(BINS) - 1)), np.array(BINS)
  print(f"{'':24} Dice  {'  '.join(KINDS)}   structures below {limit}: n, Dice; others: n, Dice")
  for name, change in changes(model.plan.channels[0].kind == "ct").items():
    warned: collections.Counter[str] = collections.Counter()
    groups: dict[bool, list[float]] = {True: [], False: []}
    for case in cases:
      volume, atoms = change(*case)
      found = details_of([segment_volume(model, volume)], volume)
      warned.update({notice.kind for notice in found.warnings})
      for structure, guess, truth in truths(found, atoms, model):
        stages = [s.dice_with_last for s in found.structures[structure].stages]
        disagree = any(d is not None and d < limit for d in stages)
        groups[disagree].append(dice(guess, truth))
        if name == "as they are":
          probability = found.geometry.to_canonical(found.probability(structure))
          bin_ = np.digitize(probability.ravel(), bins)
          for row, chosen in enumerate((bin_, bin_[truth.ravel()])):
            right[row] += np.bincount(chosen, minlength=len(BINS) + 1)[1:-1]
    counts = "  ".join(f"{warned[kind]:{len(kind)}d}" for kind in KINDS)
    both = "; ".join(f"{len(g):4d} {np.nanmean(g) if g else float('nan'):.2f}"
                     for g in groups.values())
    mean = np.nanmean(groups[True] + groups[False])
    print(f"{name:24} {mean:.3f} {counts}   {both}", flush=True)
  print("probability: share of voxels that belong to the structure")
  for low, high, of, true in zip(BINS[:-1], BINS[1:], *right, strict=True):
    print(f"  {low:.2f} to {high:.2f}: {true / max(of, 1):.3f} of {of:.0f}")


if __name__ == "__main__":
  main()
