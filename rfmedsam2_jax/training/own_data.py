"""The data set of a run: how its cases are split, that they are still the same, and their plan.

In: `data` and `plan` of a config. Out: cases in `preprocessed/` of the run's folder.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rfmedsam2_jax.base.buckets import fetched
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Progress, Report, duration
from rfmedsam2_jax.config import Config
from rfmedsam2_jax.data.contents import (
  CaseContent,
  Contents,
  case_content,
  check_case,
  check_description,
)
from rfmedsam2_jax.data.datasets import Dataset, read_case, read_dataset
from rfmedsam2_jax.data.files import load_json, save_json
from rfmedsam2_jax.data.fingerprint import Fingerprint, make_fingerprint
from rfmedsam2_jax.data.layouts import Case
from rfmedsam2_jax.data.names import some
from rfmedsam2_jax.data.plan import Plan, PlanConfig, load_plan, make_plan, save_plan
from rfmedsam2_jax.data.preprocessing import prepare_atoms, preprocess, save_case, stored_cases
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.data.splits import Split, SplitConfig, load_split, make_split, save_split
from rfmedsam2_jax.parallel import hosts


class OwnData(NamedTuple):
  """A run's data set and how it is split."""

  dataset: Dataset
  split: Split

  def cases(self, identifiers: Sequence[str]) -> list[Case]:
    """The cases of these names."""
    known = {case.identifier: case for case in self.dataset.cases}
    return [known[name] for name in identifiers]


def read_own(config: Config, out: Path, resume: bool) -> OwnData | None:
  """The config's data set, if it is needed, with the split that a run to be resumed has."""
  if not config.needs_dataset:
    return None
  dataset = read_dataset(config.data.dataset, config.data.structures)
  return OwnData(dataset, _split(out, dataset, config.data.split, resume))


def say_unused(
  own: OwnData, config: SplitConfig, report: Report, warn: Callable[[str], None]
) -> None:
  """Says which cases a file of splits does not name, and what of the folders is no case."""
  if config.file and (spare := _unused(*own)):
    report(f"{config.file}: {len(spare)} of {len(own.dataset.cases)} cases neither train nor "
           f"validate: {some(spare, 5)}")
  for line in own.dataset.left_out:
    warn(str(line))


def _split(out: Path, dataset: Dataset, config: SplitConfig, resume: bool) -> Split:
  """The split that a run to be resumed has, or a new one."""
  identifiers = [case.identifier for case in dataset.cases]
  path = fetched(out / "splits.json")
  if not (resume and path.exists()):
    return make_split(identifiers, config)
  split = load_split(path)
  if gone := sorted({*split.train, *split.validation} - set(identifiers)):
    raise UserError(f"{path}: case {gone[0]} is no longer in the data set; put it back or train "
                    "into another folder")
  return split


def _unused(dataset: Dataset, split: Split) -> list[str]:
  used = {*split.train, *split.validation}
  return [case.identifier for case in dataset.cases if case.identifier not in used]


def check_contents(run: RunFolder, own: OwnData, source: str, report: Report) -> None:
  """Keeps what the cases hold in cases.json; of a run that has it, they must hold it still."""
  dataset, split = own
  path, begun = run / "cases.json", run / "fingerprint.json"
  known: Contents | Fingerprint | None = None
  if path.exists():
    known = load_json(path, Contents)
  elif begun.exists():
    known = load_json(begun, Fingerprint)
    report(f"{run.path}: was begun without digests of its cases; only channels and labels are "
           "compared")
  if known is not None:
    check_description(dataset, known.channels, known.labels, Path(source) / "dataset.json")
  before = known.cases if isinstance(known, Contents) else {}
  found: dict[str, CaseContent] = {}

  def read(case: Case) -> None:
    now = case_content(case, before.get(case.identifier))
    check_case(case, now, before.get(case.identifier))
    found[case.identifier] = now

  mine = {*split.train, *split.validation}
  cases = [case for case in dataset.cases if case.identifier in mine]
  hosts.each(cases, read, Progress("contents, cases", report))
  contents = {name: content for part in hosts.gather(found) for name, content in part.items()}
  if run.writes and contents != before:
    save_json(path, Contents(dataset.channels, dataset.labels, contents))


def plan_of(run: RunFolder, own: OwnData, config: PlanConfig, report: Report) -> Plan:
  """Writes split, fingerprint (of the training cases alone) and plan where they are missing."""
  dataset, split = own
  with hosts.together():
    if run.writes and not (run / "splits.json").exists():
      save_split(run / "splits.json", split)
    if run.writes and not (run / "plan.json").exists():
      train_cases = [case for case in dataset.cases if case.identifier in set(split.train)]
      write_plan(run.path, dataset, train_cases, config, Progress("fingerprint, cases", report))
  plan = load_plan(run / "plan.json")
  size = " x ".join(map(str, plan.patch_size))
  seen = f", the generator's {plan.generator_spacing} mm" if plan.generator_spacing else ""
  report(f"plan: {plan.name}, spacing {plan.spacing} mm{seen}, patch {size}, "
         f"{len(plan.labels.structures)} structures")
  return plan


def write_plan(
  folder: Path, dataset: Dataset, cases: Sequence[Case], config: PlanConfig, progress: Progress
) -> None:
  """Writes fingerprint and plan of these cases into a folder."""
  fingerprint = make_fingerprint(dataset, cases, progress=progress)
  save_json(folder / "fingerprint.json", fingerprint)
  save_plan(folder / "plan.json", make_plan(fingerprint, config))


def prepare(run: RunFolder, plan: Plan, own: OwnData, seed: int, report: Report) -> None:
  """Preprocesses the training cases, as far as that is not done."""
  began, names = time.monotonic(), own.split.train
  places = {run.prepared(plan, of_generator): plan.of_generator if of_generator else plan
            for of_generator in (True, False)}
  store_cases(places, own.cases(names), own.dataset, seed, report)
  report(f"prepared {len(names)} training cases, {duration(time.monotonic() - began)}")


def store_cases(
  places: Mapping[Path, Plan], cases: Sequence[Case], dataset: Dataset, seed: int, report: Report
) -> None:
  """Preprocesses cases into folders, by a plan each; those that one does not have yet."""
  stored = {folder: set(stored_cases(folder)) for folder in places}

  def store(case: Case) -> None:
    missing = {folder: plan for folder, plan in places.items()
               if case.identifier not in stored[folder]}
    if not missing:
      return
    volume, atoms = read_case(case, len(dataset.channels), dataset.labels)
    for said in volume.geometry.remarks:
      report(f"warning: {case.identifier}: {said}")
    assert atoms is not None, "training cases have labels"
    for folder, plan in missing.items():
      prepared = preprocess(volume, plan)
      save_case(folder, case.identifier, prepared, prepare_atoms(atoms, plan, prepared.restore),
                plan.labels, seed)

  hosts.each(cases, store, Progress("preprocessing, cases", report))
