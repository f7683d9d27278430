"""Several processes of one run: how they find each other, and how they share work on the host.

Every process runs the same program on its own devices. Process 0 writes what is written once; all
see the run's folder and the data set under the same paths.
"""

import contextlib
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rfmedsam2_jax.errors import UserError

T = TypeVar("T")

# Set where a launcher has started several processes, to their number or to their hosts.
_LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")


def initialise(how: str) -> None:
  """Joins this process to the others; to be called before JAX looks at any device.

  Args:
    how: "auto" asks the environment (TPU pods, SLURM, Open MPI); "off"; or
      "HOST:PORT,PROCESSES,INDEX", where HOST is that of process 0.

  Raises:
    UserError: none of these, or the others cannot be reached.
  """
  if how == "off" or (how == "auto" and not _launched()):
    return
  given: dict[str, Any] = {}
  if how != "auto":
    parts = how.split(",")
    try:
      address, count, index = parts[0], *(int(part) for part in parts[1:])
    except (ValueError, TypeError):
      address, count, index = "", 0, 0
    if ":" not in address or not 0 <= index < count:
      raise UserError(f"--distributed {how}: is neither auto, off nor HOST:PORT,PROCESSES,INDEX")
    given = {"coordinator_address": address, "num_processes": count, "process_id": index}
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(**given)
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().split("\n")[0][:200]
    raise UserError(f"--distributed {how}: the processes cannot be joined ({reason})") from None


def _launched() -> bool:
  values = [os.environ.get(name, "") for name in _LAUNCHERS]
  return any("," in value or (value.isdigit() and int(value) > 1) for value in values)


def is_main() -> bool:
  """Whether this process writes what is written once."""
  return jax.process_index() == 0


def share(items: Sequence[T]) -> Sequence[T]:
  """Those of a list that this process works on."""
  return items[jax.process_index() :: jax.process_count()]


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Work at whose end processes wait for each other; a UserError of one is raised by all."""
  error: UserError | None = None
  try:
    yield
  except UserError as raised:
    error = raised
  messages = [m for m in gather(None if error is None else str(error)) if m]
  if error is not None:
    raise error
  if messages:
    raise UserError(messages[0])


def gather(value: T) -> list[T]:
  """What every process has, in their order."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(pickle.dumps(value), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data)))).ravel()
  padded = np.pad(data, (0, int(sizes.max()) - len(data)))
  rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
  return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
