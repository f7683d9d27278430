"""How much of the hippocampus' Dice is lost at the cut between its two labels.

python benchmarks/accuracy/cut.py RUN

In the references of Task04_Hippocampus a coronal plane cuts anterior from posterior. Prints, for
the generator and every stage, means over RUN's validation cases: the Dice of the two labels, the
Dice of both as one, the Dice of the two where the predicted voxels are cut anew, by the label that
prevails in each of the prediction's own planes and by the reference's, and how many slices the
predicted cut lies beside the reference's.
"""

import argparse
from pathlib import Path

import numpy as np

from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.data.datasets import read_dataset
from rfmedsam2_jax.data.splits import load_split
from rfmedsam2_jax.evaluation.metrics import dice
from rfmedsam2_jax.model import load
from rfmedsam2_jax.training.validation import stage_maps

ANTERIOR, POSTERIOR = 1, 2
CORONAL = 1  # axis of the canonical orientation (data.volumes) along which rows run to the back


def sides(labels: np.ndarray) -> np.ndarray:
  """The label [rows] that prevails in each coronal plane; where none is, that of the nearest."""
  counts = [(labels == label).sum(axis=(0, 2)) for label in (ANTERIOR, POSTERIOR)]
  there = np.flatnonzero(sum(counts))
  nearest = [there[np.abs(there - row).argmin()] for row in range(labels.shape[CORONAL])]
  return np.where(counts[0] >= counts[1], ANTERIOR, POSTERIOR)[nearest]


def measures(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, ...]:
  """Dice of the labels, both as one, with its own cut and the true one; slices between these."""
  own, true = sides(predicted), sides(truth)
  cuts = [np.where(predicted > 0, side[None, :, None], 0) for side in (own, true)]
  plain, own_cut, true_cut = (
    float(np.mean([dice(guess == label, truth == label) for label in (ANTERIOR, POSTERIOR)]))
    for guess in (predicted, *cuts)
  )
  return plain, dice(predicted > 0, truth > 0), own_cut, true_cut, np.count_nonzero(own != true)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("run", type=Path)
  run = parser.parse_args().run
  config, segmenter = load_config(run / "config.yaml"), load(run)
  dataset = read_dataset(config.data.dataset, config.data.structures)
  held_out = load_split(run / "splits.json").validation
  found: list[list[tuple[float, ...]]] = []
  for case in dataset.cases:
    if case.identifier in held_out:
      _, truth, maps = stage_maps(segmenter, case)
      found.append([measures(labels, truth) for labels in maps])
  print("| | Dice | both as one | with its own cut | with the true cut | slices off |")
  print("|---|---|---|---|---|---|")
  for stage, (*scores, apart) in enumerate(np.mean(found, axis=0)):
    print(f"| stage {stage} | {' | '.join(f'{score:.4f}' for score in scores)} | {apart:.2f} |")


if __name__ == "__main__":
  main()
