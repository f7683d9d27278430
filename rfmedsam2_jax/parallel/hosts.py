"""Several processes of one run, of the same program: how they find each other and share work.

Process 0 writes what is written once; all see run folder and data set under the same paths.
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

from rfmedsam2_jax.base.errors import RESUME, UserError, first_line
from rfmedsam2_jax.base.progress import Progress

T = TypeVar("T")
_KEY = "rfmedsam2/alive/"
_DONE, _FAILED = "done", "failed: "
_BEAT = 1.0  # seconds between counts
_SILENCE = 30.0  # seconds after which a process that does not count is gone
# Set where a launcher has started several processes, to their number or to their hosts.
_LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")


def initialise(how: str) -> None:
  """Joins this process to the others; to be called before JAX looks at any device.

  `how`: "auto" asks the environment (TPU pods, SLURM, Open MPI); "off"; or
  "HOST:PORT,PROCESSES,INDEX", where HOST is that of process 0. UserError for anything else, or if
  the others cannot be reached.
  """
  values = [os.environ.get(name, "") for name in _LAUNCHERS]
  launched = any("," in value or (value.isdigit() and int(value) > 1) for value in values)
  if how == "off" or (how == "auto" and not launched):
    return
  given: dict[str, Any] = {}
  if how != "auto":
    address, *numbers = how.split(",")
    try:
      count, index = map(int, numbers)
    except ValueError:
      count, index = 0, 0
    if ":" not in address or not 0 <= index < count:
      raise UserError(f"distributed {how}: is neither auto, off nor HOST:PORT,PROCESSES,INDEX")
    given = {"coordinator_address": address, "num_processes": count, "process_id": index}
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(**given, shutdown_timeout_seconds=30)
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f"distributed {how}: the processes cannot be joined ({first_line(error)})") from None


def is_main() -> bool:
  """Whether this process writes what is written once."""
  return jax.process_index() == 0


def share(items: Sequence[T]) -> Sequence[T]:
  """Those of a list that this process works on."""
  return items[jax.process_index() :: jax.process_count()]


@contextlib.contextmanager
def watching() -> Iterator[None]:
  """Ends this process, with one line, soon after another one of the run has ended.

  For a command only: it exits from a thread and takes the signal SIGABRT. Collective operations
  wait for a process that is gone, for minutes or for ever, and JAX's own heartbeats end in an
  abort; so every process counts in the coordination service's store and reads the others' counts.
  """
  if not jax.distributed.is_initialized():  # to count processes would be to look at devices
    yield
    return
  # When process 0 is gone, JAX aborts the others at once: this adds the last line to its trace.
  ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
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
  client: Any = distributed.global_state.client
  with contextlib.suppress(Exception):  # the coordinator may be what is gone
    client.key_value_set(f"{_KEY}{jax.process_index()}", value, allow_overwrite=True)


def _watch(ended: threading.Event) -> None:
  client: Any = distributed.global_state.client
  seen: dict[str, tuple[str, float]] = {}
  count = 0
  while not ended.wait(_BEAT):
    count += 1
    try:
      client.key_value_set(f"{_KEY}{jax.process_index()}", str(count), allow_overwrite=True)
      found = dict(client.key_value_dir_get(_KEY))
    except Exception:
      _leave("process 0 is gone")
    now = time.monotonic()
    for key, value in found.items():
      if seen.get(key, ("", 0.0))[0] != value:
        seen[key] = value, now
      name = f"process {key.removeprefix(_KEY)} of {jax.process_count()}"
      if value.startswith(_FAILED):
        # Often it is the same failure here, and the main thread is about to say so itself.
        if not ended.wait(5.0):
          _leave(f"{name} has {value}", 2)
        return
      if value != _DONE and now - seen[key][1] > _SILENCE:
        _leave(f"{name} has not been heard of for {_SILENCE:.0f} s")


def _leave(why: str, status: int = RESUME) -> NoReturn:
  """The main thread may be inside a collective that never ends, so nothing is waited for."""
  line = f"rfmedsam2: {why}; start all processes again, to resume the run"
  print(line, file=sys.stderr, flush=True)
  os._exit(status)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(_: int) -> None:
  _leave("process 0 is gone, or this one has failed as said above")


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
