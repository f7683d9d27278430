"""The benchmark of the training step compares like with like."""

import dataclasses
import sys
from pathlib import Path

import pytest
from small_sam2 import SMALL

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from training_step import Case, count_flop, measure_official, measure_ours


@pytest.mark.full
def test_both_sides_take_the_same_step():
  torch_sam2 = pytest.importorskip("torch_sam2")
  config = dataclasses.replace(torch_sam2.TINY, memory_layers=1, fuser_layers=1)
  case = Case(config, slices=3, structures=2, trainable="all", repeats=1)
  ours, official = measure_ours(case), measure_official(case)
  assert ours["loss"] == pytest.approx(official["loss"], rel=1e-5)
  assert ours["norm"] == pytest.approx(official["norm"], rel=1e-4)
  assert min(ours["seconds"], official["seconds"], ours["compile"]) > 0


@pytest.mark.slow
def test_arithmetic_is_counted_without_a_backward_pass_of_what_is_frozen():
  case = Case(SMALL, slices=2, structures=1, trainable="all", repeats=1)
  heads = dataclasses.replace(case, trainable="heads")
  everything, of_heads = count_flop(case)["flop"], count_flop(heads)["flop"]
  assert 0.3 * everything < of_heads < everything
