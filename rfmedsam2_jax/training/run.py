"""A whole run: from a config to two trained networks and their scores, or to a tracker.

The data set's plan and preprocessing (own_data), the generator, its prompts for the refiner's
cases, the tracker, the refiner, validation; or the tracker alone. What an interrupted attempt has
finished is skipped.
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from rfmedsam2_jax.base.addresses import copy_of, unique
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import PRINTED, Report, duration, silent
from rfmedsam2_jax.config import Config, config_tree, config_yaml, load_config
from rfmedsam2_jax.data.datasets import Dataset
from rfmedsam2_jax.data.plan import Plan
from rfmedsam2_jax.data.run_folder import RunFolder, versions
from rfmedsam2_jax.data.splits import divide
from rfmedsam2_jax.model import untrained
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.parallel import hosts
from rfmedsam2_jax.parallel.devices import divide_cpu
from rfmedsam2_jax.parallel.mesh import make_mesh
from rfmedsam2_jax.report.curves import save_curves
from rfmedsam2_jax.training import own_data, tracker_data
from rfmedsam2_jax.training import train_networks as networks
from rfmedsam2_jax.training.lock import bring_run, open_run
from rfmedsam2_jax.training.loop import Training
from rfmedsam2_jax.training.own_data import OwnData
from rfmedsam2_jax.training.phases import (
  PHASES,
  PhaseName,
  check_batches,
  phase_names,
  tracker_phases,
)
from rfmedsam2_jax.training.validation import validate_run
from rfmedsam2_jax.weights.checkpoint import check_starting_point, load_checkpoint
from rfmedsam2_jax.weights.single_file import located

_LOG = logging.getLogger(__name__)


def train(
  config: Config, out: str | Path, resume: bool = False, overwrite: bool = False,
  report: Report = PRINTED, profile: bool = False, warn: Callable[[str], None] = _LOG.warning,
) -> dict[str, Any]:
  """Trains generator and refiner and scores the held-out cases; or the tracker alone.

  Several processes that train one run call it within `parallel.hosts.watching`. profile: leave a
  trace of a few steps of each phase in `profile/`. warn: told in a line what of the data set's
  folders is no case.

  Returns:
    The content of validation.json; empty without validation cases and for a tracker alone.

  Raises:
    UserError: a folder in use or not to be overwritten, unreadable data, a loss that is not finite.
  """
  # What can be known to fail does so now, not after the generator.
  out = copy_of(out, "written")
  own = own_data.read_own(config, out, resume)
  of_tracker = tracker_data.read_sources(config) if config.tracker.parts else []
  if own is not None:
    _divided(config, own)
  if not divide_cpu(config.mesh.cpu_devices):
    report(f"mesh.cpu_devices is {config.mesh.cpu_devices}, but JAX runs already, with "
           f"{jax.local_device_count()}: they stay")
  hosts.check_joined()
  mesh = make_mesh(config.mesh)
  check_batches(config, phase_names(config), mesh)
  if not resume:
    _check_starting_points(config, out)
  with _open_run(out, resume, overwrite, report) as run:
    if not run.writes:
      report = silent
    if own is not None and run.writes:
      own_data.say_unused(own, config.data.split, report, warn)
    if resume:
      _check_same_config(run, config)
    else:
      run.write("config.yaml", config_yaml(config))
      run.write("versions.json", json.dumps(versions(), indent=1) + "\n")
    began = time.monotonic()
    about = {"config": config_tree(config), "versions": versions()}
    plan, result = None, {}
    if own is not None:
      own_data.check_contents(run, own, config.data.dataset, report)
      plan = own_data.plan_of(run, own, config.plan, report)
      about["labels"] = dataclasses.asdict(plan.labels)
    about = json.loads(json.dumps(about))
    training = Training(run, mesh, config.seed, [], about, report, profile)
    if plan is not None and own is not None and not config.tracker_alone:
      result = _train_all(config, training, plan, own, of_tracker)
    else:
      if plan is not None and own is not None:
        own_data.prepare(run, plan, own, config.seed, report)
      _train_tracker(config, training, of_tracker)
      _save_curves(run)
    report(f"done after {duration(time.monotonic() - began)}: {run.path}")
    return result


def _divided(config: Config, own: OwnData) -> tuple[list[str], list[str]]:
  """The training cases of the generator and of the refiner."""
  return divide(
    own.split.train, config.refiner.held_back, config.seed, config.data.split.group)


def _check_starting_points(config: Config, out: Path) -> None:
  for source in filter(None, (config.tracker.init_from, config.refiner.init_from)):
    check_starting_point(source, config.sam2)
    load_checkpoint(source)  # whole and finite
    if unique(located(source)).is_relative_to(unique(out)):
      raise UserError(f"{source}: lies in the run that is to be written; train into another folder")


def _train_all(
  config: Config, training: Training, plan: Plan, own: OwnData,
  of_tracker: Sequence[Dataset | None],
) -> dict[str, Any]:
  """All phases of a run; gives the scores of its held-out cases."""
  run, report = training.run, training.report
  for_generator, for_refiner = _divided(config, own)
  segmenter = untrained(config, plan)
  names: list[PhaseName] = ["generator", *phase_names(config)]
  phases = {name: PHASES[name](config, plan) for name in names if name != "tracker"}
  networks.check_generator(run, phases["generator"])
  own_data.prepare(run, plan, own, config.seed, report)
  held_out = own.cases(own.split.validation)
  training = training._replace(held_out=held_out)
  segmenter = networks.train_generator(training, phases["generator"], segmenter, for_generator)
  networks.write_prompts(run, segmenter, for_refiner, report)
  tracker = _train_tracker(config, training, of_tracker) if "tracker" in names else None
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
  return networks.train_tracker(training, tracker_phases(config), config.sam2, names)


def _save_curves(run: RunFolder) -> None:
  if run.writes and run.logged():  # nothing where nothing had steps
    save_curves(run / "log.jsonl", run / "curves.png")


@contextlib.contextmanager
def _open_run(
  out: Path, resume: bool, overwrite: bool, report: Report
) -> Iterator[RunFolder]:
  """The run's folder, in every process; the first one holds the lock and writes."""
  with contextlib.ExitStack() as stack:
    run = RunFolder(out, writes=False)
    with hosts.together():
      if hosts.is_main():
        run = stack.enter_context(open_run(out, resume, overwrite, report))
    with hosts.together():
      if not run.writes:
        bring_run(out)
    try:
      yield run
    finally:
      run.sync()


def _check_same_config(run: RunFolder, config: Config) -> None:
  # Where and how fast it is computed may change, and where the data lies; what is computed may not.
  before, replace = load_config(run.config), dataclasses.replace
  before = replace(
    before, mesh=config.mesh,
    data=replace(before.data, loader=config.data.loader, dataset=config.data.dataset),
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
