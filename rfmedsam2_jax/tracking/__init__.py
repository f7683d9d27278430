"""Prompted segmentation of a volume: SAM 2's own recurrence over slices, both directions."""

from rfmedsam2_jax.tracking.image import encode_images, predict_masks
from rfmedsam2_jax.tracking.prompts import SlicePrompt, point_prompts
from rfmedsam2_jax.tracking.recurrence import Bias, Cells, Course, TrackInputs, sweep, track
from rfmedsam2_jax.tracking.tracker import Arrived, VolumeTracker
from rfmedsam2_jax.tracking.tracks import TrackingConfig, Tracks

__all__ = [
  "Arrived", "Bias", "Cells", "Course", "SlicePrompt", "TrackInputs", "TrackingConfig", "Tracks",
  "VolumeTracker", "encode_images", "point_prompts", "predict_masks", "sweep", "track",
]
