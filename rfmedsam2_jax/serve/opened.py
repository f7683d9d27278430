"""A volume that is open on the server, and the jobs that are computed for it.

In: prompts, a model to segment with, or a label map that is there. Out: one label map, of what a
model found or a file holds and, over it, what was tracked since.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Collection
from typing import Any

import numpy as np

from rfmedsam2_jax.data.derived import Making
from rfmedsam2_jax.data.plan import PLANES
from rfmedsam2_jax.data.volumes import Volume
from rfmedsam2_jax.prompted.slice_frame import Plane
from rfmedsam2_jax.prompted.tracked import PromptedVolume, TrackedVolume
from rfmedsam2_jax.serve.automatic import LabelMap, Wanted
from rfmedsam2_jax.serve.schema import State
from rfmedsam2_jax.serve.voxel_prompts import Given

RESULTS = 4  # of a volume, so that an undo costs nothing


class Cancelled(Exception):
  """What ends a job from within."""


@dataclasses.dataclass(eq=False)
class Job:
  """One tracking or segmentation."""

  name: str
  state: State = "queued"
  message: str = ""
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
  # uint8 [D, H, W], canonical: what is there, and slice by slice what a tracking finds.
  labels: np.ndarray
  # Of the last trackings by their prompts, newest last.
  results: collections.OrderedDict[frozenset[str], TrackedVolume] = dataclasses.field(
    default_factory=collections.OrderedDict
  )
  # What a model found or a file holds; structures that were tracked since then replace those of
  # their labels.
  ground: LabelMap | None = None
  job: Job = dataclasses.field(default_factory=lambda: Job("", "done"))  # the last one
  closed: bool = False  # jobs that wait for it need not begin
  _replaced: tuple[int, ...] = ()  # labels that are being tracked

  @property
  def found(self) -> TrackedVolume | None:
    """What the last tracking gave."""
    return next(reversed(self.results.values()), None)

  @property
  def names(self) -> dict[int, str] | None:
    """Of the labels that there are by now, by value; None before anything was computed."""
    found, ground = self.found, self.ground
    if found is None and ground is None:
      return None
    names = dict(ground.names) if ground else {}
    for value in found.structures if found else ():
      names.setdefault(value, f"label {value}")
    return names

  @property
  def how(self) -> Making:
    """How they were found."""
    return self.ground.how if self.ground and self.found is None else Making()

  def told(self, error: Exception) -> str:
    """What an error says, with the volume's name instead of its place on this machine."""
    path = self.volume.geometry.path
    return str(error).replace(str(path), self.name).replace(f"{path.parent}/", "")

  @property
  def slices(self) -> tuple[int, ...]:
    """How many there are, and their rows and columns."""
    return np.moveaxis(self.labels, PLANES[self.plane], 0).shape

  def follow(self, given: tuple[Given, ...]) -> None:
    """`PromptedVolume.track` of all prompts; goes on from the results that are there."""
    self._replaced = tuple({g.prompt.label for g in given})
    rounds = sorted({g.prompt.round for g in given})
    stages = [frozenset(g.key for g in given if g.prompt.round <= number) for number in rounds]
    begun = max((i for i, stage in enumerate(stages) if stage in self.results), default=-1)
    results = self.results.copy()  # a tracking that is cancelled leaves nothing
    found = results[stages[begun]] if begun >= 0 else None
    for number, stage in list(zip(rounds, stages, strict=True))[begun + 1 :]:
      prompts = [g.prompt for g in given if g.prompt.round == number]
      found = results[stage] = (
        self.prompted.correct(found, prompts, self._show) if found
        else self.prompted.track(prompts, self._show)
      )
    results.move_to_end(stages[-1])
    drop_oldest(results, RESULTS)
    self.results = results

  def segment(self, wanted: Wanted) -> None:
    """Lets a model segment the volume, and forgets what was tracked before."""
    self.begin_with(wanted.of(self.volume, self._say))

  def begin_with(self, ground: LabelMap) -> None:
    """Takes a label map, and forgets what was tracked before."""
    self.ground, self.results = ground, collections.OrderedDict()

  def settle(self) -> None:
    """Shows what is there, after a job has ended in whatever way."""
    found = self.found
    if found is None:
      self.labels = self._below(slice(None), ()).copy()
    else:
      self.labels = _on_top(self._below(slice(None), found.structures), found.labels)

  def _show(self, number: int, labels: np.ndarray) -> None:
    where = (slice(None),) * PLANES[self.plane] + (number,)
    self.labels[where] = _on_top(self._below(where, self._replaced), labels)
    self.job.fresh += 1

  def _below(self, where: Any, replaced: Collection[int]) -> np.ndarray:
    """What is there besides trackings, but for labels that are replaced."""
    if self.ground is None:
      return np.zeros_like(self.labels[where])
    below = self.ground.labels[where]
    return np.where(np.isin(below, list(replaced)), np.uint8(0), below)

  def _say(self, text: str) -> None:
    self.job.message = str(text)
    self._end_if_cancelled()

  def report(self, done: int, total: int) -> None:
    """What the tracker calls; ends a tracking that is cancelled."""
    self.job.done, self.job.total = done, total
    self._end_if_cancelled()

  def _end_if_cancelled(self) -> None:
    if self.job.cancel.is_set():
      raise Cancelled


def _on_top(below: np.ndarray, labels: np.ndarray) -> np.ndarray:
  return np.where(labels > 0, labels, below).astype(np.uint8)


def drop_oldest(store: collections.OrderedDict, most: int) -> None:
  """Shortens a store from its front."""
  while len(store) > most:
    store.popitem(last=False)
