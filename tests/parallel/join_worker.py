"""Processes of many runs at once, which join as a platform tells them; prints what came of each.

JAX is imported once, every process is a fork of this one. Standard input is JSON, {run: processes}
with a process {"does": a function of this file, "how": of `hosts.initialise`, "tpu": whether it has
TPUs, "env": its variables}. Prints {run: [[exit status, output], ...]}.
"""

import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import jax
import numpy as np
from jax._src import distributed
from jax._src.clusters import K8sCluster, cloud_tpu_cluster
from platforms import kubernetes_client

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.parallel import hosts, rules
from rfmedsam2_jax.parallel.mesh import MeshConfig, local_rows, make_mesh, place_batch


def count() -> None:
  print(json.dumps([jax.process_index(), jax.process_count()]))


def _die(index: int) -> None:
  """One process is killed, the other waits for it: within `watching`, as a command does."""
  hosts._SILENCE = 3.0
  with hosts.watching():
    distributed.global_state.client.wait_at_barrier("all are here", 20_000)
    if jax.process_index() == index:
      os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def first_dies() -> None:
  _die(0)


def second_dies() -> None:
  _die(1)


def share() -> None:
  """Two slices that each have devices of both processes: no process' rows are next to each other.

  A checkpoint of this mesh is restored on that of one slice.
  """
  from rfmedsam2_jax.config.training import OptimizerConfig
  from rfmedsam2_jax.training.checkpoints import Checkpoints
  from rfmedsam2_jax.training.state import init_state, make_optimizer

  kind = type(jax.devices()[0])
  one = make_mesh(MeshConfig(data=4, fsdp=2))
  kind.slice_index = property(lambda device: device.id % 2)
  two = make_mesh(MeshConfig(data=4, fsdp=2))
  assert all(len({d.slice_index for d in copy.flat}) == 1 for copy in two.devices)
  assert len({d.slice_index for d in one.devices[0].flat}) == 2
  batch = {"x": np.random.default_rng(0).random((16, 3), np.float32)}
  rows = local_rows(two, 16)
  placed = place_batch({"x": batch["x"][rows]}, two)
  params = {"layer": {"kernel": np.arange(2**13, dtype=np.float32).reshape(64, 128)}}
  optimizer = make_optimizer(OptimizerConfig("sgd"), 5)
  state = init_state(params, ("*",), optimizer, jax.random.key(0))
  checkpoints = Checkpoints(Path(os.environ["CHECKPOINTS"]), 1)
  checkpoints.save(5, rules.place(state, two))
  checkpoints.wait()
  restored = checkpoints.restore(5, rules.place(state, one))
  kernel = restored.trained["layer"]["kernel"]
  assert kernel.sharding.mesh == one and not kernel.sharding.is_fully_replicated
  checkpoints.close()
  print(json.dumps({
    "apart": bool(max(np.diff(rows)) > 1),
    "rows": np.array_equal(rules.whole(placed, two)["x"], batch["x"]),
    "restored": np.array_equal(rules.whole(kernel, one), params["layer"]["kernel"]),
  }))


def begin(process: dict) -> int:
  """What a forked process does; returns its exit status."""
  os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it on hosts without TPUs
  os.environ.update(process["env"])
  cloud_tpu_cluster.running_in_cloud_tpu_vm = process["tpu"]
  sys.modules["kubernetes"] = kubernetes_client(2)  # type: ignore[assignment]
  K8sCluster._namespace = classmethod(lambda cls: "default")
  if process["does"] == "share":
    jax.config.update("jax_num_cpu_devices", 4)
  try:
    hosts.initialise(process["how"], patience=float(os.environ.get("PATIENCE", "60")))
    globals()[process["does"]]()
  except UserError as error:
    print(f"rfmedsam2: {error}", file=sys.stderr)
    return 2
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


def fork(process: dict) -> tuple[int, Path]:
  handle, name = tempfile.mkstemp()
  pid = os.fork()
  if not pid:
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    status = begin(process)
    sys.stdout.flush()
    sys.stderr.flush()
    jax.distributed.shutdown()
    os._exit(status)
  os.close(handle)
  return pid, Path(name)


def main() -> None:
  warnings.simplefilter("ignore")  # JAX about forks; nothing of it has started yet
  runs = json.load(sys.stdin)
  forks = {name: [fork(process) for process in processes] for name, processes in runs.items()}
  found: dict[str, list] = {}
  for name, processes in forks.items():
    found[name] = []
    for pid, output in processes:
      status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
      found[name].append([status, output.read_text()])
      output.unlink()
  print(json.dumps(found))


if __name__ == "__main__":
  main()
