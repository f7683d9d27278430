"""The model card that an archive has where nobody wrote one: what the run's own files know."""

from collections.abc import Sequence

from rfmedsam2_jax.archive.manifest import LICENCE, Manifest
from rfmedsam2_jax.config import Config
from rfmedsam2_jax.data.files import read_json
from rfmedsam2_jax.data.plan import Plan
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.weights.checkpoint import Checkpoint

_UNKNOWN = "*not said*"


def card_of(
  run: RunFolder, config: Config | None, plan: Plan | None, tracker: Checkpoint | None,
  manifest: Manifest,
) -> str:
  """Markdown with the headings of docs/templates/model_card.md that a program can fill.

  config, plan: of a run. tracker: where there is one; without a config it is all of the model.
  """
  rows = [("networks", ", ".join(manifest.networks))]
  if config is not None:
    rows += [("SAM 2", f"images of {config.sam2.image_size} pixels, "
                       f"{len(config.refinement.stages)} stages")]
  elif tracker is not None:
    rows += [("SAM 2", f"images of {tracker.config.image_size} pixels")]
  if plan is not None:
    spacing = " x ".join(f"{x:g}" for x in plan.spacing)
    values = ", ".join(f"{value} {name}" for value, name in plan.labels.value_names.items())
    rows += [("input", ", ".join(f"{c.name} ({c.kind})" for c in plan.channels)),
             ("output", values), ("grid inside", f"{spacing} mm")]
    if plan.generator_spacing:
      coarse = " x ".join(f"{x:g}" for x in plan.generator_spacing)
      rows += [("grid of the generator", f"{coarse} mm")]
  made_with = read_json(run / "versions.json") if (run / "versions.json").is_file() else {}
  rows += [("made with", ", ".join(f"{k} {v}" for k, v in made_with.items())),
           ("started from", _started_from(run) or ("random weights" if config else _UNKNOWN))]
  table = "\n".join(f"| {key} | {value} |" for key, value in rows)
  return "\n\n".join([
    f"# Model card: {manifest.name}", f"| | |\n|---|---|\n{table}",
    f"## Intended use\n\n{_UNKNOWN}", f"## Out of scope\n\n{_UNKNOWN}",
    "## No medical device\n\nIt is not a medical device, has no clearance or certificate of any "
    "kind, and was not validated for clinical use.",
    f"## Training data\n\n{_cases(run)}", f"## Results\n\n{_results(run)}",
    f"## Limits and known failures\n\n{_UNKNOWN}",
    f"## Licence\n\n{manifest.licence} ({LICENCE})"]) + "\n"


def _started_from(run: RunFolder) -> str:
  said = []
  for name in ("init_from.json", "generator_init_from.json", "tracker_init_from.json"):
    if not (run / name).is_file():
      continue
    about = read_json(run / name)
    source = about.get("source", {}) if isinstance(about, dict) else {}
    # Names and digests; where it lay is nobody's business.
    files = source.get("sha256", {}) if isinstance(source, dict) else {}
    files = files if isinstance(files, dict) else {}
    said += [f"{file}, SHA-256 {digest}" for file, digest in files.items()] or ["other weights"]
  return "; ".join(said)


def _cases(run: RunFolder) -> str:
  splits = read_json(run / "splits.json") if (run / "splits.json").is_file() else {}
  counts = [f"{len(cases)} cases, {key}" for key, cases in splits.items()
            if isinstance(cases, list)]
  return "; ".join(counts) or _UNKNOWN


def _results(run: RunFolder) -> str:
  """Mean Dice of the held-out cases, per structure and stage."""
  path = run / "validation.json"
  stages = read_json(path) if path.is_file() else {}
  try:
    names: Sequence[str] = list(next(iter(stages.values()))["structures"])
    rows = [f"| {stage} | " + " | ".join(
      _number(scores["structures"][name]["dice"]) for name in names) + " |"
      for stage, scores in stages.items()]
  except (StopIteration, KeyError, TypeError, AttributeError):
    return _UNKNOWN
  head = f"| mean Dice, held-out cases | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"
  return "\n".join([head, *rows])


def _number(dice: float | None) -> str:
  return "" if dice is None else f"{dice:.4f}"
