"""The report: a folder of pages that a browser opens from a disk, without a server or a network.

In: a run, predictions, references and images. Out: index.html, a page and the volumes of each case,
report.json with the numbers.
"""

import dataclasses
import importlib.resources
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Progress
from rfmedsam2_jax.data.datasets import Labels
from rfmedsam2_jax.data.files import read_json, replacing_whole
from rfmedsam2_jax.evaluation.metrics import Score
from rfmedsam2_jax.evaluation.scores import Scores, as_dict, label_maps
from rfmedsam2_jax.report import niivue
from rfmedsam2_jax.report.cases import LAST, CaseReport, examine_case, find_image
from rfmedsam2_jax.report.plots import box_plot, css_colour
from rfmedsam2_jax.report.predictions import Prediction, labels_of, read_predictions
from rfmedsam2_jax.report.runs import RunSummary, read_run

MARK = "report.json"  # a folder with it is a report and may be replaced by another
_STATIC = ("style.css", "tables.js", "viewer.js", niivue.LICENSE)


@dataclasses.dataclass(frozen=True)
class Written:
  """What was made.

  Attributes:
    cases: in the report's order, worst first.
    scores: of the predictions, None without references.
    warnings: what is unusual in the cases, as `predict` said it.
    remarks: what is missing or damaged.
    volumes_bytes: of the viewers' volumes.
  """

  index: Path
  cases: tuple[CaseReport, ...]
  scores: Scores | None
  warnings: tuple[str, ...]
  remarks: tuple[str, ...]
  volumes_bytes: int


def write_report(
  out: Path,
  run: Path | None = None,
  predictions: Path | None = None,
  references: Path | None = None,
  images: Path | None = None,
  overwrite: bool = False,
  voxels: int = 20_000_000,
  progress: Callable[[str], None] = lambda line: None,
) -> Written:
  """Writes the report of a run, of predictions, or of both.

  Args:
    references: folder of label maps with the cases' names; they may be fewer than the cases.
    images: folder of the inputs.
    overwrite: replace a report that lies at `out`.
    voxels: that a viewer shows at most, larger volumes are thinned; 0 leaves the viewers out.

  Raises:
    UserError: nothing to report, folders that are missing or do not fit, `out` in use.
  """
  for folder in (run, predictions, references, images):
    if folder is not None and not folder.is_dir():
      raise UserError(f"{folder}: is not a folder; check the path")
  _may_write(out, overwrite)
  summary = read_run(run) if run else None
  found = read_predictions(predictions) if predictions else []
  labels = summary.plan.labels if summary and summary.plan else labels_of(found)
  truths = label_maps(references) if references else {}
  if truths and found and not any(case.name in truths for case in found):
    raise UserError(
      f"{references}: has no label map of any case (looked for {found[0].name} and "
      f"{len(found) - 1} more); give the folder of their references"
    )
  viewer = _Viewer(bool(voxels and found))
  with replacing_whole(out) as folder:
    folder.mkdir()
    cases, size = _write_cases(
      folder, found, labels, truths, images, voxels if viewer.bundle else 0, progress
    )
    remarks = [f"{case.name}: {text}" for case in cases for text in case.problems]
    remarks += [*(summary.remarks if summary else ()), *viewer.remarks]
    title = predictions.resolve().name if predictions else summary.name if summary else ""
    scores = _scores(cases)
    content = {
      "made_by": f"rfmedsam2 report {version('rfmedsam2-jax')}",
      "run": summary.name if summary else None,
      "scores": as_dict(scores) if scores else None,
      "warnings": [
        {"case": case.name, "kind": w.kind, "message": w.message}
        for case in cases for w in case.warnings
      ],
      "remarks": remarks,
      "cases": [{"case": case.name, "page": f"cases/{case.page}.html"} for case in cases],
    }
    _write_pages(folder, title, cases, scores, summary, references is not None, images is not None,
                 viewer, remarks)
    text = json.dumps(content, indent=1, allow_nan=False)
    (folder / MARK).write_text(text + "\n", encoding="utf-8")
  warned = [f"{case.name}: {w.message}" for case in cases for w in case.warnings]
  return Written(out / "index.html", tuple(cases), scores, tuple(warned), tuple(remarks), size)


class _Viewer:
  """NiiVue's bundle, or why there is none.

  Args:
    wanted: whether any page has a viewer.
  """

  def __init__(self, wanted: bool):
    self.bundle = niivue.bundle() if wanted else None
    self.remarks = (
      (f"the viewer (NiiVue) is not installed: {niivue.ADVICE}",)
      if wanted and self.bundle is None else ()
    )


def _may_write(out: Path, overwrite: bool) -> None:
  """UserError unless `out` is free, or a report that may be replaced."""
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return
  mark = out / MARK
  content = read_json(mark) if mark.is_file() else None
  made_by = str(content.get("made_by")) if isinstance(content, dict) else ""
  if not made_by.startswith("rfmedsam2 report"):
    raise UserError(f"{out}: exists already and is not a report; choose another --out")
  if not overwrite:
    raise UserError(f"{out}: exists already; choose another --out or replace it: --overwrite")


def _write_cases(
  folder: Path, found: list[Prediction], labels: Labels | None, truths: Mapping[str, Path],
  images: Path | None, voxels: int, progress: Callable[[str], None],
) -> tuple[list[CaseReport], int]:
  """Scores every case and writes its volumes; worst first."""
  said = Progress("cases", progress)
  cases, size = [], 0
  for number, prediction in enumerate(found, 1):
    page = f"{number:0{len(str(len(found)))}d}-{_file_name(prediction.name)}"
    image = find_image(images, prediction) if images else None
    case, layers = examine_case(
      prediction, page, labels, truths.get(prediction.name), image, voxels
    )
    missing = []
    if truths and prediction.name not in truths:
      missing.append("has no reference; it is not scored")
    if images and image is None:
      missing.append("its image is not in the folder of images")
    case = dataclasses.replace(case, problems=(*case.problems, *missing))
    if layers is not None:
      (folder / "volumes").mkdir(exist_ok=True)
      text = f"window.reportCase = {json.dumps(layers, allow_nan=False)};\n"
      size += (folder / "volumes" / f"{page}.js").write_text(text, encoding="utf-8")
    cases.append(dataclasses.replace(case, has_viewer=layers is not None))
    said(number, len(found))
  return sorted(cases, key=_worst_first), size


def _worst_first(case: CaseReport) -> tuple:
  """What should be looked at first: what failed, then low Dice or else low predicted IoU."""
  sure = case.dice if case.dice is not None else case.predicted_iou
  return sure is not None, case.dice is None, sure or 0.0, case.name


def _file_name(name: str) -> str:
  """A case's name as a part of a file name on every system and in every address."""
  return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]


def _scores(cases: list[CaseReport], stage: int = LAST) -> Scores | None:
  """Scores of the cases that have them, after one stage."""
  of_cases = {c.name: c.stage_scores[stage] for c in cases if stage in c.stage_scores}
  if not of_cases:
    return None
  names = tuple(dict.fromkeys(name for scores in of_cases.values() for name in scores))
  absent = Score(math.nan, math.nan, math.nan, 0.0, 0.0)
  return Scores(
    names, 1.0, {c: {n: s.get(n, absent) for n in names} for c, s in of_cases.items()}
  )


def _block(scores: Scores, stages: Mapping[int, Scores]) -> dict[str, Any]:
  """What a template shows of scores: means, box plots, and the Dice of every stage."""
  def values(key: str) -> dict[str, list[tuple[str, float]]]:
    return {
      name: [(case, getattr(found[name], key)) for case, found in scores.cases.items()]
      for name in scores.structures
    }

  plots = [box_plot("Dice", values("dice"), 1.0), box_plot("HD95, mm", values("hd95"))]
  return {
    "scores": scores,
    "rows": [(name, scores.of_structure(name), css_colour(i), _unmatched(scores, name))
             for i, name in enumerate(scores.structures)],
    "mean": scores.mean,
    "plots": [plot for plot in plots if plot],
    "stages": {
      number: {name: found.of_structure(name).dice for name in found.structures}
      | {"": found.mean.dice}
      for number, found in stages.items()
    },
  }


def _unmatched(scores: Scores, name: str) -> int:
  """Cases in which only one side has the structure; HD95 leaves them out."""
  return sum(c[name].dice == 0 and math.isnan(c[name].hd95) for c in scores.cases.values())


def _number(value: Any, digits: int = 3) -> str:
  """A number for a person; a dash where there is no statement."""
  return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def _write_pages(
  folder: Path, title: str, cases: list[CaseReport], scores: Scores | None,
  summary: RunSummary | None, referenced: bool, imaged: bool, viewer: _Viewer, remarks: list[str],
) -> None:
  loader = jinja2.PackageLoader("rfmedsam2_jax.report")
  templates = jinja2.Environment(
    loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  templates.filters["number"] = _number
  stages = sorted({n for case in cases for n in case.stage_scores if n != LAST})
  by_stage = {n: found for n in stages if (found := _scores(cases, n))}
  validation = dict(enumerate(summary.validation)) if summary else {}
  scored = [case for case in cases if case.dice is not None]
  values: dict[str, Any] = {
    "title": title, "made_by": f"rfmedsam2 {version('rfmedsam2-jax')}", "cases": cases,
    "run": summary, "referenced": referenced, "imaged": imaged, "remarks": remarks,
    "viewer": viewer, "advice": niivue.ADVICE, "bundle": niivue.FILE,
    "result": _block(scores, by_stage) if scores else None,
    "validation": _block(validation[max(validation)], validation) if validation else None,
    "worst": scored[:3], "best": scored[:-4:-1] if len(scored) > 3 else [],
    "pages": {case.name: f"cases/{case.page}.html" for case in cases},
  }
  index = templates.get_template("index.html").render(values, root="")
  (folder / "index.html").write_text(index, encoding="utf-8")
  if cases:
    (folder / "cases").mkdir()
  page = templates.get_template("case.html")
  for before, case, after in zip([None, *cases], cases, [*cases[1:], None], strict=False):
    text = page.render(
      values, root="../", case=case, before=before, after=after, colours=css_colour
    )
    (folder / "cases" / f"{case.page}.html").write_text(text, encoding="utf-8")
  (folder / "static").mkdir()
  static = importlib.resources.files("rfmedsam2_jax.report") / "static"
  for name in _STATIC:
    (folder / "static" / name).write_bytes((static / name).read_bytes())
  if viewer.bundle is not None:
    shutil.copyfile(viewer.bundle, folder / "static" / niivue.FILE)
