"""`rfmedsam2 models`: list the installed models and the fetched weights."""

import argparse
from typing import Any

from rfmedsam2_jax.base.errors import UserError, printable
from rfmedsam2_jax.base.kept import home, names, shelf
from rfmedsam2_jax.cli.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
  """None but those of every command."""


def run(options: argparse.Namespace, console: Console) -> None:
  models = [_model(name) for name in names("models")]
  weights = [_weights(name) for name in names("weights")]
  lines = [f"in {home()}:"]
  for row in models:
    about = ", ".join(row["structures"]) or "a tracker, for track and serve"
    lines.append(_line(row, f"model    {row['name']}: {about}"))
  for row in weights:
    lines.append(_line(row, f"weights  {row['name']}: {row.get('file', '')}"))
  if not (models or weights):
    lines.append("nothing; rfmedsam2 install brings a model, rfmedsam2 fetch published weights")
  console.result("\n".join(lines), {"home": home(), "models": models, "weights": weights})


def _line(row: dict[str, Any], begin: str) -> str:
  if "damage" in row:
    return printable(f"{begin.partition(':')[0]}: {row['damage']}")
  return printable(f"{begin}; {row['megabytes']} MB, licence: {row['licence']}")


def _model(name: str) -> dict[str, Any]:
  from rfmedsam2_jax.archive.manifest import NAME, read_manifest
  row = _row("models", name) | {"structures": ()}
  try:
    found = read_manifest((shelf("models") / name / NAME).read_bytes())
    return row | {"structures": found.structures, "channels": found.channels,
                  "networks": found.networks, "licence": found.licence}
  except (OSError, ValueError) as error:
    return row | {"damage": f"cannot be read ({error}); install it again with --overwrite"}


def _weights(name: str) -> dict[str, Any]:
  from rfmedsam2_jax.weights.fetched import note_of
  row = _row("weights", name)
  try:
    found = note_of(shelf("weights") / name)
    return row | {"file": found.file, "sha256": found.sha256, "sha256_known": found.known,
                  "licence": found.licence}
  except UserError as error:
    return row | {"damage": f"{error}; fetch it again with --overwrite"}


def _row(kind: Any, name: str) -> dict[str, Any]:
  folder = shelf(kind) / name
  size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
  return {"name": name, "folder": str(folder), "megabytes": round(size / 1e6, 1)}
