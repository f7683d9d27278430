"""`rfmedsam2 fetch`: download published weights of SAM 2 or MedSAM2; their name is enough then."""

import argparse
from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.kept import names, shelf
from rfmedsam2_jax.base.progress import Passing, Progress
from rfmedsam2_jax.cli.console import Console
from rfmedsam2_jax.weights.published import PUBLISHED, Published, published


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("name", nargs="?", help="of the weights; without it, all names are listed")
  add("--source", choices=("meta", "hub"),
      help="Meta's address, or the Hugging Face hub (Meta's, where it has the file)")
  add("--sha256", metavar="HEX", help="that the file must have, instead of the known one")
  add("--overwrite", action="store_true", help="fetch anew what is there")


def run(options: argparse.Namespace, console: Console) -> None:
  if options.name is None:
    console.result(*_listed())
    return
  console.on_interruption("interrupted; what has arrived is kept")
  if options.name in names("weights") and not options.overwrite:
    folder = shelf("weights") / options.name
    console.result(f"{options.name}: is there already, {folder}", {"folder": folder})
    return
  if options.sha256 is not None and len(options.sha256) != 64:
    raise UserError(f"--sha256 {options.sha256}: is no SHA-256; give 64 hexadecimal digits")
  console.line(f"{options.name}: licence {published(options.name).licence}")
  from rfmedsam2_jax.cli.convert import converter
  from rfmedsam2_jax.weights.fetched import fetch, note_of

  def convert(file: Path, folder: Path, what: Published) -> None:
    home = converter("to_orbax")
    home.to_orbax(file, folder, home.Wanted(config=what.preset, image_size=what.side),
                  report=lambda line: None, progress=lambda line: None)

  progress = Progress("MB", console.line)
  folder = fetch(options.name, convert, options.source, options.sha256,
                 lambda line: console.line(Passing(line)),
                 lambda done, total: progress(done >> 20, max(total >> 20, 1)))
  note = note_of(folder)
  console.result(
    f"{options.name}: fetched into {folder}, licence: {note.licence}\n"
    f"sha256 {note.sha256} ({note.known})\n"
    f"rfmedsam2 track --checkpoint {options.name}, init_from: {options.name}",
    {"name": options.name, "folder": folder, "sha256": note.sha256, "sha256_known": note.known,
     "licence": note.licence, "address": note.address})


def _listed() -> tuple[str, dict[str, object]]:
  """All names, for a person and for a program."""
  here = names("weights")
  rows = [{"name": name, "licence": x.licence, "pinned": bool(x.sha256), "here": name in here}
          for name, x in PUBLISHED.items()]
  lines = [f"{row['name']:25s} {'(here) ' if row['here'] else ''}{row['licence']}" for row in rows]
  return "\n".join(lines), {"published": rows}
