"""Which TPU library JAX may find: none on a machine without a TPU, unless its compiler is wanted.

With `libtpu` installed JAX looks for a TPU before it takes the CPU: where there is none, it writes
lines of C++ to standard error, may ask Google's metadata server and may fail. Nothing here imports
JAX.
"""

import importlib.util
import os
import sys
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError

# By these launchers and images of TPU hosts, or their owner, say that there is a TPU.
_SAID = ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "TPU_NAME", "TPU_ACCELERATOR_TYPE",
         "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "TPU_PROCESS_ADDRESSES", "TPU_VISIBLE_DEVICES",
         "TPU_VISIBLE_CHIPS")
_LIBRARY = "TPU_LIBRARY_PATH"  # importing libtpu sets it, for the programs that are started too
_GOOGLE = "0x1ae0"
_NO_TPU = ("0x0042", "0x001f")  # Google's network card and disk, which its other machines have


def tpu_possible(root: Path = Path("/")) -> bool:
  """Whether this machine may have a TPU, or its environment says what JAX is to use.

  In doubt True: then JAX looks itself. root: of the file system.
  """
  if any(os.environ.get(name) for name in _SAID):
    return True
  # How the drivers show them: up to v4, and from v5e on.
  if any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*")):
    return True
  return any(_read(vendor) == _GOOGLE and _read(vendor.with_name("device")) not in _NO_TPU
             for vendor in root.glob("sys/bus/pci/devices/*/vendor"))


def _read(path: Path) -> str:
  try:
    return path.read_text("ascii").strip()
  except (OSError, ValueError):
    return ""


def hide_libtpu() -> None:
  """Makes JAX, not imported yet, behave as if libtpu were not installed, if there can be no TPU.

  GPUs are found as ever.
  """
  if "libtpu" not in sys.modules and not tpu_possible():
    os.environ.pop(_LIBRARY, None)
    sys.modules["libtpu"] = None  # type: ignore[assignment]  # Python's way to refuse an import


def prepare_tpu_compiler() -> None:
  """Lets JAX, not imported yet, find libtpu as a compiler; UserError without it."""
  if sys.modules.get("libtpu", 0) is None:
    del sys.modules["libtpu"]
  if not os.environ.get(_LIBRARY) and importlib.util.find_spec("libtpu") is None:
    raise UserError("--topology: asks Google's compiler for TPUs, libtpu, which is not installed; "
                    "pip install 'rfmedsam2-jax[tpu-compile]'")
  # What it would ask the machine; any valid host will do, as no program runs.
  os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                 "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
  # A compiler keeps no other program from a TPU, and needs no lock and no log in /tmp.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_LOG_DIR", "disabled")
