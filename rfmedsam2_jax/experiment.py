"""A whole run: from a config to two trained networks and their scores, and back from its folder.

The order of things: fingerprint and plan, preprocessing, the generator, its prompts for the
training cases, the refiner, validation. Each part is skipped where an earlier, interrupted attempt
has finished it.
"""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rfmedsam2_jax.config import Config, config_yaml, load_config
from rfmedsam2_jax.data.datasets import Case, Dataset, read_case, read_dataset
from rfmedsam2_jax.data.files import load_json, replacing, save_json
from rfmedsam2_jax.data.fingerprint import Fingerprint, make_fingerprint
from rfmedsam2_jax.data.pipeline import RunConfig, generator_batches, refiner_batches
from rfmedsam2_jax.data.plan import Plan, load_plan, make_plan, save_plan
from rfmedsam2_jax.data.preprocessing import (
  Prepared,
  load_case,
  prepare_atoms,
  preprocess,
  save_case,
  stored_cases,
)
from rfmedsam2_jax.data.splits import Split, divide, load_split, make_split, save_split
from rfmedsam2_jax.errors import UserError
from rfmedsam2_jax.inference.segmenter import (
  Segmenter,
  run_generator,
)
from rfmedsam2_jax.nn import SAM2, init_params
from rfmedsam2_jax.parallel import hosts
from rfmedsam2_jax.parallel.mesh import check_batch, local_rows, make_mesh
from rfmedsam2_jax.parallel.rules import place, whole
from rfmedsam2_jax.phases import (
  Phase,
  generator_network,
  generator_phase,
  init_generator,
  mask_adapter_phase,
  refiner_phase,
)
from rfmedsam2_jax.progress import PRINTED, Progress, Report, duration
from rfmedsam2_jax.report.contact_sheet import save_contact_sheet
from rfmedsam2_jax.report.curves import save_curves
from rfmedsam2_jax.training.checkpoints import has_checkpoint
from rfmedsam2_jax.training.folder import RunFolder, open_run, versions
from rfmedsam2_jax.training.loop import train_phase
from rfmedsam2_jax.training.state import (
  Params,
  TrainState,
  init_state,
  make_optimizer,
  merge,
  silenced_decoder,
  with_frozen_as,
)
from rfmedsam2_jax.training.step import compile_step, make_step
from rfmedsam2_jax.validation import quick_scores, validate_run
from rfmedsam2_jax.weights.checkpoint import (
  check_starting_point,
  config_json,
  read_config,
  starting_params,
)
from rfmedsam2_jax.weights.generator import check_generator_start, generator_json
from rfmedsam2_jax.weights.orbax import load_params, read_about, save_params


def train(
  config: Config, out: str | Path, resume: bool = False, overwrite: bool = False,
  report: Report = PRINTED, profile: bool = False,
) -> dict[str, Any]:
  """Trains generator and refiner and scores the held-out cases.

  Args:
    profile: leave a trace of a few steps of each phase in `profile/`.

  Returns:
    The content of validation.json; empty without validation cases.

  Raises:
    UserError: a folder in use or not to be overwritten, data that cannot be read, a loss that is
      not finite.
  """
  dataset = read_dataset(config.data.dataset, config.data.structures)
  source = config.refiner.init_from
  if source and not resume:
    check_starting_point(source, config.sam2)  # now, not after the generator
    if Path(source).absolute().is_relative_to(Path(out).absolute()):
      raise UserError(f"{source}: lies in the run that is to be written; train into another folder")
  with _open_run(out, resume, overwrite) as run:
    if not run.writes:
      report = _silent
    if resume:
      _check_same_config(run, config)
    else:
      run.write("config.yaml", config_yaml(config))
      run.write("versions.json", json.dumps(versions(), indent=1) + "\n")
    began = time.monotonic()
    split, plan = _plan(run, dataset, config, report)
    _check_generator(run, config, plan)
    for_generator, for_refiner = divide(split.train, config.refiner.held_back, config.seed)
    cases = {case.identifier: case for case in dataset.cases}
    _preprocess(run, [cases[name] for name in split.train], dataset, plan, config, report)
    held_out = [cases[name] for name in split.validation]
    report(f"prepared {len(split.train)} training cases, {duration(time.monotonic() - began)}")
    segmenter = _generator(run, config, plan, for_generator, held_out, report, profile)
    _write_prompts(run, segmenter, for_refiner, report)
    segmenter = _refiner(run, config, segmenter, for_refiner, held_out, report, profile)
    if run.writes:
      save_curves(run.path / "log.jsonl", run.path / "curves.png")
    result = validate_run(run, segmenter, held_out, report)
    report(f"done after {duration(time.monotonic() - began)}: {run.path}")
    return result


@contextlib.contextmanager
def _open_run(out: str | Path, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
  """The run's folder, in every process; the first one holds the lock and writes."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(hosts.watching())
    with hosts.together():
      if hosts.is_main():
        run = stack.enter_context(open_run(out, resume, overwrite))
      else:
        run = RunFolder(out, writes=False)
    yield run


def _silent(line: str) -> None:
  del line


def load_run(path: str | Path) -> Segmenter:
  """The segmenter of a finished run.

  Raises:
    UserError: no run, or one that is not finished.
  """
  run = RunFolder(path)
  if not run.config.exists():
    raise UserError(f"{path}: is no run (it has no config.yaml); give a folder made by train")
  config = load_config(run.config)
  for phase in ("generator", "refiner"):
    if not run.params(phase).is_dir():
      raise UserError(f"{path}: its {phase} is not trained yet; finish the run with train --resume")
  plan = load_plan(run / "plan.json")
  segmenter = _untrained(config, plan)
  generator = load_params(run.params("generator"), _generator_shapes(segmenter))
  refiner = load_params(run.params("refiner"), _refiner_shapes(segmenter))
  known = run / "fingerprint.json"
  fingerprint = load_json(known, Fingerprint) if known.exists() else None
  if fingerprint is not None and len(fingerprint.channels) != len(plan.channels):
    raise UserError(f"{known}: has {len(fingerprint.channels)} channels, plan.json "
                    f"{len(plan.channels)}; copy both from the run again")
  return dataclasses.replace(
    segmenter,
    generator=generator,
    refiner=refiner,
    name=run.path.resolve().name,
    fingerprint=fingerprint,
  )


def _check_same_config(run: RunFolder, config: Config) -> None:
  # Where and how fast it is computed may change; what is computed may not.
  before = load_config(run.config)
  replace = dataclasses.replace
  before = replace(
    before,
    mesh=config.mesh,
    data=replace(before.data, loader=config.data.loader),
    generator=replace(before.generator, remat=config.generator.remat),
    sam2=replace(before.sam2, remat=config.sam2.remat),
  )
  if before != config:
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(config))
    key = next(key for key in sorted(old | new) if old.get(key) != new.get(key))
    raise UserError(
      f"{run.path}: was made with {key}={old.get(key)}, not {new.get(key)}; resume it with the "
      "config that it has, or train into another folder"
    )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  if isinstance(tree, dict):
    return {k: v for key, item in tree.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
  if isinstance(tree, list | tuple) and any(isinstance(item, dict) for item in tree):
    return _flat(dict(enumerate(tree)), prefix)
  return {prefix[:-1]: tree}


def _plan(run: RunFolder, dataset: Dataset, config: Config, report: Report) -> tuple[Split, Plan]:
  """Split, fingerprint (of the training cases alone) and plan, made once."""
  identifiers = [case.identifier for case in dataset.cases]
  with hosts.together():
    if run.writes and not (run / "splits.json").exists():
      save_split(run / "splits.json", make_split(identifiers, config.data.split))
    if run.writes and not (run / "plan.json").exists():
      train = set(load_split(run / "splits.json").train)
      train_cases = [case for case in dataset.cases if case.identifier in train]
      fingerprint = make_fingerprint(
        dataset, train_cases, progress=Progress("fingerprint, cases", report)
      )
      save_json(run / "fingerprint.json", fingerprint)
      save_plan(run / "plan.json", make_plan(fingerprint, config.plan))
  split = load_split(run / "splits.json")
  gone = sorted({*split.train, *split.validation} - set(identifiers))
  if gone:
    raise UserError(f"{run / 'splits.json'}: case {gone[0]} is no longer in the data set; "
                    "put it back or train into another folder")
  plan = load_plan(run / "plan.json")
  size = " x ".join(map(str, plan.patch_size))
  report(f"plan: {plan.name}, spacing {plan.spacing} mm, patch {size}, "
         f"{len(plan.labels.structures)} structures")
  return split, plan


def _preprocess(
  run: RunFolder,
  cases: Sequence[Case],
  dataset: Dataset,
  plan: Plan,
  config: Config,
  report: Report,
) -> None:
  folder = run / "preprocessed"
  stored = set(stored_cases(folder)) if folder.is_dir() else set()
  progress = Progress("preprocessing, cases", report)
  with hosts.together():
    mine = [case for case in hosts.share(cases) if case.identifier not in stored]
    progress(0, len(mine))
    for done, case in enumerate(mine, 1):
      volume, atoms = read_case(case, len(dataset.channels), dataset.labels)
      assert atoms is not None, "training cases have labels"
      prepared = preprocess(volume, plan)
      save_case(folder, case.identifier, prepared, prepare_atoms(atoms, plan, prepared.restore),
                plan.labels, config.seed)
      progress(done, len(mine))


def _untrained(config: Config, plan: Plan) -> Segmenter:
  channels = len(plan.channels)
  wrong = [channel for channel in config.data.sam_channels if not 0 <= channel < channels]
  if wrong:
    raise UserError(
      f"data.sam_channels: has {wrong[0]}, but images have channels 0 to {channels - 1}"
    )
  return Segmenter(
    plan=plan,
    unet=generator_network(config, plan),
    generator={},
    sam2=SAM2(config.sam2),
    refiner=None,
    refinement=config.refinement,
    inference=config.inference,
    sam_channels=config.data.sam_channels,
    sam_context=config.data.sam_context,
  )


def _generator_shapes(segmenter: Segmenter) -> Any:
  init = functools.partial(init_generator, segmenter.unet, len(segmenter.plan.channels))
  return jax.eval_shape(init, jax.random.key(0))


def _refiner_shapes(segmenter: Segmenter) -> Any:
  return jax.eval_shape(functools.partial(init_params, segmenter.sam2.config), jax.random.key(0))


def _count(params: Any) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def _describe(config: Config, plan: Plan) -> dict[str, Any]:
  structures = [[structure.name, structure.values] for structure in plan.labels.structures]
  return generator_json(generator_network(config, plan), len(plan.channels), structures)


def _about(config: Config, plan: Plan, phase: str) -> dict[str, Any]:
  about = {
    "phase": phase,
    "config": json.loads(json.dumps(dataclasses.asdict(config))),
    "labels": json.loads(json.dumps(dataclasses.asdict(plan.labels))),
    "versions": versions(),
  }
  if phase == "generator":
    return about | {"generator": _describe(config, plan)}
  return about | {"sam2": config_json(config.sam2)}


def _check_generator(run: RunFolder, config: Config, plan: Plan) -> None:
  """Sees to it that the generator can start as the config says, without reading parameters.

  Raises:
    UserError: no checkpoint, one of another network or of other labels, or no steps from scratch.
  """
  settings = config.generator
  if run.params("generator").is_dir() or has_checkpoint(run.checkpoints("generator")):
    return
  if settings.init_from:
    check_generator_start(settings.init_from, _describe(config, plan))
  elif not settings.loop.steps:
    raise UserError("generator.loop.steps: is 0, which leaves a generator from scratch untrained; "
                    "give steps, or a trained one with generator.init_from")


def _train_network(
  phase: Phase,
  run: RunFolder,
  config: Config,
  segmenter: Segmenter,
  train: Sequence[str],
  held_out: Sequence[Case],
  params: Params,
  batches_from: Callable[[Sequence[int], int], Any],
  key: jax.Array,
  report: Report,
  profile: bool,
) -> None:
  """Trains one of the two networks and keeps its final parameters in the run's folder.

  Args:
    train: identifiers of the cases that batches come from.
    params: fresh.
    batches_from: gives an iterator of some rows of a batch and those after it.
  """
  settings, mesh = phase.settings, make_mesh(config.mesh)
  optimizer = make_optimizer(settings.optimizer, settings.loop.steps)
  check_batch(mesh, settings.batch_size, settings.microbatches, phase.name)
  state = place(init_state(params, phase.patterns, optimizer, key), mesh)
  report(
    f"{phase.name}: {_count(params) / 1e6:.2f} M parameters, "
    f"{_count(state.trained) / 1e6:.2f} M of them trained"
  )

  def final(state: TrainState) -> Params:
    kept = state.ema if settings.optimizer.ema_decay else state.trained
    return whole(merge(kept, state.frozen), mesh)

  def validate(state: TrainState, step: int) -> tuple[dict[str, float], Path | None]:
    network = "generator" if phase.name == "generator" else "refiner"
    trained: dict[str, Any] = {network: final(state)}
    some = held_out[: settings.loop.validation_cases]
    scores, shown = quick_scores(dataclasses.replace(segmenter, **trained), some, report)
    if not run.writes or shown is None:
      return scores, None
    path = run / "pictures" / f"{phase.name}-{step:06d}.png"
    return scores, save_contact_sheet(path, [shown], segmenter.plan.labels.structures)

  state = train_phase(
    phase.name,
    run,
    settings.loop,
    state,
    compile_step(
      make_step(phase.loss, optimizer, settings.optimizer, mesh, settings.microbatches),
      state,
      mesh,
    ),
    functools.partial(batches_from, local_rows(mesh, settings.batch_size)),
    mesh,
    train,
    _samples(phase),
    validate if held_out else None,
    report,
    profile,
  )
  save_params(run.params(phase.name), final(state), _about(config, segmenter.plan, phase.name))


def _generator(
  run: RunFolder,
  config: Config,
  plan: Plan,
  train: Sequence[str],
  held_out: Sequence[Case],
  report: Report,
  profile: bool,
) -> Segmenter:
  """Trains the generator, or loads it where it is trained already."""
  segmenter = _untrained(config, plan)
  settings, phase = config.generator, generator_phase(config, plan)
  if not run.params("generator").is_dir():
    init_key, train_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    params = jax.jit(phase.init)(init_key)
    if settings.init_from and not has_checkpoint(run.checkpoints("generator")):
      params = load_params(settings.init_from, params)
      about = read_about(settings.init_from)
      run.write("generator_init_from.json", json.dumps(about, indent=1) + "\n")
      report(f"generator: starts from {settings.init_from}")
    if not settings.loop.steps:
      save_params(run.params("generator"), params, _about(config, plan, "generator"))
      report("generator: used as it is, no steps")
      return dataclasses.replace(segmenter, generator=params)

    def batches_from(rows: Sequence[int], start: int) -> Any:
      return generator_batches(
        run / "preprocessed",
        train,
        plan.patch_size,
        settings.batch_size,
        settings.augmentation,
        config.seed,
        settings.oversample_foreground,
        rows=rows,
        start=start,
        loader=config.data.loader,
      )

    _train_network(
      phase, run, config, segmenter, train, held_out, params, batches_from, train_key, report,
      profile,
    )
  params = load_params(run.params("generator"), _generator_shapes(segmenter))
  return dataclasses.replace(segmenter, generator=params)


def _write_prompts(
  run: RunFolder, segmenter: Segmenter, identifiers: Sequence[str], report: Report
) -> None:
  """The generator's mask logits of the training cases, float16 [K, D, 4G, 4G] each."""
  progress = Progress("prompts of the training cases", report)
  with hosts.together():
    mine = [
      name for name in hosts.share(identifiers) if not (run / "prompts" / f"{name}.npy").exists()
    ]
    progress(0, len(mine))
    for done, identifier in enumerate(mine, 1):
      path = run / "prompts" / f"{identifier}.npy"
      case = load_case(run / "preprocessed", identifier)
      prepared = Prepared(np.asarray(case.image), case.window, case.restore)
      made = run_generator(segmenter, prepared, report)
      with replacing(path) as temporary:
        np.save(temporary, made.prompts.logits)
      progress(done, len(mine))


def _starting_refiner(
  run: RunFolder, config: Config, key: jax.Array, report: Report
) -> Params:
  """SAM 2 before the first step: from the checkpoint that the config names, or from scratch."""
  source = config.refiner.init_from
  # Once the phase has a checkpoint of its own, that will replace all values given here.
  if source and not has_checkpoint(run.checkpoints("refiner")):
    params = starting_params(source, config.sam2, key)
    run.write("init_from.json", json.dumps(read_config(source)[1], indent=1) + "\n")
    report(f"refiner: starts from {source}")
    return params
  params = init_params(config.sam2, key)
  if not source and any(stage.residual for stage in config.refinement.stages):
    params = silenced_decoder(params)
  return params


def _refiner(
  run: RunFolder,
  config: Config,
  segmenter: Segmenter,
  train: Sequence[str],
  held_out: Sequence[Case],
  report: Report,
  profile: bool,
) -> Segmenter:
  """Trains SAM 2 as the refiner, its MaskAdapter first, or loads it where it is trained already."""
  settings, plan = config.refiner, segmenter.plan

  def trained(phase: Phase, params: Params, key: jax.Array) -> Params:
    if not run.params(phase.name).is_dir():
      batches = functools.partial(
        _refiner_batches, run, config, plan, train, phase.settings.batch_size
      )
      _train_network(
        phase, run, config, segmenter, train, held_out, params, batches, key, report, profile
      )
    return load_params(run.params(phase.name), _refiner_shapes(segmenter))

  if run.params("refiner").is_dir():
    params = load_params(run.params("refiner"), _refiner_shapes(segmenter))
    return dataclasses.replace(segmenter, refiner=params)
  key = jax.random.key(config.seed)
  init_key, train_key = jax.random.split(jax.random.fold_in(key, 1))
  params = _starting_refiner(run, config, init_key, report)
  if settings.mask_adapter.loop.steps:
    params = trained(mask_adapter_phase(config, plan), params, jax.random.fold_in(key, 2))
  params = with_frozen_as(settings.frozen_dtype, params, settings.trainable)
  params = trained(refiner_phase(config, plan), params, train_key)
  return dataclasses.replace(segmenter, refiner=params)


def _refiner_batches(
  run: RunFolder,
  config: Config,
  plan: Plan,
  train: Sequence[str],
  batch_size: int,
  rows: Sequence[int],
  start: int,
) -> Any:
  settings = config.refiner
  return refiner_batches(
    run / "preprocessed",
    train,
    RunConfig(
      image_size=config.sam2.image_size,
      slices=settings.slices,
      structures=min(settings.structures, len(plan.labels.structures)),
      channels=config.data.sam_channels,
      context=config.data.sam_context,
      oversample_foreground=settings.oversample_foreground,
    ),
    plan.labels.membership,
    batch_size,
    settings.augmentation,
    settings.corruption,
    config.seed,
    prompts=run / "prompts",
    rows=rows,
    start=start,
    loader=config.data.loader,
  )


def _samples(phase: Phase) -> dict[str, int]:
  """What one step goes through: volumes are crops of one each."""
  if phase.name == "generator":
    return {"volumes": phase.batch["image"].shape[0]}
  runs, structures, slices = phase.batch["masks"].shape[:3]
  return {"volumes": runs, "slices": runs * slices, "cells": runs * structures * slices}
