"""`rfmedsam2 serve`: a local web page and an HTTP API: prompt a volume, track, correct, segment
automatically, save."""

import argparse
import os
import re
import secrets
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.kept import no_run, run_at
from rfmedsam2_jax.base.places import BUILTIN, word_or_path
from rfmedsam2_jax.cli.console import Console

if TYPE_CHECKING:
  from rfmedsam2_jax.serve.api import Pages

KEY_VARIABLE = "RFMEDSAM2_KEY"
_KEY = re.compile(r"[!-~]{16,512}")  # what a header holds, and nobody guesses


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("checkpoint", type=word_or_path, nargs="?", default=BUILTIN,
      help="made by rfmedsam2 convert or train, or the name of fetched weights or of an installed "
      "tracker (the built-in weights)")
  add("--folder", type=Path, help="whose volumes can be opened")
  add("--model", type=word_or_path, action="append", default=[], metavar="NAME|RUN",
      help="for automatic segmentation: a run, or an installed model; may be given several times")
  add("--key-file", type=Path, metavar="FILE",
      help=f"holds the key that programs send (or it stands in {KEY_VARIABLE}; one is made for "
      "other hosts than this machine)")
  add("--port", type=int, default=8765, help="0 takes a free one (8765)")
  add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
  add("--image-size", type=int, help="side of the square (the checkpoint's)")
  add("--zoom", type=float, metavar="FACTOR",
      help="side of the cut around each structure, in sides of what its prompts enclose; 0: whole "
      "slices (2 for networks trained so, else 0)")
  add("--single-mask", action="store_true",
      help="one mask per slice instead of the best of three, for networks trained so")
  add("--keep", type=int, default=3, help="volumes that stay open (3)")
  add("--max-upload", type=int, default=1024, help="MiB of an upload (1024)")
  add("--max-voxels", type=int, default=500, help="millions of voxels of a volume (500)")


def run(options: argparse.Namespace, console: Console) -> None:
  _check(options)
  key = _key(options.key_file)
  with _listen(options.host, options.port) as listening:
    import uvicorn

    from rfmedsam2_jax.serve.app import make_app
    from rfmedsam2_jax.serve.guard import LOOPBACK
    pages = _pages(options, console)
    local, token, made = options.host in LOOPBACK, secrets.token_urlsafe(24), None
    if not local and key is None:
      key = made = secrets.token_urlsafe(24)
    app = make_app(pages, options.host, token, key)
    if not local:
      console.line(f"WARNING: {options.host} can be reached by other machines. Whoever has the "
                   "address below or the key sees the folder's volumes, and everything travels "
                   "unencrypted.")
    name = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{name}:{listening.getsockname()[1]}/#{token}"
    said = [address, "open it in a browser; Ctrl-C ends", *([f"key: {made}"] if made else [])]
    console.result("\n".join(said), {"address": address, **({"key": made} if made else {})})
    server = uvicorn.Server(uvicorn.Config(
      app, log_level="warning", access_log=False, server_header=False, lifespan="off",
      timeout_graceful_shutdown=1))
    console.on_interruption("interrupted; what was not saved is lost")
    server.run(sockets=[listening])


def _pages(options: argparse.Namespace, console: Console) -> "Pages":
  """Networks and what they are asked through."""
  from rfmedsam2_jax.data.names import own_name
  from rfmedsam2_jax.model import load
  from rfmedsam2_jax.nn import SAM2
  from rfmedsam2_jax.prompted.files import at_side
  from rfmedsam2_jax.serve.api import Pages
  from rfmedsam2_jax.serve.automatic import by_name
  from rfmedsam2_jax.serve.studio import Studio
  from rfmedsam2_jax.tracking import TrackingConfig
  from rfmedsam2_jax.weights.checkpoint import load_checkpoint
  from rfmedsam2_jax.weights.single_file import builtin_words
  sam2, params, _ = load_checkpoint(options.checkpoint)
  if options.checkpoint == BUILTIN:
    console.line(f"{builtin_words()}; CHECKPOINT brings another")
  models = by_name([load(model) for model in options.model])
  several = not options.single_mask
  # One object per batch: one program for any number of labels; most trackings follow one.
  config = TrackingConfig(multimask=several, dynamic_multimask=several, objects_per_batch=1)
  studio = Studio(SAM2(at_side(sam2, options.image_size)), params, config, options.keep,
                  options.max_voxels * 10**6, prepare=True, zoom=options.zoom)
  folder = options.folder.resolve() if options.folder else None
  return Pages(studio, folder, options.max_upload << 20, own_name(options.checkpoint), models)


def _key(file: Path | None) -> str | None:
  """The key of the file or of the environment; UserError for what cannot be one."""
  if file is None:
    if (found := os.environ.get(KEY_VARIABLE)) is None:
      return None
    said = KEY_VARIABLE
  else:
    said = f"--key-file {file}"
    try:
      found = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
      why = error.strerror if isinstance(error, OSError) else "it is no text"
      raise UserError(f"{said}: cannot be read ({why}); write one line of text into it") from None
  if not _KEY.fullmatch(found):
    raise UserError(f"{said}: is no key; give 16 to 512 letters, digits and signs without spaces, "
                    "such as openssl rand -hex 24 prints")
  return found


def _check(options: argparse.Namespace) -> None:
  """UserError for what can be seen to be wrong before the network is loaded."""
  for package in ("fastapi", "uvicorn"):
    if find_spec(package) is None:
      raise UserError(f"serve needs {package}; install it: pip install 'rfmedsam2-jax[serve]'")
  if options.checkpoint != BUILTIN:
    from rfmedsam2_jax.weights.named import checkpoint_at, no_checkpoint
    if not checkpoint_at(options.checkpoint).exists():
      raise no_checkpoint(options.checkpoint)
  for model in options.model:
    if not (run_at(model) / "config.yaml").is_file():
      raise no_run(model)
  if options.folder is not None and not options.folder.is_dir():
    raise UserError(f"--folder {options.folder}: is no folder; name one that holds volumes")
  for name in ("keep", "max_upload", "max_voxels"):
    if getattr(options, name) < 1:
      raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: give 1 or more")
  if (size := options.image_size) is not None and (size < 64 or size % 32):
    raise UserError(f"--image-size {size}: give a multiple of 32 from 64 on")
  from rfmedsam2_jax.data.cuts import check_zoom
  check_zoom(options.zoom)


def _listen(host: str, port: int) -> socket.socket:
  """A bound socket; UserError if the port is taken or the address is none of this machine."""
  if not 0 <= port <= 65535:
    raise UserError(f"--port {port}: give 0 to 65535")
  try:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                             flags=socket.AI_PASSIVE)[0]
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, dualstack_ipv6=both)
  except (OSError, OverflowError) as error:
    why = str(error).split(" (while")[0]
    raise UserError(f"--host {host} --port {port}: cannot listen there ({why}); "
                    "choose another port, or 0 for a free one") from None
