"""Data: volumes in and out, data sets, plan, preprocessing, augmentation, batches."""

from rfmedsam2_jax.data.datasets import (
  IGNORED,
  Case,
  Dataset,
  Labels,
  Structure,
  find_inputs,
  read_case,
  read_dataset,
  with_labels,
)
from rfmedsam2_jax.data.fingerprint import Fingerprint, make_fingerprint
from rfmedsam2_jax.data.plan import Plan, PlanConfig, load_plan, make_plan, save_plan
from rfmedsam2_jax.data.preprocessing import (
  Prepared,
  PreparedCase,
  Restore,
  load_case,
  prepare_atoms,
  prepare_label,
  preprocess,
  save_case,
  stored_cases,
)
from rfmedsam2_jax.data.splits import Split, SplitConfig, load_split, make_split, save_split
from rfmedsam2_jax.data.volumes import (
  Geometry,
  Volume,
  load_image,
  load_label_map,
  write_label_map,
)

__all__ = [
  "IGNORED",
  "Case",
  "Dataset",
  "Fingerprint",
  "Geometry",
  "Labels",
  "Plan",
  "PlanConfig",
  "Prepared",
  "PreparedCase",
  "Restore",
  "Split",
  "SplitConfig",
  "Structure",
  "Volume",
  "find_inputs",
  "load_case",
  "load_image",
  "load_label_map",
  "load_plan",
  "load_split",
  "make_fingerprint",
  "make_plan",
  "make_split",
  "prepare_atoms",
  "prepare_label",
  "preprocess",
  "read_case",
  "read_dataset",
  "save_case",
  "save_plan",
  "save_split",
  "stored_cases",
  "with_labels",
  "write_label_map",
]
