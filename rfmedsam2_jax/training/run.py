"""A whole run: from a config to two trained networks and their scores, or to a tracker.

Fingerprint and plan, preprocessing, the generator, its prompts for the refiner's cases, the
tracker, the refiner, validation; or the tracker alone. What an interrupted attempt has finished is
skipped.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import PRINTED, Progress, Report, duration, silent
from rfmedsam2_jax.config import Config, config_tree, config_yaml, load_config
from rfmedsam2_jax.data.datasets import Dataset, read_dataset
from rfmedsam2_jax.data.files import save_json
from rfmedsam2_jax.data.fingerprint import make_fingerprint
from rfmedsam2_jax.data.plan import Plan, PlanConfig, load_plan, make_plan, save_plan
from rfmedsam2_jax.data.run_folder import RunFolder, versions
from rfmedsam2_jax.data.splits import Split, SplitConfig, divide, load_split, make_split, save_split
from rfmedsam2_jax.model import untrained
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.parallel import hosts
from rfmedsam2_jax.parallel.devices import divide_cpu
from rfmedsam2_jax.parallel.mesh import make_mesh
from rfmedsam2_jax.report.curves import save_curves
from rfmedsam2_jax.training import tracker_data
from rfmedsam2_jax.training import train_networks as networks
from rfmedsam2_jax.training.lock import open_run
from rfmedsam2_jax.training.loop import Training
from rfmedsam2_jax.training.phases import (
  PHASES,
  PhaseName,
  check_batches,
  phase_names,
  tracker_phase,
)
from rfmedsam2_jax.training.validation import validate_run
from rfmedsam2_jax.weights.checkpoint import check_starting_point


def train(
  config: Config, out: str | Path, resume: bool = False, overwrite: bool = False,
  report: Report = PRINTED, profile: bool = False,
) -> dict[str, Any]:
  """Trains generator and refiner and scores the held-out cases; or the tracker alone.

  Several processes that train one run call it within `parallel.hosts.watching`. profile: leave a
  trace of a few steps of each phase in `profile/`.

  Returns:
    The content of validation.json; empty without validation cases and for a tracker alone.

  Raises:
    UserError: a folder in use or not to be overwritten, unreadable data, a loss that is not finite.
  """
  # What can be known to fail does so now, not after the generator.
  own = _own_data(config, Path(out), resume)
  parts = divide(own[1].train, config.refiner.held_back, config.seed) if own else None
  of_tracker = tracker_data.read_sources(config) if config.tracker.loop.steps else []
  if not divide_cpu(config.mesh.cpu_devices):
    report(f"mesh.cpu_devices is {config.mesh.cpu_devices}, but JAX runs already, with "
           f"{jax.local_device_count()}: they stay")
  mesh = make_mesh(config.mesh)
  check_batches(config, phase_names(config), mesh)
  for source in filter(None, (config.tracker.init_from, config.refiner.init_from)):
    if resume:
      break
    check_starting_point(source, config.sam2)
    if Path(source).absolute().is_relative_to(Path(out).absolute()):
      raise UserError(f"{source}: lies in the run that is to be written; train into another folder")
  with _open_run(out, resume, overwrite) as run:
    if not run.writes:
      report = silent
    if resume:
      _check_same_config(run, config)
    else:
      run.write("config.yaml", config_yaml(config))
      run.write("versions.json", json.dumps(versions(), indent=1) + "\n")
    began = time.monotonic()
    about = {"config": config_tree(config), "versions": versions()}
    plan = None
    if own is not None:
      plan = _plan(run, *own, config.plan, report)
      about["labels"] = dataclasses.asdict(plan.labels)
    about = json.loads(json.dumps(about))
    training = Training(run, mesh, config.seed, [], about, report, profile)
    result = {}
    if plan and own and parts and not config.tracker_alone:
      result = _train_all(config, training, plan, own, parts, of_tracker)
    else:
      _prepare(run, plan, own, config, report)
      _train_tracker(config, training, of_tracker)
      _save_curves(run)
    report(f"done after {duration(time.monotonic() - began)}: {run.path}")
    return result


def _own_data(config: Config, out: Path, resume: bool) -> tuple[Dataset, Split] | None:
  """The config's data set and how its cases are split, if it is needed."""
  if not config.needs_dataset:
    return None
  dataset = read_dataset(config.data.dataset, config.data.structures)
  return dataset, _split(out, dataset, config.data.split, resume)


def _train_all(
  config: Config, training: Training, plan: Plan, own: tuple[Dataset, Split],
  parts: tuple[Sequence[str], Sequence[str]], of_tracker: Sequence[Dataset | None],
) -> dict[str, Any]:
  """All phases of a run, on these parts of its cases for generator and refiner; gives the scores of
  its held-out cases."""
  run, report, (dataset, split) = training.run, training.report, own
  for_generator, for_refiner = parts
  segmenter = untrained(config, plan)
  names: list[PhaseName] = ["generator", *phase_names(config)]
  phases = {name: PHASES[name](config, plan) for name in names}
  networks.check_generator(run, phases["generator"])
  _prepare(run, plan, own, config, report)
  cases = {case.identifier: case for case in dataset.cases}
  held_out = [cases[name] for name in split.validation]
  training = training._replace(held_out=held_out)
  segmenter = networks.train_generator(training, phases["generator"], segmenter, for_generator)
  networks.write_prompts(run, segmenter, for_refiner, report)
  tracker = _train_tracker(config, training, of_tracker) if "tracker" in phases else None
  segmenter = networks.train_refiner(
    training, phases.get("mask_adapter"), phases["refiner"], segmenter, for_refiner, tracker)
  _save_curves(run)
  return validate_run(run, segmenter, held_out, report)


def _train_tracker(
  config: Config, training: Training, datasets: Sequence[Dataset | None]
) -> Params:
  run = training.run
  tracker_data.prepare_sources(run, config, datasets, training.report)
  names = tracker_data.case_names(run.path, config)
  return networks.train_tracker(training, tracker_phase(config), config.sam2, names)


def _save_curves(run: RunFolder) -> None:
  if run.writes:
    save_curves(run.path / "log.jsonl", run.path / "curves.png")


def _split(out: Path, dataset: Dataset, config: SplitConfig, resume: bool) -> Split:
  """The split that a run to be resumed has, or a new one."""
  identifiers = [case.identifier for case in dataset.cases]
  path = out / "splits.json"
  if not (resume and path.exists()):
    return make_split(identifiers, config)
  split = load_split(path)
  if gone := sorted({*split.train, *split.validation} - set(identifiers)):
    raise UserError(f"{path}: case {gone[0]} is no longer in the data set; put it back or train "
                    "into another folder")
  return split


@contextlib.contextmanager
def _open_run(out: str | Path, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
  """The run's folder, in every process; the first one holds the lock and writes."""
  with contextlib.ExitStack() as stack:
    run = RunFolder(out, writes=False)
    with hosts.together():
      if hosts.is_main():
        run = stack.enter_context(open_run(out, resume, overwrite))
    yield run


def _check_same_config(run: RunFolder, config: Config) -> None:
  # Where and how fast it is computed may change; what is computed may not.
  before, replace = load_config(run.config), dataclasses.replace
  before = replace(
    before, mesh=config.mesh, data=replace(before.data, loader=config.data.loader),
    generator=replace(before.generator, remat=config.generator.remat),
    sam2=replace(before.sam2, remat=config.sam2.remat))
  if before != config:
    old, new = _flat(config_tree(before)), _flat(config_tree(config))
    key = next(key for key in sorted(old | new) if old.get(key) != new.get(key))
    raise UserError(f"{run.path}: was made with {key}={old.get(key)}, not {new.get(key)}; resume "
                    "it with the config that it has, or train into another folder")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  if isinstance(tree, dict):
    return {k: v for key, item in tree.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
  if isinstance(tree, list | tuple) and any(isinstance(item, dict) for item in tree):
    return _flat(dict(enumerate(tree)), prefix)
  return {prefix[:-1]: tree}


def _plan(
  run: RunFolder, dataset: Dataset, split: Split, config: PlanConfig, report: Report
) -> Plan:
  """Writes split, fingerprint (of the training cases alone) and plan where they are missing."""
  with hosts.together():
    if run.writes and not (run / "splits.json").exists():
      save_split(run / "splits.json", split)
    if run.writes and not (run / "plan.json").exists():
      train_cases = [case for case in dataset.cases if case.identifier in set(split.train)]
      fingerprint = make_fingerprint(
        dataset, train_cases, progress=Progress("fingerprint, cases", report))
      save_json(run / "fingerprint.json", fingerprint)
      save_plan(run / "plan.json", make_plan(fingerprint, config))
  plan = load_plan(run / "plan.json")
  size = " x ".join(map(str, plan.patch_size))
  report(f"plan: {plan.name}, spacing {plan.spacing} mm, patch {size}, "
         f"{len(plan.labels.structures)} structures")
  return plan


def _prepare(
  run: RunFolder, plan: Plan | None, own: tuple[Dataset, Split] | None, config: Config,
  report: Report,
) -> None:
  """Preprocesses the training cases of the run's own data set, if there is one."""
  if plan is None or own is None:
    return
  began, (dataset, split) = time.monotonic(), own
  cases = {case.identifier: case for case in dataset.cases}
  tracker_data.store_cases(
    run / "preprocessed", [cases[name] for name in split.train], dataset, plan, config.seed, report)
  report(f"prepared {len(split.train)} training cases, {duration(time.monotonic() - began)}")
