"""What is computed for others: a few open volumes, one thread, and jobs that wait for it.

A volume keeps its image features (`PromptedVolume`): what follows its first tracking encodes none.
"""

import collections
import functools
import gc
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.volumes import load_image
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.prompted.slice_frame import Plane
from rfmedsam2_jax.prompted.tracked import PromptedVolume
from rfmedsam2_jax.serve.automatic import Wanted, read_labels
from rfmedsam2_jax.serve.folder import check_volume
from rfmedsam2_jax.serve.opened import Cancelled, Job, Opened, drop_oldest
from rfmedsam2_jax.serve.schema import State
from rfmedsam2_jax.serve.voxel_prompts import Given
from rfmedsam2_jax.tracking import SlicePrompt, TrackingConfig, VolumeTracker

WAITING = 8  # jobs; more are a page gone wrong
REMEMBERED = 100  # jobs that ended

log = logging.getLogger(__name__)


class Unknown(Exception):
  """A volume or a job that is not there (any more)."""


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
    self, path: Path, name: str, plane: Plane, window: tuple[float, float] | None,
    series: str | None = None,
  ) -> tuple[str, Opened]:
    """Reads a volume, one at a time to bound memory; UserError as `load_image`, or for its size."""
    with self._reading:
      check_volume(path, self._max_voxels)
      volume = load_image(path, series=series)
      prompted = PromptedVolume(
        self._model, self._params, volume, self._config, plane, window,
        lambda done, total: opened.report(done, total), self._zoom,
      )
      opened = Opened(name, volume, plane, prompted, np.zeros(volume.array.shape[1:], np.uint8))
    key = secrets.token_hex(8)
    with self._lock:
      self._volumes[key] = opened
      drop_oldest(self._volumes, self._keep)
    gc.collect()  # volume and tracker know each other; their memory shall not wait
    return key, opened

  def volume(self, key: str) -> Opened:
    with self._lock:
      if key not in self._volumes:
        raise Unknown("this volume is not open any more; open it again")
      self._volumes.move_to_end(key)
      return self._volumes[key]

  def close(self, key: str) -> None:
    """Forgets a volume, and ends what is computed for it."""
    opened = self.volume(key)
    opened.closed = True
    opened.job.cancel.set()
    with self._lock:
      self._volumes.pop(key, None)
    del opened
    gc.collect()

  def read_labels(self, key: str, path: Path) -> Opened:
    """Takes a file's label map as that of a volume.

    UserError as `automatic.read_labels`, or while a job runs.
    """
    opened = self.volume(key)
    if opened.job.state == "running":
      raise UserError(f"{opened.name}: is being computed for; wait or cancel, then open labels")
    with self._reading:
      check_volume(path, self._max_voxels)
      opened.begin_with(read_labels(path, opened.volume.geometry))
    opened.settle()
    return opened

  def track(self, key: str, prompts: tuple[Given, ...]) -> Job:
    """Queues the tracking of all prompts, in rounds. Rounds that are known are not run again.

    UserError as `SliceFrame.rounds`, or if too many jobs wait.
    """
    opened = self.volume(key)
    opened.prompted.check([given.prompt for given in prompts])
    return self._queue(opened, functools.partial(opened.follow, prompts))

  def segment(self, key: str, wanted: Wanted) -> Job:
    """Queues automatic segmentation; UserError if too many jobs wait."""
    opened = self.volume(key)
    return self._queue(opened, functools.partial(opened.segment, wanted))

  def _queue(self, opened: Opened, work: Callable[[], None]) -> Job:
    job = Job(secrets.token_hex(8))
    with self._lock:
      try:
        self._waiting.put_nowait((job, opened, work))
      except queue.Full:
        raise UserError(f"{WAITING} jobs wait already; wait or cancel some") from None
      self._jobs[job.name] = job
      drop_oldest(self._jobs, REMEMBERED)
    return job

  def job(self, name: str) -> Job:
    with self._lock:
      if name not in self._jobs:
        raise Unknown("this job is not known any more; track or segment again")
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
      job, opened, work = self._waiting.get()
      opened.job, job.began = job, time.monotonic()
      state: State = "done"
      try:
        if job.cancel.is_set() or opened.closed:
          raise Cancelled
        job.state = "running"
        work()
      except Cancelled:
        state = "cancelled"
      except UserError as error:
        job.error, state = opened.told(error), "failed"
      except Exception:  # the page shall hear of it, and the next job shall run
        log.exception("computing for %s", opened.name)
        job.error, state = "failed; the terminal of the command says why", "failed"
      opened.settle()
      job.ended, job.message, job.state = time.monotonic(), "", state
      del job, opened, work  # a closed volume shall not wait for the next job
