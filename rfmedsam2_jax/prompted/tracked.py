"""Prompted tracking of a volume: a person's prompts in, a label map out.

Slices of one anatomical plane of the volume as it is (no resampling), windowed and squashed to SAM
2's square, whole or in a cut around each structure, are followed by tracking; masks come back at
their own resolution.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

from rfmedsam2_jax.base.constants import IMAGE_MEAN, IMAGE_STD
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.cuts import Cut, around, check_zoom, whole
from rfmedsam2_jax.data.plan import PLANES
from rfmedsam2_jax.data.resampling import apply_separable, linear_matrix
from rfmedsam2_jax.data.sam_slices import as_rgb, resize_linear
from rfmedsam2_jax.data.volumes import LARGEST, Volume
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.prompted.first_cut import first_cut
from rfmedsam2_jax.prompted.slice_frame import Plane, SliceFrame, VoxelPrompt
from rfmedsam2_jax.tracking import TrackingConfig, Tracks, VolumeTracker
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
ZOOM = 2.0  # of networks that were trained on cuts
VIEWS = 8  # cuts whose slices stay encoded


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """Structures that are followed together, in one cut of the slices.

  members: which of the volume's structures. tracks: one for each of them; what a correction starts
  from. given: their prompts, round after round.
  """

  members: tuple[int, ...]
  cut: Cut
  tracks: Tracks
  given: tuple[tuple[VoxelPrompt, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class TrackedVolume:
  """A volume whose structures were followed.

  Attributes:
    structures: label value of each, in the order in which they began.
    parts: logits, scores and pointers: all structures in one, or each in a cut of its own.
  """

  labels: np.ndarray  # uint8 or uint16 [D, H, W], canonical
  structures: tuple[int, ...]
  slice_axis: int  # of `labels`, along which the slices were cut
  window: tuple[float, float]  # intensities that were shown as 0 and 1
  parts: tuple[Part, ...]

  @property
  def presence(self) -> np.ndarray:
    """Probability that a structure is on a slice, float32 [N, slices]."""
    return expit(self._of_cells("presence"))

  @property
  def iou(self) -> np.ndarray:
    """Predicted IoU of every mask, float32 [N, slices]."""
    return self._of_cells("iou")

  @property
  def prompted(self) -> set[tuple[int, int]]:
    """(structure, slice) pairs that a person prompted; structures by their place."""
    return {(part.members[track], z) for part in self.parts for track, z in part.tracks.prompted}

  def _of_cells(self, name: str) -> np.ndarray:
    found = np.concatenate([getattr(part.tracks.cells, name) for part in self.parts])
    return found[np.argsort([member for part in self.parts for member in part.members])]


class _View(NamedTuple):
  """A cut of all slices: where prompts lie in it, what follows them, and masks back to voxels."""

  frame: SliceFrame
  tracker: VolumeTracker
  matrices: list[np.ndarray]  # rows, columns

  def logits(self, cells: HostCells) -> np.ndarray:
    """Mask logits of cells [n], gated by presence: float32 [n, height, width]."""
    logits = np.asarray(gated_logits(cells.logits, cells.presence), np.float32)
    return apply_separable(logits, [None, *self.matrices])


class PromptedVolume:
  """A volume, cut into slices and ready to be prompted.

  Args:
    window: centre and width of the intensities that SAM sees; None takes `PERCENTILES`.
    progress: called with (slices done, slices in all).
    zoom: side of the cut around each structure's prompts, in sides of what they enclose
      (data.cuts); 0 shows whole slices; None does as the network was trained.
  """

  def __init__(
    self, model: SAM2, params: dict[str, Any], volume: Volume, config: TrackingConfig = DEFAULTS,
    plane: Plane = "axial", window: tuple[float, float] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None, zoom: float | None = None,
  ):
    check_zoom(zoom)
    self._model, self._params, self._config = model, params, config
    self._volume, self._plane, self._axis = volume, plane, PLANES[plane]
    self._frame = SliceFrame(volume, plane, model.config.image_size)
    self._slices = np.moveaxis(volume.array[0], self._axis, 0)
    self._low, self._high = _intensity_range(volume.array[0], window)
    self._progress, self._turn = progress, (0, 1)
    # Networks that have prompts drawn were trained on cuts, too.
    self._zoom = (ZOOM if model.config.drawn_prompts else 0.0) if zoom is None else zoom
    self._views: collections.OrderedDict[Cut, _View] = collections.OrderedDict()

  def shown(self, numbers: np.ndarray, plane: Plane | None = None) -> np.ndarray:
    """Slices [n] at their own resolution, windowed: float32 [n, H, W] in [0, 1].

    plane: across which they are cut; None: the one whose slices are followed.
    """
    slices = np.moveaxis(self._volume.array[0], PLANES[plane], 0) if plane else self._slices
    chosen = slices[numbers].astype(np.float32)
    return np.clip((chosen - self._low) / (self._high - self._low), 0, 1)

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
    structures, _ = self._frame.rounds(prompts)
    return self._tracked(structures, (), prompts, arrived)

  def correct(
    self, result: TrackedVolume, prompts: Sequence[VoxelPrompt], arrived: ShowSlice = None
  ) -> TrackedVolume:
    """Adds prompts on any slices to a result; the images are not encoded again if cached.

    What `track` gives of all prompts with these in a round of their own. Structures may be new;
    those without a prompt here are, as a rule, not followed again (`VolumeTracker.correct`).
    """
    new = sorted({p.label for p in prompts} - set(result.structures))
    structures = (*result.structures, *new)
    self._frame.place(prompts, structures)
    # All of one round, whatever they call it.
    prompts = [dataclasses.replace(p, round=0) for p in prompts]
    return self._tracked(structures, result.parts, prompts, arrived)

  def _tracked(
    self, structures: tuple[int, ...], known: tuple[Part, ...], prompts: Sequence[VoxelPrompt],
    show: ShowSlice,
  ) -> TrackedVolume:
    """Goes on from the parts that are `known`."""
    numbers = sorted({p.round for p in prompts})
    together = [tuple(range(len(structures)))] if not self._zoom else [
      (k,) for k, label in enumerate(structures) if any(p.label == label for p in prompts)]
    parts = {part.members[0]: part for part in known}
    pieces = {first: _Piece(self._view(part.cut), part.members, part.tracks.cells)
              for first, part in parts.items()}
    for turn, members in enumerate(together):
      first = members[0]

      def arrived(view: _View, cells: HostCells, slices: np.ndarray, members=members) -> None:
        pieces[members[0]] = _Piece(view, members, cells)
        if show is not None:
          for z in slices.tolist():
            show(z, self._fused(pieces.values(), z, structures))

      self._turn = turn, len(together)
      values = tuple(structures[k] for k in members)
      given = tuple(tuple(p for p in prompts if p.round == number and p.label in values)
                    for number in numbers)
      part = self._followed(members, values, parts.get(first), tuple(filter(None, given)), arrived)
      parts[first], pieces[first] = part, _Piece(self._view(part.cut), members, part.tracks.cells)
    found = tuple(parts[first] for first in sorted(parts))
    # Slice by slice, so that no volume of logits is made.
    labels = np.stack([self._fused(pieces.values(), z, structures)
                       for z in range(len(self._slices))])
    labels = np.ascontiguousarray(np.moveaxis(labels, 0, self._axis))
    return TrackedVolume(
      labels, structures, self._axis, (float(self._low), float(self._high)), found)

  def _followed(
    self, members: tuple[int, ...], values: tuple[int, ...], known: Part | None,
    given: tuple[tuple[VoxelPrompt, ...], ...], arrived: "_PartArrived",
  ) -> Part:
    """Some structures with further rounds of prompts, in a cut that holds what is found.

    Round after round, so that prompts that come later give what they give if they are known before.
    """
    frame = self._frame
    cut, tracks, rounds = (known.cut, known.tracks, known.given) if known else (None, None, ())
    for prompts in given:
      rounds = (*rounds, prompts)
      if cut is None:
        # First cuts of several sizes often lead to the same second one.
        look = functools.cache(functools.partial(self._look, prompts, values))
        cut = first_cut(prompts, frame, self._zoom, look)
      partial = cut != whole(frame.shape)
      if partial and not cut.holds(*(found := frame.bounds([p for some in rounds for p in some]))):
        cut, tracks = around(*found, self._zoom, frame.spacing, frame.shape), None
      tracks = self._run(cut, tracks, values, rounds if tracks is None else (prompts,), arrived)
      if partial and self._touched(cut, tracks):
        cut = cut.grown(frame.spacing, frame.shape)
        tracks = self._run(cut, None, values, rounds, arrived)
    assert cut is not None and tracks is not None
    return Part(members, cut, tracks, rounds)

  def _run(
    self, cut: Cut, tracks: Tracks | None, values: tuple[int, ...],
    given: tuple[tuple[VoxelPrompt, ...], ...], arrived: "_PartArrived",
  ) -> Tracks:
    """Rounds of prompts in a cut, from `tracks` on or from the beginning."""
    view = self._view(cut)
    show = functools.partial(arrived, view)
    for prompts in given:
      placed = view.frame.place(prompts, values)
      tracks = (view.tracker.track(placed, show) if tracks is None
                else view.tracker.correct(tracks, placed, show))
    assert tracks is not None
    return tracks

  def _look(self, prompts: Sequence[VoxelPrompt], values: tuple[int, ...], cut: Cut) -> np.ndarray:
    """The masks of prompted slices in a cut, bool [n, height, width]; nothing is followed."""
    view = self._new_view(cut)
    seen = view.tracker.look(view.frame.place(prompts, values))
    return np.stack([view.logits(cells_at(known.cells, None))[0] > 0 for known in seen.values()])

  def _touched(self, cut: Cut, tracks: Tracks) -> bool:
    """Whether a mask goes on where the cut ends."""
    view, shape = self._view(cut), self._frame.shape
    return any(
      cut.touched_by(view.logits(cells_at(tracks.cells, slice(None), z)) > 0, shape)
      for z in range(len(self._slices)))

  def _view(self, cut: Cut) -> _View:
    """The slices through a cut; the last ones are kept, with what is encoded of them."""
    if cut not in self._views:
      self._views[cut] = self._new_view(cut)
      while len(self._views) > VIEWS:
        self._views.popitem(last=False)
    self._views.move_to_end(cut)
    return self._views[cut]

  def _new_view(self, cut: Cut) -> _View:
    side, config = self._model.config.image_size, self._config
    frame = SliceFrame(self._volume, self._plane, side, cut)

    def slices(numbers: np.ndarray) -> np.ndarray:
      rgb = as_rgb(resize_linear(cut.of(self.shown(numbers)), side)[None])
      return (rgb - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)

    tracker = VolumeTracker(
      self._model, self._params, config, slices, len(self._slices), self._report)
    return _View(frame, tracker, [linear_matrix(side // 4, size) for size in cut.shape])

  def _report(self, done: int, total: int) -> None:
    turn, turns = self._turn
    self._progress(turn * total + done, turns * total)

  def _fused(self, pieces: Iterable["_Piece"], z: int, structures: tuple[int, ...]) -> np.ndarray:
    """Labels [H, W] of a slice: the largest logit decides."""
    values = np.array(structures, np.min_scalar_type(max(structures)))
    labels = np.zeros(self._frame.shape, values.dtype)
    best = np.zeros(self._frame.shape, np.float32)
    for view, members, cells in pieces:
      # The last structures of a part may be missing.
      present = np.flatnonzero(cells.presence[:, z] > 0)
      if not len(present):
        continue
      logits = view.logits(cells_at(cells, present, z))
      cut, top = view.frame.cut, logits.max(axis=0)
      before = cut.of(best)
      own = values[list(members)][present][logits.argmax(axis=0)]
      cut.put(labels, np.where(top > before, own, cut.of(labels)))
      cut.put(best, np.maximum(top, before))
    return labels


class _Piece(NamedTuple):
  """A part as far as it is known."""

  view: _View
  members: tuple[int, ...]
  cells: HostCells


_PartArrived = Callable[[_View, HostCells, np.ndarray], None]


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
