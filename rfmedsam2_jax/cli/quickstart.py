"""`rfmedsam2 quickstart`: generate phantoms, train on them, segment unseen ones, score and picture
them; then track the structures of one from three boxes each, with the built-in weights."""

import argparse
import importlib.resources
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.places import BUILTIN
from rfmedsam2_jax.base.progress import Progress, below
from rfmedsam2_jax.cli.console import Console

if TYPE_CHECKING:
  from rfmedsam2_jax.evaluation.scores import Scores


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("overrides", nargs="*", help="values of the config, by path")
  add("--out", type=Path, default=Path("demo"), help="folder (demo)")
  add("--resume", action="store_true", help="go on where it stopped")
  add("--overwrite", action="store_true", help="start anew")


def run(options: argparse.Namespace, console: Console) -> None:
  out, resume = options.out, options.resume
  if out.exists() and not out.is_dir():
    raise UserError(f"{out}: is no folder; choose another --out")
  if out.exists() and any(out.iterdir()) and not (resume or options.overwrite):
    raise UserError(f"{out}: is not empty; go on with --resume or start anew with --overwrite")
  from rfmedsam2_jax.config import load_config
  from rfmedsam2_jax.data.phantom import PhantomConfig, write_phantom
  from rfmedsam2_jax.report.folder import write_report
  from rfmedsam2_jax.training.run import train
  dataset, trained = out / "phantoms", out / "run"
  file = Path(__file__).parents[2] / "configs/quickstart.yaml"
  if not file.is_file():  # in no clone, but installed
    file = Path(str(importlib.resources.files("rfmedsam2_jax.configs") / file.name))
  config = load_config(file, [*options.overrides, f"data.dataset={dataset}"])
  if not (dataset / "dataset.json").exists():
    write_phantom(dataset, PhantomConfig(seed=config.seed), Progress("phantoms", console.line))
    console.line(f"phantoms: {dataset}")
  resume = resume and (trained / "config.yaml").exists()
  train(config, trained, resume, options.overwrite, console.line, warn=console.warning)
  means, mended, agreement = _predicted(out, console)
  pages = write_report(out / "report", trained, out / "predictions", dataset / "labelsTs",
                       dataset / "imagesTs", overwrite=True, progress=console.line)
  for remark in pages.remarks:
    console.warning(remark)
  tracked = _tracked(out, console)
  each = "  ".join(f"{k} {v:.4f}" for k, v in means.items() if v is not None)
  console.result(
    f"mean Dice of unseen phantoms: {each}\n{mended}\nof the structures of one, tracked by the "
    f"built-in weights from three boxes each: {tracked:.4f}\nall results: {out}; open "
    f"{pages.index} in a browser",
    {"out": out, "dice": means, "iou_rank_correlation": agreement, "tracked": tracked})


def _predicted(out: Path, console: Console) -> tuple[dict[str, float | None], str, float | None]:
  """Segments, scores and pictures unseen phantoms.

  Returns:
    Mean Dice per stage, None where undefined; lines with that of every structure by the generator
    and after the last stage, and with what `_agreement` gives, which comes last.
  """
  from rfmedsam2_jax.data.files import replacing
  from rfmedsam2_jax.data.volumes import load_image, load_label_map
  from rfmedsam2_jax.evaluation.scores import as_dict, evaluate_folders, save_scores, table
  from rfmedsam2_jax.model import load
  from rfmedsam2_jax.report.contact_sheet import SheetCase, save_contact_sheet
  from rfmedsam2_jax.segmentation.predict import predict
  images, truths = out / "phantoms/imagesTs", out / "phantoms/labelsTs"
  model, predictions = load(out / "run"), out / "predictions"
  predict(model, [images], predictions, save_stages=True, overwrite=True,
          progress=below(console.line, "unseen phantoms: "),
          warn=lambda case, message: console.warning(f"{case}: {message}"))
  means, stages, found = {}, {}, []
  for stage in range(model.stages):
    title, folder = f"stage {stage}" if stage else "generator", predictions / f"stage{stage}"
    stages[title] = folder
    progress = Progress(f"scores of {title}, cases", console.line)
    scores = evaluate_folders(folder, truths, model.plan.labels, progress=progress)
    save_scores(folder / "scores.json", scores)
    means[folder.name] = as_dict(scores)["mean"]["dice"]
    found.append(scores)
  save_scores(predictions / "scores.json", scores)
  for line in ("unseen phantoms, after the last stage:", *table(scores).splitlines()):
    console.line(line)
  with replacing(out / "scores.json") as temporary:
    temporary.write_text(json.dumps(means, indent=1) + "\n")
  cases = []
  for image in sorted(images.glob("*.nii.gz"))[:2]:
    name, volume = image.name.removesuffix("_0000.nii.gz"), load_image(image)
    maps = {title: load_label_map(folder / f"{name}.nii.gz", volume.geometry)
            for title, folder in stages.items()}
    truth = load_label_map(truths / f"{name}.nii.gz", volume.geometry)
    cases.append(SheetCase(name, volume.array[0], truth, maps, volume.spacing))
  sheet = save_contact_sheet(out / "contact_sheet.png", cases, model.plan.labels.structures)
  console.line(f"picture: {sheet}")
  mended = "  ".join(
    f"{name} {found[0].of_structure(name).dice:.3f} to {scores.of_structure(name).dice:.3f}"
    for name in scores.structures)
  agreement = _agreement(predictions, scores)
  said = "undefined" if agreement is None else f"{agreement:.2f}"
  return means, (f"of every structure, generator to last stage: {mended}\n"
                 f"rank correlation of predicted IoU and Dice: {said}"), agreement


def _agreement(predictions: Path, scores: "Scores") -> float | None:
  """Rank correlation of the predicted IoU of structures with their Dice; None where all are alike.

  By ranks Dice and IoU are one.
  """
  from scipy.stats import spearmanr

  from rfmedsam2_jax.data.files import read_json
  pairs = []
  for name, case in scores.cases.items():
    structures = read_json(predictions / f"{name}.json")["structures"]
    pairs += [(structures[key]["predicted_iou"], score.dice) for key, score in case.items()
              if structures[key]["predicted_iou"] is not None and score.dice == score.dice]
  if not pairs or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
    return None
  return float(spearmanr(*zip(*pairs, strict=True))[0])


def _tracked(out: Path, console: Console) -> float:
  """Mean Dice of the structures of the first unseen phantom, each tracked from three boxes.

  They are the reference's, on the first, the middle and the last slice of the structure.
  """
  import numpy as np

  from rfmedsam2_jax.data.datasets import read_dataset
  from rfmedsam2_jax.data.volumes import load_image, load_label_map
  from rfmedsam2_jax.evaluation.metrics import dice
  from rfmedsam2_jax.prompted.files import open_volume, write_tracked
  from rfmedsam2_jax.prompted.reference_boxes import boxes_of_ends
  from rfmedsam2_jax.tracking import TrackingConfig
  dataset = read_dataset(out / "phantoms")
  image = sorted((out / "phantoms/imagesTs").glob("*.nii.gz"))[0]
  volume = load_image(image)
  name = image.name.replace("_0000.nii.gz", ".nii.gz")
  labels = load_label_map(out / "phantoms/labelsTs" / name, volume.geometry)
  names = {s.values[0]: s.name for s in dataset.labels.structures}
  truth = {value: mask for value in names if (mask := labels == value).any()}
  console.line("tracking: compiling the network")
  prompted = open_volume(BUILTIN, volume, config=TrackingConfig(between=True),
                         progress=Progress("tracked slices", console.line))
  found = prompted.track([box for value in truth for box in boxes_of_ends(truth[value], value)])
  write_tracked(
    out / "tracked", volume, found, {"checkpoint": BUILTIN}, overwrite=True, names=names)
  scores = {names[value]: dice(found.labels == value, mask) for value, mask in truth.items()}
  each = "  ".join(f"{name} {score:.4f}" for name, score in scores.items())
  console.line(f"tracked from three boxes each, Dice: {each}")
  return float(np.mean(list(scores.values())))
