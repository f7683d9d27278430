"""Refinement: prompts from masks, the stages over slices, and fusion to a label map."""

from rfmedsam2_jax.refinement.config import RefinementConfig, StageConfig
from rfmedsam2_jax.refinement.fusion import Fused, blended, fuse
from rfmedsam2_jax.refinement.prompts import VolumePrompts
from rfmedsam2_jax.refinement.refine import StageResult, refine_volume

__all__ = [
  "Fused", "RefinementConfig", "StageConfig", "StageResult", "VolumePrompts", "blended", "fuse",
  "refine_volume",
]
