"""A finished run, or a checkpoint, as one zip file that needs neither its data nor the machine that
it was made on.

Weights are float32 in safetensors, bit for bit those of the run. The same run gives the same bytes.
"""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from rfmedsam2_jax.archive.card import card_of
from rfmedsam2_jax.archive.manifest import (
  CARD,
  FORMAT,
  LICENCE,
  NAME,
  Manifest,
  entry_of,
  json_bytes,
  read_manifest,
)
from rfmedsam2_jax.archive.portable import check_portable, portable_config, portable_fingerprint
from rfmedsam2_jax.base.errors import UserError, printable
from rfmedsam2_jax.base.kept import check_name, run_at
from rfmedsam2_jax.base.progress import Passing, Report, silent
from rfmedsam2_jax.config import Config, config_yaml, load_config
from rfmedsam2_jax.data.files import read_json, replacing, sha256_of
from rfmedsam2_jax.data.names import own_name
from rfmedsam2_jax.data.plan import Plan
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.model import load
from rfmedsam2_jax.segmentation.segmenter import Segmenter
from rfmedsam2_jax.weights.checkpoint import Checkpoint, config_json, load_checkpoint
from rfmedsam2_jax.weights.fetched import NOTE, note_of
from rfmedsam2_jax.weights.generator import generator_json
from rfmedsam2_jax.weights.single_file import ENDING, located, single_bytes

NO_LICENCE = "not stated"
_NO_LICENCE_TEXT = """No licence is stated for this model. Ask whoever gave it to you before you use
it or pass it on.
"""


class Exported(NamedTuple):
  """sha256: of the file. remarks: what a person should know before passing it on."""

  path: Path
  manifest: Manifest
  sha256: str
  remarks: list[str]


class _Contents(NamedTuple):
  config: Config | None
  plan: Plan | None
  files: dict[str, bytes]
  networks: tuple[str, ...]
  model: Segmenter | None
  tracker: Checkpoint | None


def export(
  source: str | Path, out: str | Path, name: str | None = None, card: Path | None = None,
  licence: str | None = None, programs: bool = False, overwrite: bool = False,
  report: Report = silent,
) -> Exported:
  """Writes the archive `out` of a run, or of a checkpoint of SAM 2, which is a model's tracker.

  Args:
    source: the run's folder, the name of an installed model, or a checkpoint (load_checkpoint).
    name: by which it is to be known; the run's own.
    card: its model card; else `model_card.md` of the run, else one of what the run's files know.
    licence: of the weights: a file with its text, or its name. An installed model has both.
    programs: its functions, too, as programs that run without this package (program_files).

  Raises:
    UserError: no finished run, an archive that exists, a text that names a place of this machine.
  """
  out, (run, checkpoint) = Path(out), _opened(source)
  name = name or own_name(run.path).removesuffix(ENDING)
  check_name(name, "--name ")
  if out.suffix != ".zip":
    raise UserError(f"{out}: must end in .zip; give it such a name")
  if out.exists() and not (overwrite and out.is_file()):
    raise UserError(f"{out}: exists; replace it with --overwrite or choose another name")
  report(Passing(f"reading {run.path}"))
  contents = _contents(source, run, checkpoint)
  plan, added = contents.plan, {}
  if programs:
    from rfmedsam2_jax.archive.program_files import program_files
    added = program_files(contents.model, contents.tracker, contents.files, report)
  said, text = _licence(run, contents.tracker) if licence is None else _stated(licence)
  manifest = Manifest(
    FORMAT, name, contents.networks, tuple(c.name for c in plan.channels) if plan else (),
    tuple(plan.labels.names) if plan else (), said, {})
  by_hand = card or next((run / x for x in _cards(run) if (run / x).is_file()), None)
  words = _read(by_hand) if by_hand else card_of(
    run, contents.config, plan, contents.tracker, manifest)
  files = contents.files | added | {CARD: words.encode(), LICENCE: text.encode()}
  manifest = dataclasses.replace(
    manifest, files={path: entry_of(content) for path, content in sorted(files.items())})
  files = {NAME: json_bytes(manifest), **dict(sorted(files.items()))}
  _check(files, run, by_hand, licence)
  report(Passing(f"writing {out}"))
  with replacing(out) as temporary:
    write_zip(temporary, files)
    digest = sha256_of(temporary)
  remarks = []
  if said == NO_LICENCE:
    remarks.append("no licence is stated; say under which others may use it: --licence")
  if not by_hand:
    remarks.append("its model card says only what the run's files know; write one: --card")
  return Exported(out, manifest, digest, remarks)


def write_zip(path: Path, files: dict[str, bytes]) -> None:
  """A zip file whose bytes depend on nothing but names, their order and contents."""
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    for name, content in files.items():
      info = zipfile.ZipInfo(name)  # of 1980
      info.create_system, info.external_attr = 3, 0o644 << 16
      archive.writestr(info, content)


def _opened(source: str | Path) -> tuple[RunFolder, Path | None]:
  """The folder of a run; where it is none, a checkpoint that is all of the model."""
  run = RunFolder(run_at(source))
  if run.config.exists():
    return run, None
  if (run / NAME).is_file() and run.params("tracker").exists():  # installed, once a checkpoint
    return run, run.params("tracker")
  place = located(source)
  if place.is_file() or (place / "about").is_dir():
    return RunFolder(place), place
  return run, None


def _contents(source: str | Path, run: RunFolder, checkpoint: Path | None) -> _Contents:
  """What a finished run, or a checkpoint, needs to be loaded again, after it was loaded."""
  files: dict[str, bytes] = {}
  tracker, model, followed = checkpoint or run.params("tracker"), None, None
  config = load_config(run.config, trained=True) if run.config.exists() else None
  if checkpoint:
    plan, networks = None, ["tracker"]
  elif config is not None and config.tracker_alone:
    if not tracker.exists():
      raise UserError(f"{source}: its tracker is not trained yet; resume its training")
    plan, networks = None, ["tracker"]
  else:
    model = load(source)
    config, plan = load_config(run.config, trained=True), model.plan
    networks = ["generator", "refiner", *(["tracker"] if tracker.exists() else [])]
    files["plan.json"] = json_bytes(plan)
    if model.fingerprint is not None:
      files["fingerprint.json"] = json_bytes(portable_fingerprint(model.fingerprint))
    structures = [[s.name, s.values] for s in plan.labels.structures]
    about = {"generator": generator_json(model.unet, len(plan.channels), structures)}
    files["generator/params.safetensors"] = _weights(model.generator, about)
    about = {"sam2": config_json(model.sam2.config)}
    files["refiner/params.safetensors"] = _weights(model.refiner, about)
  if "tracker" in networks:
    followed = load_checkpoint(tracker)
    files["tracker/params.safetensors"] = _weights(
      followed.params, {"sam2": config_json(followed.config)})
  if config is not None:
    config = portable_config(config)
    files["config.yaml"] = config_yaml(config).encode()
  if (run / "versions.json").is_file():
    files["versions.json"] = json_bytes(read_json(run / "versions.json"))
  return _Contents(config, plan, files, tuple(networks), model, followed)


def _weights(params: Any, about: dict[str, Any]) -> bytes:
  return single_bytes(params, about, "float32", "weights")


def _cards(run: RunFolder) -> list[str]:
  return ["model_card.md", *([CARD] if (run / NAME).is_file() else [])]


def _licence(run: RunFolder, checkpoint: Checkpoint | None) -> tuple[str, str]:
  """The licence of an installed model, or that a checkpoint knows of, in a line and as a text; a
  run has none."""
  if (run / NAME).is_file():
    return read_manifest((run / NAME).read_bytes()).licence, _read(run / LICENCE)
  if (run / NOTE).is_file():
    stated = note_of(run.path).licence
  else:
    stated = str(checkpoint.about.get("licence", "")).strip() if checkpoint else ""
  if stated:
    return printable(stated), f"{stated}\n"
  return NO_LICENCE, _NO_LICENCE_TEXT


def _stated(given: str) -> tuple[str, str]:
  """What a person says of the licence, in a line and as a text."""
  if Path(given).is_file():
    text = _read(Path(given))
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return printable(first)[:80] or NO_LICENCE, text
  if "/" in given or not given.strip():
    raise UserError(f"--licence {given}: is no file; give the file of its text, or a name such as "
                    "CC-BY-4.0")
  return printable(given), f"{given}\n"


def _check(files: dict[str, bytes], run: RunFolder, card: Path | None, licence: str | None) -> None:
  """UserError if a text names a place of this machine."""
  places = [run.path.absolute(), run.path.resolve(), Path.cwd()]
  by_hand = {CARD: card, LICENCE: licence}
  for name, content in files.items():
    if not name.endswith((".safetensors", ".jaxexport")):
      written = by_hand.get(name) is not None
      check_portable(str(by_hand[name]) if written else f"{name} of {run.path}",
                     content.decode(), places, written)


def _read(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or "is not text"
    raise UserError(f"{path}: {reason}; give a file of text") from None
