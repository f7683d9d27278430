"""What is computed for the page: a few open volumes, one thread, and jobs that wait for it.

The network is there once. A volume keeps its image features (`PromptedVolume`), so that whatever
follows its first tracking costs no encoding.
"""

import collections
import dataclasses
import itertools
import logging
import queue
import secrets
import threading
import time
from pathlib import Path

import numpy as np

from rfmedsam2_jax.data.plan import PLANES
from rfmedsam2_jax.data.volumes import Volume, load_image
from rfmedsam2_jax.errors import UserError
from rfmedsam2_jax.inference.slice_frame import Plane, VoxelPrompt
from rfmedsam2_jax.inference.tracked import PromptedVolume, TrackedVolume
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.serve.folder import check_voxels
from rfmedsam2_jax.tracking import TrackingConfig

WAITING = 8  # jobs; more are a page gone wrong
REMEMBERED = 100  # jobs that ended

log = logging.getLogger(__name__)


class Unknown(Exception):
  """A volume or a job that is not there (any more)."""


class _Cancelled(Exception):
  pass


@dataclasses.dataclass(eq=False)
class Job:
  """One tracking; `state` is queued, running, done, failed or cancelled."""

  name: str
  state: str = "queued"
  done: int = 0
  total: int = 0
  seconds: float = 0.0
  error: str = ""
  cancel: threading.Event = dataclasses.field(default_factory=threading.Event)


@dataclasses.dataclass(eq=False)
class Opened:
  """A volume of the page.

  Attributes:
    found: of the last tracking that ended, and `prompts`, all that led to it.
    job: that computes for it now.
  """

  name: str
  volume: Volume
  plane: Plane
  prompted: PromptedVolume
  found: TrackedVolume | None = None
  prompts: tuple[VoxelPrompt, ...] = ()
  job: Job | None = None

  @property
  def slices(self) -> tuple[int, int, int]:
    """How many there are, and their rows and columns."""
    axis = PLANES[self.plane]
    depth, height, width = np.moveaxis(self.volume.array[0], axis, 0).shape
    return depth, height, width

  def labels_of(self, number: int) -> np.ndarray:
    """The label map of a slice, uint8 [H, W]."""
    if self.found is None:
      return np.zeros(self.slices[1:], np.uint8)
    return self.found.labels.take(number, PLANES[self.plane]).astype(np.uint8)


class Studio:
  """Volumes that are open and the thread that computes for them.

  Args:
    keep: volumes; the one that was not used for the longest time goes.
    max_voxels: of a volume.
  """

  def __init__(
    self, model: SAM2, params: dict, config: TrackingConfig, keep: int, max_voxels: int
  ):
    self._model, self._params, self._config = model, params, config
    self._keep, self._max_voxels = keep, max_voxels
    self._volumes: collections.OrderedDict[str, Opened] = collections.OrderedDict()
    self._jobs: collections.OrderedDict[str, Job] = collections.OrderedDict()
    self._lock, self._reading = threading.Lock(), threading.Lock()
    self._waiting: queue.Queue = queue.Queue(WAITING)
    # A daemon: an interrupt ends the command without waiting for a compilation.
    threading.Thread(target=self._compute, daemon=True, name="compute").start()

  def open(
    self, path: Path, name: str, plane: Plane, window: tuple[float, float] | None
  ) -> tuple[str, Opened]:
    """Reads a volume; one at a time, so that memory is bounded.

    Raises:
      UserError: as `load_image`; too many voxels.
    """
    with self._reading:
      check_voxels(path, self._max_voxels)
      volume = load_image(path)
      opened: list[Opened] = []
      prompted = PromptedVolume(
        self._model, self._params, volume, self._config, plane, window,
        lambda done, total: _report(opened[0], done, total),
      )
      opened.append(Opened(name, volume, plane, prompted))
    key = secrets.token_hex(8)
    with self._lock:
      self._volumes[key] = opened[0]
      while len(self._volumes) > self._keep:
        self._volumes.popitem(last=False)
    return key, opened[0]

  def volume(self, key: str) -> Opened:
    with self._lock:
      if key not in self._volumes:
        raise Unknown("this volume is not open any more; open it again")
      self._volumes.move_to_end(key)
      return self._volumes[key]

  def track(self, key: str, prompts: tuple[VoxelPrompt, ...]) -> tuple[str, Job]:
    """Queues the tracking of all prompts, in rounds. Rounds that are known are not run again.

    Raises:
      UserError: as `SliceFrame.rounds`; too many jobs wait.
    """
    opened = self.volume(key)
    opened.prompted.check(prompts)
    name, job = secrets.token_hex(8), Job(opened.name)
    with self._lock:
      try:
        self._waiting.put_nowait((job, opened, prompts))
      except queue.Full:
        raise UserError(f"{WAITING} trackings wait already; wait or cancel some") from None
      self._jobs[name] = job
      while len(self._jobs) > REMEMBERED:
        self._jobs.popitem(last=False)
    return name, job

  def job(self, name: str) -> Job:
    with self._lock:
      if name not in self._jobs:
        raise Unknown("this tracking is not known any more; track again")
      return self._jobs[name]

  def _compute(self) -> None:
    while True:
      job, opened, prompts = self._waiting.get()
      began = time.monotonic()
      opened.job = job
      try:
        if job.cancel.is_set():
          raise _Cancelled
        job.state = "running"
        found = _followed(opened, prompts)
        opened.found, opened.prompts = found, prompts
        job.seconds, job.state = time.monotonic() - began, "done"
      except _Cancelled:
        job.state = "cancelled"
      except UserError as error:
        job.error, job.state = str(error), "failed"
      except Exception:  # the page shall hear of it, and the next job shall run
        log.exception("tracking %s", opened.name)
        job.error, job.state = "failed; the terminal of the command says why", "failed"


def _report(opened: Opened, done: int, total: int) -> None:
  job = opened.job
  if job is not None:
    job.done, job.total = done, total
    if job.cancel.is_set():
      raise _Cancelled


def _followed(opened: Opened, prompts: tuple[VoxelPrompt, ...]) -> TrackedVolume:
  """`PromptedVolume.track` of all prompts; goes on from the result that is there if it can."""
  known = opened.prompts
  later = [p for p in prompts if p not in known]
  last = max((p.round for p in known), default=0)
  if opened.found is None or not set(known) <= set(prompts) or any(p.round <= last for p in later):
    return opened.prompted.track(prompts)
  found = opened.found
  ordered = sorted(later, key=lambda p: p.round)
  for _, given in itertools.groupby(ordered, key=lambda p: p.round):
    found = opened.prompted.correct(found, list(given))
  return found
