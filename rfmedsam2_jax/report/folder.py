"""The report: a folder of pages that a browser opens from a disk, without a server or a network.

Out: index.html, a page and the volumes of each case, report.json with the numbers.
"""

import dataclasses
import importlib.resources
import json
import math
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Progress, Report, silent
from rfmedsam2_jax.data.datasets import Labels
from rfmedsam2_jax.data.files import replacing_whole
from rfmedsam2_jax.data.names import own_name
from rfmedsam2_jax.evaluation.scores import Scores, as_dict, gathered, label_map_files
from rfmedsam2_jax.report import niivue
from rfmedsam2_jax.report.cases import LAST, CaseReport, find_image, report_case
from rfmedsam2_jax.report.plots import box_plot, css_colour
from rfmedsam2_jax.report.predictions import Prediction, labels_of, read_predictions
from rfmedsam2_jax.report.runs import RunSummary, read_run
from rfmedsam2_jax.report.target import MARK, is_taken

_STATIC = ("style.css", "tables.js", "viewer.js", niivue.LICENSE)


@dataclasses.dataclass(frozen=True)
class Written:
  """What was made."""

  index: Path
  cases: list[CaseReport]  # worst first
  scores: Scores | None  # of the predictions, None without references
  remarks: list[str]  # what is missing or damaged
  volumes_bytes: int  # of the viewers' volumes

  @property
  def warnings(self) -> list[str]:
    """What is unusual in the cases, as `predict` said it."""
    return [f"{case.name}: {notice.message}" for case in self.cases for notice in case.warnings]


def write_report(
  out: Path, run: Path | None = None, predictions: Path | None = None,
  references: Path | None = None, images: Path | None = None, overwrite: bool = False,
  voxels: int = 20_000_000, progress: Report = silent,
) -> Written:
  """Writes the report of a run, of predictions, or of both.

  Args:
    references: folder of label maps with the cases' names, maybe fewer. images: of the inputs.
    overwrite: replace a report that lies at `out`.
    voxels: that a viewer shows at most, larger volumes are thinned; 0 leaves the viewers out.

  Raises:
    UserError: nothing to report, folders that are missing or do not fit, `out` in use.
  """
  for folder in (run, predictions, references, images):
    if folder is not None and not folder.is_dir():
      raise UserError(f"{folder}: is not a folder; check the path")
  if is_taken(out) and not overwrite:
    raise UserError(f"{out}: is a report already; choose another folder, or overwrite it")
  summary = read_run(run) if run else None
  found = read_predictions(predictions) if predictions else []
  labels = summary.plan.labels if summary and summary.plan else labels_of(found)
  truths = label_map_files(references) if references else {}
  if truths and found and not any(case.name in truths for case in found):
    raise UserError(
      f"{references}: has no label map of any case (looked for {found[0].name} and "
      f"{len(found) - 1} more); give the folder of their references"
    )
  bundle = niivue.bundle() if voxels and found else None
  missing = f"the viewer (NiiVue) is not installed: {niivue.ADVICE}"
  no_viewer = missing if voxels and found and not bundle else None
  with replacing_whole(out) as folder:
    folder.mkdir()
    cases, size = _write_cases(
      folder, found, labels, truths, images, voxels if bundle else 0, progress
    )
    remarks = [f"{case.name}: {text}" for case in cases for text in case.problems]
    remarks += [*(summary.remarks if summary else ()), *([no_viewer] if no_viewer else [])]
    written = Written(out / "index.html", cases, _scores(cases), remarks, size)
    title = own_name(predictions) if predictions else summary.name if summary else ""
    told = {"title": title, "referenced": bool(truths), "no_viewer": no_viewer}
    _write_pages(folder, written, summary, told)
    if bundle:
      shutil.copyfile(bundle, folder / "static" / niivue.FILE)
    _write_numbers(folder, written, summary)
  return written


def _write_numbers(folder: Path, written: Written, run: RunSummary | None) -> None:
  """report.json: what the pages say, for a program."""
  content = {
    "made_by": f"rfmedsam2 report {version('rfmedsam2-jax')}",
    "run": run.name if run else None,
    "scores": as_dict(written.scores) if written.scores else None,
    "warnings": [{"case": c.name, **dataclasses.asdict(w)} for c in written.cases
                 for w in c.warnings],
    "remarks": written.remarks,
    "cases": [{"case": c.name, "page": f"cases/{c.page}.html"} for c in written.cases],
  }
  text = json.dumps(content, indent=1, allow_nan=False)
  (folder / MARK).write_text(text + "\n", encoding="utf-8")


def _write_cases(
  folder: Path, found: list[Prediction], labels: Labels | None, truths: Mapping[str, Path],
  images: Path | None, voxels: int, progress: Report,
) -> tuple[list[CaseReport], int]:
  """Scores every case and writes its volumes; the cases, worst first, and the volumes' bytes."""
  said = Progress("cases", progress)
  cases, size = [], 0
  for number, prediction in enumerate(found, 1):
    # As a part of a file name on every system and in every address.
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", prediction.name)[:60]
    page = f"{number:0{len(str(len(found)))}d}-{name}"
    image = find_image(images, prediction) if images else None
    reference = truths.get(prediction.name)
    case, layers = report_case(prediction, page, labels, reference, image, voxels)
    if truths and not reference:
      case.problems.append("has no reference; it is not scored")
    if images and not image:
      case.problems.append("its image is not in the folder of images")
    if layers is not None:
      (folder / "volumes").mkdir(exist_ok=True)
      text = f"window.reportCase = {json.dumps(layers, allow_nan=False)};\n"
      size += (folder / "volumes" / f"{page}.js").write_text(text, encoding="utf-8")
    cases.append(case)
    said(number, len(found))
  return sorted(cases, key=_worst_first), size


def _worst_first(case: CaseReport) -> tuple:
  """What should be looked at first: what failed, then low Dice or else low predicted IoU."""
  sure = case.dice if case.dice is not None else case.predicted_iou
  return sure is not None, case.dice is None, sure or 0.0, case.name


def _scores(cases: list[CaseReport], stage: int = LAST) -> Scores | None:
  """Scores after one stage of the cases that have them; None if none has."""
  of_cases = {c.name: c.stage_scores[stage] for c in cases if stage in c.stage_scores}
  names = dict.fromkeys(name for scores in of_cases.values() for name in scores)
  return gathered(of_cases, names) if of_cases else None


def _block(scores: Scores, stages: Mapping[int, Scores]) -> dict[str, Any]:
  """What a template shows of scores: means, box plots, and the Dice of every stage."""
  def values(key: str) -> dict[str, list[tuple[str, float]]]:
    return {name: [(case, getattr(found[name], key)) for case, found in scores.cases.items()]
            for name in scores.structures}

  plots = [box_plot("Dice", values("dice"), 1.0), box_plot("HD95, mm", values("hd95"))]
  return {
    "scores": scores,
    "rows": [(name, scores.of_structure(name), css_colour(i), scores.unmatched(name))
             for i, name in enumerate(scores.structures)],
    "mean": scores.mean, "plots": [plot for plot in plots if plot],
    "stages": {
      n: {name: found.of_structure(name).dice for name in found.structures} | {"": found.mean.dice}
      for n, found in stages.items()
    },
  }


def _number(value: Any, digits: int = 3) -> str:
  """A number for a person; a dash where there is no statement."""
  return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _write_pages(
  folder: Path, written: Written, run: RunSummary | None, told: dict[str, Any]
) -> None:
  """index.html, a page of each case, and what they load; `told` goes to the templates as it is."""
  templates = jinja2.Environment(
    loader=jinja2.PackageLoader("rfmedsam2_jax.report"), autoescape=True, trim_blocks=True,
    lstrip_blocks=True, undefined=jinja2.StrictUndefined,
  )
  templates.filters["number"] = _number
  cases = written.cases
  stages = sorted({n for case in cases for n in case.stage_scores} - {LAST})
  by_stage = {n: found for n in stages if (found := _scores(cases, n))}
  validation = dict(enumerate(run.validation)) if run else {}
  scored = [case for case in cases if case.dice is not None]
  values = {
    **told, "cases": cases, "remarks": written.remarks, "run": run, "bundle": niivue.FILE,
    "made_by": f"rfmedsam2 {version('rfmedsam2-jax')}",
    "result": _block(written.scores, by_stage) if written.scores else None,
    "validation": _block(validation[max(validation)], validation) if validation else None,
    "worst": scored[:3], "best": scored[:-4:-1] if len(scored) > 3 else [],
    "pages": {case.name: f"cases/{case.page}.html" for case in cases},
  }
  index = templates.get_template("index.html").render(values, root="")
  (folder / "index.html").write_text(index, encoding="utf-8")
  if cases:
    (folder / "cases").mkdir()
  page = templates.get_template("case.html")
  values |= {"root": "../", "colours": css_colour}
  for before, case, after in zip([None, *cases], cases, [*cases[1:], None], strict=False):
    text = page.render(values, case=case, before=before, after=after)
    (folder / "cases" / f"{case.page}.html").write_text(text, encoding="utf-8")
  (folder / "static").mkdir()
  static = importlib.resources.files("rfmedsam2_jax.report") / "static"
  for name in _STATIC:
    (folder / "static" / name).write_bytes((static / name).read_bytes())
