"""How processes find each other: on platforms that are stood in for, and where there are none."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax._src.clusters import K8sCluster, cloud_tpu_cluster
from platforms import (
  HOST,
  free_port,
  gke,
  gke_slices,
  kubernetes,
  kubernetes_client,
  metadata_server,
  open_mpi,
  slurm,
  tpu_vm,
  tpu_vm_slices,
)

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.parallel import hosts, joining

WORKER = Path(__file__).parent / "join_worker.py"
SET_BY_PLATFORMS = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_", "JAX_COORD")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
  """Whatever platform the tests themselves run on is not seen, nor its way out to the network."""
  for name in [*os.environ]:
    if name.startswith(SET_BY_PLATFORMS) or "proxy" in name.lower():
      monkeypatch.delenv(name)


@pytest.fixture
def on_tpus(monkeypatch):
  monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)  # JAX sets it on hosts without TPUs
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)


@pytest.fixture
def joined(monkeypatch):
  """What `jax.distributed.initialize` was called with."""
  calls: list[dict] = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
  return calls


def set_all(monkeypatch, variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)


ALONE = {
  "a laptop, or Docker": {},
  "a kernel in an allocation of one task": slurm(0, 65000) | {"SLURM_NTASKS": "1"},
  "a shell of salloc -n 2": slurm(0, 65000) | {"SLURM_STEP_NUM_TASKS": "1"},
  "a batch script without srun": {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
                                  "SLURM_LOCALID": "0"},
  "mpirun -n 1": open_mpi(0, 65000) | {"OMPI_COMM_WORLD_SIZE": "1"},
  "a pod of no Job": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
}


@pytest.mark.parametrize("place", ALONE)
def test_a_process_by_itself_stays_alone(monkeypatch, joined, place):
  set_all(monkeypatch, ALONE[place])
  monkeypatch.setitem(sys.modules, "kubernetes", kubernetes_client(2))  # which nothing here asks
  lines: list[str] = []
  hosts.initialise("auto", lines.append)
  assert not joined
  assert len(lines) == ("batch" in place)  # who has forgotten srun is told


@pytest.mark.parametrize("hostnames", [{}, {"TPU_WORKER_HOSTNAMES": "localhost"}])
def test_a_single_tpu_host_stays_alone(monkeypatch, joined, on_tpus, hostnames):
  set_all(monkeypatch, hostnames)
  lines: list[str] = []
  with tpu_vm(0, hosts=1) as variables:
    set_all(monkeypatch, variables)
    hosts.initialise("auto", lines.append)
  assert not joined and not lines
  hosts.initialise("auto", lines.append)  # the metadata server is no more
  assert not joined and "metadata server" in lines[0] and "alone" in lines[0]


def test_a_tpu_vm_without_a_worker_number_is_no_pod(monkeypatch, joined, on_tpus):
  monkeypatch.setattr(cloud_tpu_cluster.time, "sleep", lambda seconds: None)
  with metadata_server() as variables:
    set_all(monkeypatch, variables)
    hosts.initialise("auto")
  assert not joined


def test_jax_has_what_its_detection_is_asked_for():
  """As in JAX 0.10.2. Where this fails: read jax/_src/clusters anew, see joining.environments."""
  assert joining.environments() is not None, jax.__version__
  kinds = {kind.__name__: kind.name for kind in joining.environments()._cluster_types}
  known = {"OmpiCluster": "ompi", "SlurmCluster": "slurm", "GkeTpuCluster": "gketpu",
           "GceTpuCluster": "gcetpu", "K8sCluster": ""}
  assert known.items() <= kinds.items(), jax.__version__


def test_another_jax_is_left_to_itself(monkeypatch):
  monkeypatch.setattr(joining, "_ASKED", ())
  calls: list[dict] = []

  def finds_nothing(**given):
    calls.append(given)
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", finds_nothing)
  hosts.initialise("auto")
  assert len(calls) == 1 and "coordinator_address" not in calls[0]


def test_several_processes_without_a_way_to_the_first_are_refused(monkeypatch, joined):
  monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")  # and no more, as by Open MPI 5
  with pytest.raises(UserError, match=r"has started 8 .*HOST:PORT,8,\$OMPI_COMM_WORLD_RANK"):
    hosts.initialise("auto")
  monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
  set_all(monkeypatch, kubernetes(0, 1))
  monkeypatch.setitem(sys.modules, "kubernetes", None)
  with pytest.raises(UserError, match="pip install kubernetes"):
    hosts.initialise("auto")

  def forbidden(cls):
    raise RuntimeError("Kubernetes API Error: 403 - Forbidden")

  monkeypatch.setitem(sys.modules, "kubernetes", kubernetes_client(2))
  monkeypatch.setattr(K8sCluster, "get_process_count", classmethod(forbidden))
  with pytest.raises(UserError, match="cannot find the other processes .*403"):
    hosts.initialise("auto")
  assert not joined


@pytest.mark.parametrize("how", ["on", "host:1", "host:1,2", "host:1,2,2", "host,2,0", ":1,2,0"])
def test_another_way_to_join_is_refused(how):
  with pytest.raises(UserError, match="neither auto, off nor HOST:PORT,PROCESSES,INDEX"):
    hosts.initialise(how)


def test_tasks_that_are_told_where_to_join_have_a_device_each(monkeypatch, joined):
  port = free_port()
  hosts.initialise(f"{HOST}:{port},2,0")
  set_all(monkeypatch, slurm(1, 65000) | {"SLURM_LOCALID": "3"})
  hosts.initialise(f"{HOST}:{port},2,0")
  assert [call["local_device_ids"] for call in joined] == [None, [3]]


def test_who_does_not_reach_the_first_process_says_where_it_looked(joined):
  address = f"{HOST}:{free_port()}"
  says = f"process 1 of 2 has not joined: nothing answers at {address} after 1 s .*refused.*fire"
  with pytest.raises(UserError, match=says):
    hosts.initialise(f"{address},2,1", patience=1)
  with socket.create_server((HOST, 0)) as busy:
    taken = f"{HOST}:{busy.getsockname()[1]}"
    with pytest.raises(UserError, match=f"cannot listen at {taken}.*in use.*JAX_COORDINATOR_PORT"):
      hosts.initialise(f"{taken},2,0")
  assert not joined


def test_processes_that_have_not_joined_do_not_wait_for_each_other(monkeypatch):
  hosts.check_joined()
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  with pytest.raises(UserError, match="process 0 of 4 .* have not joined"):
    hosts.check_joined()


def process(does="count", how="auto", tpu=False, **env):
  return {"does": does, "how": how, "tpu": tpu, "env": env}


@functools.cache
def runs(folder):
  """All runs of two processes at once: what each process ended with and said."""
  def given(does, **env):
    address = f"{HOST}:{free_port()}"
    return [process(does, f"{address},2,{index}", **env) for index in range(2)]

  with contextlib.ExitStack() as stack:
    def of_gke(index):
      return metadata_server(tpu_env="")

    def two(platform, metadata=None):
      port = free_port() if platform is not slurm else 65535 - os.getpid() % 2**11
      found = [platform(index, port) if platform else {"JAX_COORDINATOR_PORT": str(port)}
               for index in range(2)]
      if metadata:
        found = [v | stack.enter_context(metadata(index)) for index, v in enumerate(found)]
      return [process(tpu=metadata is not None, **variables) for variables in found]

    asked = {
      "SLURM": two(slurm), "Open MPI": two(open_mpi), "Kubernetes": two(kubernetes),
      "TPU VM": two(None, tpu_vm), "TPU VM, two slices": two(None, tpu_vm_slices),
      "GKE": two(gke, of_gke), "GKE, two slices": two(gke_slices, of_gke),
      "first dies": given("first_dies"), "second dies": given("second_dies"),
      "share": given("share", CHECKPOINTS=str(folder / "checkpoints")),
      "one is missing": given("count", PATIENCE="2")[:1],
    }
    done = subprocess.run(
      [sys.executable, str(WORKER)], input=json.dumps(asked), capture_output=True, text=True,
      env=os.environ | {"PYTHONPATH": str(WORKER.parents[2]), "JAX_PLATFORMS": "cpu"})
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.fixture
def found(common):
  return runs(common)


@pytest.mark.slow
@pytest.mark.parametrize("platform", [
  "SLURM", "Open MPI", "Kubernetes", "TPU VM", "TPU VM, two slices", "GKE", "GKE, two slices"])
def test_processes_join_as_their_platform_says(found, platform):
  for index, (status, said) in enumerate(found[platform]):
    assert status == 0, said
    assert json.loads(said.splitlines()[-1]) == [index, 2]


@pytest.mark.slow
def test_a_process_that_had_joined_and_dies_is_gone(found):
  for killed, name in enumerate(("first dies", "second dies")):
    assert found[name][killed][0] == -9
    status, said = found[name][1 - killed]
    last = said.splitlines()[-1]
    assert status == 75 and last.startswith(f"rfmedsam2: process {killed} "), said
    assert "is gone" in last and "not joined" not in said


@pytest.mark.slow
def test_a_process_that_waits_in_vain_has_not_joined(found):
  ((status, said),) = found["one is missing"]
  last = said.splitlines()[-1]
  assert status == 2 and "process 0 of 2 has not joined: not all processes have come" in last
  assert f" {HOST}:" in last and "in 2 s" in last and "gone" not in last


@pytest.mark.slow
def test_rows_and_checkpoints_of_processes_that_share_slices(found):
  for status, said in found["share"]:
    assert status == 0, said
    assert json.loads(said.splitlines()[-1]) == {"apart": True, "rows": True, "restored": True}
