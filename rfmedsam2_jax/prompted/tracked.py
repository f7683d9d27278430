"""Prompted tracking of a volume: a person's prompts in, a label map out.

Slices are cut along one anatomical plane of the volume as it is (no resampling), windowed, squashed
to SAM 2's square and followed by tracking; masks come back at their own resolution.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from rfmedsam2_jax.base.constants import IMAGE_MEAN, IMAGE_STD
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.plan import PLANES
from rfmedsam2_jax.data.resampling import apply_separable, linear_matrix
from rfmedsam2_jax.data.sam_slices import as_rgb, resize_linear
from rfmedsam2_jax.data.volumes import LARGEST, Volume
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.prompted.slice_frame import Plane, SliceFrame, VoxelPrompt
from rfmedsam2_jax.tracking import Arrived, TrackingConfig, Tracks, VolumeTracker
from rfmedsam2_jax.tracking.recurrence import gated_logits
from rfmedsam2_jax.tracking.tracks import HostCells, cells_at

# Centre and width in Hounsfield units, as radiologists set them.
WINDOWS = {
  "soft-tissue": (40.0, 400.0), "liver": (60.0, 200.0), "lung": (-600.0, 1500.0),
  "bone": (400.0, 1800.0), "brain": (40.0, 80.0),
}
DEFAULTS = TrackingConfig()
ShowSlice = Callable[[int, np.ndarray], None] | None
PERCENTILES = (0.5, 99.5)  # of the voxels that are not 0, where no window is given


@dataclasses.dataclass(frozen=True, eq=False)
class TrackedVolume:
  """A volume whose structures were followed.

  Attributes:
    structures: label value of each track, in the order in which they began.
    tracks: logits, scores and pointers; what a correction starts from.
  """

  labels: np.ndarray  # uint8 or uint16 [D, H, W], canonical
  structures: tuple[int, ...]
  slice_axis: int  # of `labels`, along which the slices were cut
  window: tuple[float, float]  # intensities that were shown as 0 and 1
  tracks: Tracks

  @property
  def presence(self) -> np.ndarray:
    """Probability that a structure is on a slice, float32 [N, slices]."""
    return expit(self.tracks.cells.presence)

  @property
  def iou(self) -> np.ndarray:
    """Predicted IoU of every mask, float32 [N, slices]."""
    return self.tracks.cells.iou


class PromptedVolume:
  """A volume, cut into slices and ready to be prompted.

  Args:
    window: centre and width of the intensities that SAM sees; None takes `PERCENTILES`.
    progress: called with (slices done, slices in all).
  """

  def __init__(
    self, model: SAM2, params: dict[str, Any], volume: Volume, config: TrackingConfig = DEFAULTS,
    plane: Plane = "axial", window: tuple[float, float] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
  ):
    self._side, self._axis = model.config.image_size, PLANES[plane]
    self._frame = SliceFrame(volume, plane, self._side)
    self._slices = np.moveaxis(volume.array[0], self._axis, 0)
    self._matrices = [linear_matrix(self._side // 4, size) for size in self._slices.shape[1:]]
    self._low, self._high = _intensity_range(volume.array[0], window)
    depth = len(self._slices)
    self._tracker = VolumeTracker(model, params, config, self._sam_slices, depth, progress)

  def shown(self, numbers: np.ndarray) -> np.ndarray:
    """Slices [n] at their own resolution, windowed: float32 [n, H, W] in [0, 1]."""
    chosen = self._slices[numbers].astype(np.float32)
    return np.clip((chosen - self._low) / (self._high - self._low), 0, 1)

  def _sam_slices(self, numbers: np.ndarray) -> np.ndarray:
    """Slices [n] as SAM 2 sees them: float32 [n, S, S, 3], normalised."""
    rgb = as_rgb(resize_linear(self.shown(numbers), self._side)[None])
    return (rgb - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)

  def check(self, prompts: Sequence[VoxelPrompt]) -> None:
    """Raises what `track` would, at once."""
    self._frame.rounds(prompts)

  def track(self, prompts: Sequence[VoxelPrompt], arrived: ShowSlice = None) -> TrackedVolume:
    """Follows every structure from its prompts, round after round.

    Args:
      arrived: called with the number of a slice and its labels [H, W], as soon as they are known
        and whenever they change.

    Raises:
      UserError: as `SliceFrame.rounds`.
    """
    structures, given = self._frame.rounds(prompts)
    show = self._shower(structures, arrived)
    tracks = self._tracker.track(given[0], show)
    for prompts_of_round in given[1:]:
      tracks = self._tracker.correct(tracks, prompts_of_round, show)
    return self._result(tracks, structures)

  def correct(
    self, result: TrackedVolume, prompts: Sequence[VoxelPrompt], arrived: ShowSlice = None
  ) -> TrackedVolume:
    """Adds prompts on any slices to a result; the images are not encoded again if cached.

    What `track` gives of all prompts with these in a round of their own. Structures may be new;
    those without a prompt here are, as a rule, not followed again (`VolumeTracker.correct`).
    """
    new = sorted({p.label for p in prompts} - set(result.structures))
    structures = (*result.structures, *new)
    given = self._frame.place(prompts, structures)
    tracks = self._tracker.correct(result.tracks, given, self._shower(structures, arrived))
    return self._result(tracks, structures)

  def _shower(self, structures: tuple[int, ...], show: ShowSlice) -> Arrived:
    """What a tracker calls, so that `show` is called with labels."""
    def arrived(cells: HostCells, slices: np.ndarray) -> None:
      if show is not None:
        for z in slices.tolist():
          show(z, self._fused(cells, z, structures))

    return arrived

  def _result(self, tracks: Tracks, structures: tuple[int, ...]) -> TrackedVolume:
    """Fuses the masks slice by slice, so that no volume of logits is made."""
    labels = np.stack([self._fused(tracks.cells, z, structures) for z in range(len(self._slices))])
    labels = np.ascontiguousarray(np.moveaxis(labels, 0, self._axis))
    window = float(self._low), float(self._high)
    return TrackedVolume(labels, structures, self._axis, window, tracks)

  def _fused(self, cells: HostCells, z: int, structures: tuple[int, ...]) -> np.ndarray:
    """Labels [H, W] of a slice: the largest logit decides. The last structures may be missing."""
    values = np.array(structures, np.min_scalar_type(max(structures)))
    present = np.flatnonzero(cells.presence[:, z] > 0)
    if not len(present):
      return np.zeros(self._slices.shape[1:], values.dtype)
    here = cells_at(cells, present, z)
    logits = np.asarray(gated_logits(here.logits, here.presence), np.float32)
    logits = apply_separable(logits, [None, *self._matrices])
    return np.where(logits.max(axis=0) > 0, values[present][logits.argmax(axis=0)], 0)


def _intensity_range(
  array: np.ndarray, window: tuple[float, float] | None
) -> tuple[np.float32, np.float32]:
  """Intensities that become 0 and 1: of a window (centre, width), or percentiles of the volume."""
  if window is not None:
    low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
  else:
    known = array[array != 0]
    low, high = np.percentile(known if known.size else array, PERCENTILES)
  least = np.float32(low)
  # What float32 does not tell apart from the least would be divided by 0.
  return least, max(np.float32(max(high, low + 1e-6)), np.nextafter(least, np.float32(np.inf)))


def parse_window(text: str) -> tuple[float, float] | None:
  """A name of WINDOWS, "centre,width", or "percentiles" (None)."""
  if text == "percentiles" or text in WINDOWS:
    return WINDOWS.get(text)
  try:
    centre, width = (float(part) for part in text.split(","))
  except ValueError:
    centre, width = 0.0, -1.0
  if not (abs(centre) < LARGEST and 0 < width < LARGEST):
    raise UserError(f"window {text}: is none of {', '.join(WINDOWS)}, percentiles or CENTRE,WIDTH")
  return centre, width
