"""The quickstart: phantoms, training, prediction of unseen ones, scores and a picture.

Everything that a user does with data of their own, on data that the package generates.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import PRINTED, Progress, Report, below
from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.data.files import replacing
from rfmedsam2_jax.data.phantom import PhantomConfig, write_phantom
from rfmedsam2_jax.data.volumes import load_image, load_label_map
from rfmedsam2_jax.evaluation.scores import Scores, as_dict, evaluate_folders, save_scores, table
from rfmedsam2_jax.model import load
from rfmedsam2_jax.report.contact_sheet import SheetCase, save_contact_sheet
from rfmedsam2_jax.report.folder import write_report
from rfmedsam2_jax.segmentation.predict import predict
from rfmedsam2_jax.segmentation.segmenter import Segmenter
from rfmedsam2_jax.training.run import train


def _title(stage: int) -> str:
  return f"stage {stage}" if stage else "generator"


def quickstart(
  config: Path,
  overrides: Sequence[str],
  out: Path,
  resume: bool = False,
  overwrite: bool = False,
  report: Report = PRINTED,
  warn: Report = print,
) -> dict[str, Any]:
  """Runs all of it in the folder `out`.

  Returns:
    mean Dice per stage on the unseen phantoms, None where it is undefined.

  Raises:
    UserError: `out` is in use or not to be overwritten.
  """
  settings = load_config(config, [*overrides, f"data.dataset={out / 'phantoms'}"])
  if out.exists() and any(out.iterdir()) and not (resume or overwrite):
    raise UserError(f"{out}: is not empty; go on with --resume or start anew with --overwrite")
  dataset = out / "phantoms"
  if not (dataset / "dataset.json").exists():
    write_phantom(dataset, PhantomConfig(seed=settings.seed), Progress("phantoms", report))
    report(f"phantoms: {dataset}")
  run = out / "run"
  started = (run / "config.yaml").exists()
  train(settings, run, resume and started, overwrite, report)

  model = load(run)
  predictions = out / "predictions"
  predict(
    model, [dataset / "imagesTs"], predictions, save_stages=True, overwrite=True,
    progress=below(report, "unseen phantoms: "),
    warn=lambda case, message: warn(f"{case}: {message}"),
  )
  stages: list[Scores] = []
  for stage in range(model.stages):
    folder = predictions / f"stage{stage}"
    progress = Progress(f"scores of {_title(stage)}, cases", report)
    stages.append(
      evaluate_folders(folder, dataset / "labelsTs", model.plan.labels, progress=progress)
    )
    save_scores(folder / "scores.json", stages[-1])
  save_scores(predictions / "scores.json", stages[-1])
  report("unseen phantoms, after the last stage:")
  for line in table(stages[-1]).splitlines():
    report(line)
  means = {f"stage{stage}": as_dict(scores)["mean"]["dice"] for stage, scores in enumerate(stages)}
  with replacing(out / "scores.json") as temporary:
    temporary.write_text(json.dumps(means, indent=1) + "\n")
  sheet = _picture(model, dataset, predictions, out / "contact_sheet.png")
  report(f"picture: {sheet}")
  pages = write_report(
    out / "report", run, predictions, dataset / "labelsTs", dataset / "imagesTs", overwrite=True,
    progress=report,
  )
  for remark in pages.remarks:
    warn(remark)
  report(f"pages for a browser: {pages.index}")
  return means


def _picture(model: Segmenter, dataset: Path, predictions: Path, path: Path) -> Path:
  """A contact sheet of two unseen phantoms, a column per stage."""
  cases = []
  for image in sorted((dataset / "imagesTs").glob("*.nii.gz"))[:2]:
    name = image.name.removesuffix("_0000.nii.gz")
    volume = load_image(image)
    maps = {
      _title(stage): load_label_map(
        predictions / f"stage{stage}" / f"{name}.nii.gz", volume.geometry
      )
      for stage in range(model.stages)
    }
    truth = load_label_map(dataset / "labelsTs" / f"{name}.nii.gz", volume.geometry)
    cases.append(SheetCase(name, volume.array[0], truth, maps, volume.spacing))
  return save_contact_sheet(path, cases, model.plan.labels.structures)
