"""Several processes of one run, of the same program: how they find each other and share work.

Process 0 writes what is written once; all see run folder and data set under the same paths, or
addresses.
"""

import contextlib
import ctypes
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from rfmedsam2_jax.base.addresses import shown
from rfmedsam2_jax.base.errors import RESUME, UserError, first_line
from rfmedsam2_jax.base.progress import Progress, Report, silent
from rfmedsam2_jax.parallel import joining

T = TypeVar("T")
_KEY = "rfmedsam2/alive/"
_DONE, _FAILED = "done", "failed: "
_BEAT = 1.0  # seconds between counts
_SILENCE = 30.0  # seconds after which a process that does not count is gone
_AGAIN = "start all processes again, to resume the run"
_PATIENCE = 300.0  # seconds in which all processes have to come

# What is said, and the exit status, where JAX aborts this process.
_at_abort = f"process 0 is gone, or this one has failed as said above; {_AGAIN}", RESUME


def initialise(how: str, report: Report = silent, patience: float = _PATIENCE) -> None:
  """Joins this process to the others; to be called before JAX looks at any device.

  For a command only: it takes the signal SIGABRT.

  Args:
    how: "auto" leaves it to JAX whether there are others (TPU VMs, GKE, SLURM, Open MPI,
      Kubernetes), and stays alone where there are none; "off"; or "HOST:PORT,PROCESSES,INDEX",
      where HOST is that of process 0.
    report: takes a line about who has joined.
    patience: seconds to wait for the others.

  Raises:
    UserError: `how` is something else, or the others cannot be reached.
  """
  place = joining.place_of(how, patience, report)
  if place is None:
    return
  end = time.monotonic() + patience
  if place:
    joining.reach(place, patience)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  with _told_of_aborts(place, patience):
    try:
      jax.distributed.initialize(
        **place, initialization_timeout=max(int(end - time.monotonic()), 1),
        shutdown_timeout_seconds=30)
    except (RuntimeError, ValueError) as error:
      if not place and isinstance(error, ValueError):  # so it ends where JAX finds no platform
        return
      raise UserError(
        f"distributed {how}: the processes cannot be joined ({first_line(error)})") from None
  state = distributed.global_state
  if state.process_id == 0:
    report(f"{state.num_processes} processes have joined, at {state.coordinator_address}")


@contextlib.contextmanager
def _told_of_aborts(place: joining.Place, patience: float) -> Iterator[None]:
  """JAX aborts where not all come in time: this adds a last line to its trace, here and later."""
  global _at_abort
  afterwards = _at_abort
  if place:
    _at_abort = (
      f"{joining.not_joined(place)}: not all processes have come to "
      f"{place['coordinator_address']} in {patience:.0f} s; look at what the others say, and "
      "whether all of them have been started, with the same command", 2)
  ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
  try:
    yield
  finally:
    _at_abort = afterwards


def check_joined() -> None:
  """UserError where JAX counts processes that have not joined: they would wait without end."""
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise UserError(
      f"this is process {jax.process_index()} of {jax.process_count()} by JAX's count, but they "
      "have not joined; leave out --distributed off, or give --distributed "
      "HOST:PORT,PROCESSES,INDEX")


def is_main() -> bool:
  """Whether this process writes what is written once."""
  return jax.process_index() == 0


def share(items: Sequence[T]) -> Sequence[T]:
  """Those of a list that this process works on."""
  return items[jax.process_index() :: jax.process_count()]


@contextlib.contextmanager
def watching() -> Iterator[None]:
  """Ends this process, with one line, soon after another one of the run has ended.

  For a command only: it exits from a thread. Collective operations wait for a process that is
  gone, for minutes or for ever, and JAX's own heartbeats end in an abort; so every process counts
  in the coordination service's store and reads the others' counts.
  """
  if not jax.distributed.is_initialized():  # to count processes would be to look at devices
    yield
    return
  ended = threading.Event()
  watcher = threading.Thread(target=_watch, args=(ended,), daemon=True)
  watcher.start()
  try:
    yield
    _say(_DONE)
  except BaseException as error:
    _say(f"{_FAILED}{error}")
    raise
  finally:
    ended.set()
    watcher.join()


def _say(value: str) -> None:
  # No public part of JAX reaches the store; Orbax goes the same way.
  state: Any = distributed.global_state
  with contextlib.suppress(Exception):  # the coordinator may be what is gone
    state.client.key_value_set(f"{_KEY}{state.process_id}", value, allow_overwrite=True)


def _watch(ended: threading.Event) -> None:
  # Not `jax.process_index()`: to ask for it is to look at devices, which the main thread has to do.
  state: Any = distributed.global_state
  client = state.client
  # Of all, so that one that never counts is missed too: what it said last, and when.
  seen = {index: ("", time.monotonic()) for index in range(state.num_processes)}
  count = 0
  while not ended.wait(_BEAT):
    count += 1
    try:
      client.key_value_set(f"{_KEY}{state.process_id}", str(count), allow_overwrite=True)
      found = dict(client.key_value_dir_get(_KEY))
    except Exception:
      _leave(f"process 0 is gone; {_AGAIN}")
    now = time.monotonic()
    for index, (before, when) in seen.items():
      value = found.get(f"{_KEY}{index}", "")
      if value != before:
        seen[index] = value, now
      name = f"process {index} of {state.num_processes}"
      if value.startswith(_FAILED):
        # Often it is the same failure here, and the main thread is about to say so itself.
        if not ended.wait(5.0):
          _leave(f"{name} has {value}; {_AGAIN}", 2)
        return
      if value == before != _DONE and now - when > _SILENCE:
        _leave(f"{name} is gone: not heard of for {_SILENCE:.0f} s; {_AGAIN}")


def _leave(why: str, status: int = RESUME) -> NoReturn:
  """The main thread may be inside a collective that never ends, so nothing is waited for."""
  print(f"rfmedsam2: {shown(why)}", file=sys.stderr, flush=True)
  os._exit(status)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(_: int) -> None:
  _leave(*_at_abort)


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Work at whose end processes wait for each other; a UserError of one is raised by all."""
  error: UserError | None = None
  try:
    yield
  except UserError as raised:
    error = raised
  if messages := [message for message in gather(str(error or "")) if message]:
    raise error or UserError(messages[0])


def each(items: Sequence[T], work: Callable[[T], object], progress: Progress) -> None:
  """Does some work on every item, each process on its share; then they wait for each other."""
  with together():
    mine = share(items)
    progress(0, len(mine))
    for done, item in enumerate(mine, 1):
      work(item)
      progress(done, len(mine))


def gather(value: T) -> list[T]:
  """What every process has, in their order."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(pickle.dumps(value), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data)))).ravel()
  padded = np.pad(data, (0, int(sizes.max()) - len(data)))
  rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
  return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
