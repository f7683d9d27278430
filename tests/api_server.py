"""A server of small networks for tests, on loopback, in a thread of the test's process."""

import contextlib
import socket
import threading
import time

import nibabel as nib
import numpy as np
from small_sam2 import MODEL, drawn

from rfmedsam2_jax.tracking import TrackingConfig

TOKEN, KEY = "t0ken", "a-key-of-the-tests"
# Axes in another order and flipped, oblique: nothing is the canonical grid by chance.
COS, SIN = np.cos(0.2), np.sin(0.2)
AFFINE = np.array(
  [[0, -2 * COS, 4 * SIN, 5], [2.5, 0, 0, -7], [0, 2 * SIN, 4 * COS, 9], [0, 0, 0, 1]])


def save_scan(path, shape=(30, 26, 11)):
  """A box of voxels that are brighter, and noise; NIfTI."""
  voxels = np.random.default_rng(0).normal(0, 30, shape)
  voxels[4:12, 6:14, 2:9] += 200
  nib.save(nib.Nifti1Image(voxels.astype(np.int16), AFFINE), path)
  return path


def make_pages(folder, models=None, upload=1 << 20, max_voxels=1_000_000):
  from rfmedsam2_jax.serve.api import Pages
  from rfmedsam2_jax.serve.studio import Studio

  studio = Studio(MODEL, drawn(), TrackingConfig(), keep=2, max_voxels=max_voxels)
  return Pages(studio, folder, upload, "small", models or {})


@contextlib.contextmanager
def served(pages, host="127.0.0.1"):
  """The address of a real server of `pages`."""
  import uvicorn

  from rfmedsam2_jax.serve.app import make_app

  with socket.create_server(("127.0.0.1", 0)) as listening:
    config = uvicorn.Config(make_app(pages, host, TOKEN, KEY), log_level="error", lifespan="off",
                            timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
      time.sleep(0.01)
    try:
      yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
      server.should_exit = True
      thread.join(10)


@contextlib.contextmanager
def documented(folder, run):
  """The server that docs/api.md asks: the volumes of a folder, a run as the model hippocampus."""
  import dataclasses

  from rfmedsam2_jax.model import load
  from rfmedsam2_jax.serve.automatic import by_name

  models = by_name([dataclasses.replace(load(run), name="hippocampus")])
  with served(make_pages(folder, models, upload=1 << 26, max_voxels=10**8)) as address:
    yield address
