"""Whether a process has others beside it, and where it finds them; `hosts.initialise` joins them.

JAX knows the platforms: Open MPI, SLURM, TPU VMs and GKE with one slice or several, Kubernetes. It
is asked here which of them this process runs on before anything waits for another process.
"""

import inspect
import os
import socket
import time
import warnings
from typing import Any

from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.base.progress import Report

# What `jax.distributed.initialize` is told of a process; empty where JAX is to find it out itself.
Place = dict[str, Any]

_NAMES = {"ompi": "Open MPI", "slurm": "SLURM", "gketpu": "GKE", "gcetpu": "TPU VM"}
_ALONE = "--distributed off trains in this process alone"
# What JAX's detection takes, as of 0.10.2.
_ASKED = ("coordinator_address", "num_processes", "process_id", "local_device_ids",
          "cluster_detection_method", "initialization_timeout")


def place_of(how: str, patience: float, report: Report) -> Place | None:
  """What this process is among those of its run, or None if it is alone.

  Args:
    how: see `hosts.initialise`.
    patience: seconds to wait for the name of process 0's host.
    report: takes a line where it is not plain why a process is alone.

  Raises:
    UserError: `how` is nothing of that, or there are other processes but no way to them.
  """
  if how == "off":
    return None
  return _detected(patience, report) if how == "auto" else _given(how)


def environments() -> Any:
  """JAX's classes of platforms, or None where they are not those that are read here.

  No public part of JAX tells whether there are other processes without joining them.
  """
  try:
    from jax._src.clusters import ClusterEnv
    asked = tuple(inspect.signature(ClusterEnv.auto_detect_unset_distributed_params).parameters)
    parts = [getattr(kind, name) for kind in ClusterEnv._cluster_types
             for name in ("name", "opt_in_only_method", "is_env_present", "get_process_count")]
  except (ImportError, AttributeError):
    return None
  return ClusterEnv if parts and asked == _ASKED else None


def _detected(patience: float, report: Report) -> Place | None:
  jax_knows = environments()
  if jax_knows is None:
    return {}
  for kind in jax_knows._cluster_types:
    try:
      if not _is_here(kind):
        continue
      count = _count(kind)
    except Exception as error:  # JAX's own, of its requests, of Kubernetes' client
      if "tpu" not in kind.name:
        raise _unknown(kind, error) from None
      # A single host may do without the metadata server. The hosts of a pod are counted by JAX
      # when it looks at its devices: hosts.check_joined.
      report(f"{_name(kind)}: the metadata server does not say whether there are other hosts "
             f"({first_line(error)}): this process trains alone")
      return None
    if count == 1:
      return None
    try:
      address, _, index, devices = jax_knows.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"), count, None, None, None, int(patience))
    except Exception as error:
      raise _unknown(kind, error) from None
    return _place(address, count, index, devices)
  _check_alone(report)
  return None


def _is_here(kind: Any) -> bool:
  # Pods that are not of an indexed Job have no number: each is alone. JAX would ask for a package.
  kubernetes = kind.__name__ == "K8sCluster"
  if kind.opt_in_only_method or (kubernetes and "JOB_COMPLETION_INDEX" not in os.environ):
    return False
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # `_check_alone` says it in a line
    return bool(kind.is_env_present())


def _count(kind: Any) -> int:
  """Processes of the run."""
  # SLURM_NTASKS, which JAX reads, stays that of the job in a shell of `salloc`, a step of one task.
  step = os.environ.get("SLURM_STEP_NUM_TASKS", "") if kind.name == "slurm" else ""
  return int(step) if step.isdigit() else int(kind.get_process_count())


def _check_alone(report: Report) -> None:
  """UserError where JAX finds no platform, but something has started several processes."""
  given = os.environ
  if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= given.keys():
    raise UserError(
      "distributed auto: this is a pod of an indexed Job, but JAX cannot ask Kubernetes for the "
      f"others without the package `kubernetes`; pip install kubernetes ({_ALONE})")
  if (size := given.get("OMPI_COMM_WORLD_SIZE", "1")) != "1":
    raise UserError(
      f"distributed auto: mpirun has started {size} processes, but does not tell JAX the address "
      "of the first (Open MPI 5 does not); have each run with --distributed "
      f"HOST:PORT,{size},$OMPI_COMM_WORLD_RANK")
  if (tasks := given.get("SLURM_NTASKS", "1")) != "1":
    report(f"SLURM: the job has {tasks} tasks, but srun has not started this process: it trains "
           "alone")


def _given(how: str) -> Place:
  address, *numbers = how.split(",")
  host, _, port = address.rpartition(":")
  try:
    count, index = map(int, numbers)
  except ValueError:
    count, index = 0, 0
  if not host or not port.isdigit() or not 0 <= index < count:
    raise UserError(f"distributed {how}: is neither auto, off nor HOST:PORT,PROCESSES,INDEX")
  # Tasks of a launcher have a device each, as where JAX finds them itself.
  local = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK")
  if local is None and "SLURM_STEP_NODELIST" in os.environ:
    local = os.environ.get("SLURM_LOCALID")
  own = local is None or "JAX_LOCAL_DEVICE_IDS" in os.environ
  return _place(address, count, index, None if own else [int(str(local))])


def _place(address: str, count: int, index: int, devices: Any) -> Place:
  return {"coordinator_address": address, "num_processes": count, "process_id": index,
          "local_device_ids": devices, "cluster_detection_method": "deactivate"}


def _name(kind: Any) -> str:
  return _NAMES.get(kind.name) or kind.__name__.removesuffix("Cluster")


def _unknown(kind: Any, error: Exception) -> UserError:
  return UserError(f"distributed auto: this is {_name(kind)}, but JAX cannot find the other "
                   f"processes ({first_line(error)}); {_ALONE}")


def reach(place: Place, patience: float) -> None:
  """Waits until process 0 listens; of process 0, looks whether it can.

  Told nothing else than that it had to wait, JAX would abort; and end in a segmentation fault where
  the port is taken.

  Raises:
    UserError: nothing listens after `patience` seconds; another program has process 0's port.
  """
  address, index = place["coordinator_address"], place["process_id"]
  host, _, port = address.rpartition(":")
  if index == 0:
    if "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
      _check_port(address, int(port))
    return
  end = time.monotonic() + patience
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > end:
        raise UserError(
          f"{not_joined(place)}: nothing answers at {address} after {patience:.0f} s "
          f"({first_line(error)}); look whether process 0 runs there, and whether firewalls let "
          f"this host reach that port ({_ALONE})") from None
    time.sleep(min(1.0, patience))


def _check_port(address: str, port: int) -> None:
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  with socket.socket(family, socket.SOCK_STREAM) as trial:
    trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      trial.bind(("", port))
    except OSError as error:
      raise UserError(
        f"process 0 cannot listen at {address} ({first_line(error)}): another run may do so; give "
        "all processes the same JAX_COORDINATOR_PORT, or another port in --distributed") from None


def not_joined(place: Place) -> str:
  """The beginning of a line about a process that waits for others."""
  return f"process {place['process_id']} of {place['num_processes']} has not joined"
