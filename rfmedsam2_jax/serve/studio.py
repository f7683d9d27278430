"""What is computed for the page: a few open volumes, one thread, and jobs that wait for it.

A volume keeps its image features (`PromptedVolume`): what follows its first tracking encodes none.
"""

import collections
import dataclasses
import gc
import logging
import queue
import secrets
import threading
import time
from pathlib import Path

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.plan import PLANES
from rfmedsam2_jax.data.volumes import Volume, load_image
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.prompted.slice_frame import Plane, VoxelPrompt
from rfmedsam2_jax.prompted.tracked import PromptedVolume, TrackedVolume
from rfmedsam2_jax.serve.folder import check_volume
from rfmedsam2_jax.tracking import SlicePrompt, TrackingConfig, VolumeTracker

WAITING = 8  # jobs; more are a page gone wrong
REMEMBERED = 100  # jobs that ended
RESULTS = 4  # of a volume, so that an undo costs nothing

log = logging.getLogger(__name__)


class Unknown(Exception):
  """A volume or a job that is not there (any more)."""


class _Cancelled(Exception):
  pass


@dataclasses.dataclass(eq=False)
class Job:
  """One tracking."""

  state: str = "queued"  # then running, done, failed or cancelled
  done: int = 0  # slices, as `total`: of both directions and all rounds that are followed
  total: int = 0
  fresh: int = 0  # counts the slices whose labels changed
  began: float = 0.0  # of `time.monotonic`
  ended: float | None = None
  error: str = ""
  cancel: threading.Event = dataclasses.field(default_factory=threading.Event)

  @property
  def seconds(self) -> float:
    """For how long it has been computed."""
    return (self.ended or time.monotonic()) - self.began if self.began else 0.0


@dataclasses.dataclass(eq=False)
class Opened:
  """A volume of the page."""

  name: str
  volume: Volume
  plane: Plane
  prompted: PromptedVolume
  # uint8 [D, H, W], canonical: of the last tracking, and slice by slice of one that runs.
  labels: np.ndarray
  # Of the last trackings by their prompts, newest last.
  results: collections.OrderedDict[frozenset[VoxelPrompt], TrackedVolume] = dataclasses.field(
    default_factory=collections.OrderedDict
  )
  job: Job = dataclasses.field(default_factory=Job)  # that computes for it now

  @property
  def found(self) -> TrackedVolume | None:
    """What the last tracking gave."""
    return next(reversed(self.results.values()), None)

  @property
  def slices(self) -> tuple[int, ...]:
    """How many there are, and their rows and columns."""
    return np.moveaxis(self.labels, PLANES[self.plane], 0).shape

  def follow(self, prompts: tuple[VoxelPrompt, ...]) -> None:
    """`PromptedVolume.track` of all prompts; goes on from the results that are there."""
    rounds = sorted({p.round for p in prompts})
    stages = [frozenset(p for p in prompts if p.round <= number) for number in rounds]
    begun = max((i for i, stage in enumerate(stages) if stage in self.results), default=-1)
    results = self.results.copy()  # a tracking that is cancelled leaves nothing
    found = results[stages[begun]] if begun >= 0 else None
    for number, stage in list(zip(rounds, stages, strict=True))[begun + 1 :]:
      given = [p for p in prompts if p.round == number]
      found = results[stage] = (
        self.prompted.correct(found, given, self._show) if found
        else self.prompted.track(given, self._show)
      )
    results.move_to_end(stages[-1])
    _drop_oldest(results, RESULTS)
    self.results = results

  def _show(self, number: int, labels: np.ndarray) -> None:
    np.moveaxis(self.labels, PLANES[self.plane], 0)[number] = labels
    self.job.fresh += 1

  def report(self, done: int, total: int) -> None:
    """What the tracker calls; ends a tracking that is cancelled."""
    self.job.done, self.job.total = done, total
    if self.job.cancel.is_set():
      raise _Cancelled


def _drop_oldest(store: collections.OrderedDict, most: int) -> None:
  while len(store) > most:
    store.popitem(last=False)


class Studio:
  """Volumes that are open and the thread that computes for them.

  Args:
    keep: volumes of `max_voxels` at most; the one that was not used for the longest time goes.
    prepare: compile at once what a first tracking and a correction need.
    zoom: see PromptedVolume.
  """

  def __init__(
    self, model: SAM2, params: dict, config: TrackingConfig, keep: int, max_voxels: int,
    prepare: bool = False, zoom: float | None = None,
  ):
    self._model, self._params, self._config, self._zoom = model, params, config, zoom
    self._keep, self._max_voxels = keep, max_voxels
    self._volumes: collections.OrderedDict[str, Opened] = collections.OrderedDict()
    self._jobs: collections.OrderedDict[str, Job] = collections.OrderedDict()
    self._lock, self._reading = threading.Lock(), threading.Lock()
    self._waiting: queue.Queue = queue.Queue(WAITING)
    # A daemon: an interrupt ends the command without waiting for a compilation.
    threading.Thread(target=self._compute, args=(prepare,), daemon=True, name="compute").start()

  def open(
    self, path: Path, name: str, plane: Plane, window: tuple[float, float] | None
  ) -> tuple[str, Opened]:
    """Reads a volume, one at a time to bound memory; UserError as `load_image`, or for its size."""
    with self._reading:
      check_volume(path, self._max_voxels)
      volume = load_image(path)
      prompted = PromptedVolume(
        self._model, self._params, volume, self._config, plane, window,
        lambda done, total: opened.report(done, total), self._zoom,
      )
      opened = Opened(name, volume, plane, prompted, np.zeros(volume.array.shape[1:], np.uint8))
    key = secrets.token_hex(8)
    with self._lock:
      self._volumes[key] = opened
      _drop_oldest(self._volumes, self._keep)
    gc.collect()  # volume and tracker know each other; their memory shall not wait
    return key, opened

  def volume(self, key: str) -> Opened:
    with self._lock:
      if key not in self._volumes:
        raise Unknown("this volume is not open any more; open it again")
      self._volumes.move_to_end(key)
      return self._volumes[key]

  def track(self, key: str, prompts: tuple[VoxelPrompt, ...]) -> tuple[str, Job]:
    """Queues the tracking of all prompts, in rounds. Rounds that are known are not run again.

    UserError as `SliceFrame.rounds`, or if too many jobs wait.
    """
    opened = self.volume(key)
    opened.prompted.check(prompts)
    name, job = secrets.token_hex(8), Job()
    with self._lock:
      try:
        self._waiting.put_nowait((job, opened, prompts))
      except queue.Full:
        raise UserError(f"{WAITING} trackings wait already; wait or cancel some") from None
      self._jobs[name] = job
      _drop_oldest(self._jobs, REMEMBERED)
    return name, job

  def job(self, name: str) -> Job:
    with self._lock:
      if name not in self._jobs:
        raise Unknown("this tracking is not known any more; track again")
      return self._jobs[name]

  def _prepare(self) -> None:
    """Runs what a person will, on two empty slices; the depth is part of no program."""
    side = self._model.config.image_size
    tracker = VolumeTracker(
      self._model, self._params, self._config,
      lambda numbers: np.zeros((len(numbers), side, side, 3), np.float32), 2,
    )
    begun = tracker.track([SlicePrompt(0, 0, box=(0.0, 0.0, side / 2, side / 2))])
    middle = np.full((1, 2), side / 2, np.float32)
    tracker.correct(begun, [SlicePrompt(0, 1, middle, np.ones(1, np.int32))])

  def _compute(self, prepare: bool) -> None:
    if prepare:
      self._prepare()
    while True:
      job, opened, prompts = self._waiting.get()
      opened.job, job.began = job, time.monotonic()
      state = "done"
      try:
        if job.cancel.is_set():
          raise _Cancelled
        job.state = "running"
        opened.follow(prompts)
      except _Cancelled:
        state = "cancelled"
      except UserError as error:
        job.error, state = str(error), "failed"
      except Exception:  # the page shall hear of it, and the next job shall run
        log.exception("tracking %s", opened.name)
        job.error, state = "failed; the terminal of the command says why", "failed"
      found = opened.found
      labels = np.zeros_like(opened.labels) if found is None else found.labels
      opened.labels = labels.astype(np.uint8)
      job.ended, job.state = time.monotonic(), state
      del job, opened, prompts, found, labels  # a closed volume shall not wait for the next job
