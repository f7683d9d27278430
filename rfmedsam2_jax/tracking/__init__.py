"""Prompted segmentation of a volume: SAM 2's own recurrence over slices, both directions."""

from rfmedsam2_jax.tracking.features import TrackingConfig
from rfmedsam2_jax.tracking.prompts import SlicePrompt, point_prompts
from rfmedsam2_jax.tracking.recurrence import (
  Bias,
  Cells,
  TrackInputs,
  decode_cells,
  sweep,
  track,
)
from rfmedsam2_jax.tracking.tracker import Arrived, Batch, Tracks, VolumeTracker

__all__ = [
  "Arrived",
  "Batch",
  "Bias",
  "Cells",
  "SlicePrompt",
  "TrackInputs",
  "TrackingConfig",
  "Tracks",
  "VolumeTracker",
  "decode_cells",
  "point_prompts",
  "sweep",
  "track",
]
