"""Stand-ins for the platforms that start several processes: what they set, and what they answer."""

import contextlib
import http.server
import socket
import threading
import types
from collections.abc import Iterator

HOST = "127.0.0.1"


def free_port() -> int:
  with socket.socket() as free:
    free.bind((HOST, 0))
    return free.getsockname()[1]


def slurm(index: int, port: int) -> dict[str, str]:
  job = port - (65535 - 2**12 + 1)  # JAX makes the port of the job's number
  return {
    "SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": HOST, "SLURM_NTASKS": "2",
    "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "SLURM_STEP_NUM_NODES": "1",
  }


def open_mpi(index: int, port: int) -> dict[str, str]:
  return {
    "OMPI_MCA_orte_hnp_uri": f"1;tcp://{HOST}:{port}", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": str(index), "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
    "JAX_COORDINATOR_PORT": str(port),
  }


def gke(index: int, port: int) -> dict[str, str]:
  return {
    "TPU_WORKER_HOSTNAMES": f"{HOST},{HOST}", "TPU_WORKER_ID": str(index),
    "TPU_SKIP_MDS_QUERY": "true", "JAX_COORDINATOR_PORT": str(port),
  }


def gke_slices(index: int, port: int) -> dict[str, str]:
  """A JobSet of two slices, each of one host."""
  return gke(0, port) | {
    "TPU_WORKER_HOSTNAMES": HOST,
    "MEGASCALE_COORDINATOR_ADDRESS": f"{HOST}:8080", "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": str(index),
  }


def kubernetes(index: int, port: int) -> dict[str, str]:
  """JAX asks for a name that only a cluster's DNS has, unless it is told the address."""
  return {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(index),
    "HOSTNAME": "localhost", "JAX_COORDINATOR_ADDRESS": f"{HOST}:{port}",
  }


def kubernetes_client(parallelism: int) -> types.SimpleNamespace:
  """The package `kubernetes`, as far as JAX uses it, in a pod of an indexed Job."""
  name = types.SimpleNamespace
  pod = name(metadata=name(labels={"job-name": "train"}))
  core = name(list_namespaced_pod=lambda **_: name(items=[pod]))
  batch = name(read_namespaced_job=lambda **_: name(spec=name(parallelism=parallelism)))
  client = name(CoreV1Api=lambda: core, BatchV1Api=lambda: batch,
                exceptions=name(ApiException=type("ApiException", (Exception,), {})))
  return name(config=name(load_incluster_config=lambda: None), client=client)


@contextlib.contextmanager
def metadata_server(**attributes: str) -> Iterator[dict[str, str]]:
  """The metadata server of a TPU VM's host; yields the variables that lead JAX to it."""
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
      name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
      text = attributes.get(name.replace("-", "_"))
      known = text is not None and self.headers["Metadata-Flavor"] == "Google"
      self.send_response(200 if known else 404)
      self.end_headers()
      self.wfile.write((text if known else "not found").encode())

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer((HOST, 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield {"GCE_METADATA_IP": f"{HOST}:{server.server_port}"}
    server.shutdown()
    thread.join()


def tpu_vm(index: int, hosts: int = 2, tpu_env: str = ""):
  """The metadata of a host of a slice, to be entered."""
  endpoints = ",".join(f"unknown:unknown:{HOST}" for _ in range(hosts))
  return metadata_server(
    agent_worker_number=str(index), worker_network_endpoints=endpoints, tpu_env=tpu_env)


def tpu_vm_slices(index: int):
  """The metadata of the only host of one of two slices, to be entered."""
  lines = {"MEGASCALE_COORDINATOR_ADDRESS": f"{HOST}:8080", "MEGASCALE_NUM_SLICES": "2",
           "MEGASCALE_SLICE_ID": str(index)}
  return tpu_vm(0, 1, "\n".join(f"{name}: '{value}'" for name, value in lines.items()))
