"""Fully automatic segmentation of CT and MRI volumes with SAM 2, in JAX and Flax.

    model = rfmedsam2_jax.load("runs/hippocampus")          # a run made by `rfmedsam2 train`
    rfmedsam2_jax.segment_file(model, "scan.nii.gz", "labels.nii.gz")

    prompted = rfmedsam2_jax.open_volume(image="ct.nii.gz")   # SAM 2 and a person's prompts
    found = prompted.track([rfmedsam2_jax.VoxelPrompt(1, box=((60, 80, 90), (60, 140, 170)))])

    params = rfmedsam2_jax.init(rfmedsam2_jax.PRESETS["nano"], jax.random.key(0))
    features = rfmedsam2_jax.apply(config, params, images, method="encode_image")
"""

TYPE_CHECKING = False  # that of `typing`, which takes its time

if TYPE_CHECKING:
  from rfmedsam2_jax.base.errors import UserError
  from rfmedsam2_jax.model import load
  from rfmedsam2_jax.nn import PRESETS, SAM2, SAM2Config, apply, init
  from rfmedsam2_jax.prompted.files import open_volume, write_tracked
  from rfmedsam2_jax.prompted.slice_frame import VoxelPrompt
  from rfmedsam2_jax.segmentation.predict import predict, segment, segment_details, segment_file
  from rfmedsam2_jax.tracking import TrackingConfig

_HOMES = {name: home for home, names in (
  ("base.errors", "UserError"), ("model", "load"), ("nn", "PRESETS SAM2 SAM2Config apply init"),
  ("prompted.files", "open_volume write_tracked"), ("prompted.slice_frame", "VoxelPrompt"),
  ("segmentation.predict", "predict segment segment_details segment_file"),
  ("tracking", "TrackingConfig")) for name in names.split()}
__all__ = [
  "PRESETS", "SAM2", "SAM2Config", "TrackingConfig", "UserError", "VoxelPrompt", "apply", "init",
  "load", "open_volume", "predict", "segment", "segment_details", "segment_file", "write_tracked",
]


def __getattr__(name: str):
  # Imported when first used, so that the command line answers --help at once.
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  import importlib
  return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
