"""The networks of a run: trained phase after phase in its folder, or loaded where they are.

In: a config, a plan, prepared cases. Out: a segmenter with what is trained so far. Used by
experiment, which puts the parts of a run in their order.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Progress, Report
from rfmedsam2_jax.config.experiment import Config
from rfmedsam2_jax.data.datasets import Case
from rfmedsam2_jax.data.files import replacing
from rfmedsam2_jax.data.pipeline import RunConfig, generator_batches, refiner_batches
from rfmedsam2_jax.data.plan import Plan
from rfmedsam2_jax.data.preprocessing import Prepared, load_case
from rfmedsam2_jax.data.run_folder import RunFolder, versions
from rfmedsam2_jax.model import generator_network, generator_shapes, refiner_shapes, untrained
from rfmedsam2_jax.nn import init_params
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.parallel import hosts
from rfmedsam2_jax.parallel.mesh import local_rows, make_mesh
from rfmedsam2_jax.parallel.rules import place, whole
from rfmedsam2_jax.report.contact_sheet import save_contact_sheet
from rfmedsam2_jax.segmentation.segmenter import Segmenter, run_generator
from rfmedsam2_jax.training.checkpoints import has_checkpoint
from rfmedsam2_jax.training.loop import train_phase
from rfmedsam2_jax.training.phases import Phase, generator_phase, mask_adapter_phase, refiner_phase
from rfmedsam2_jax.training.state import (
  TrainState,
  init_state,
  make_optimizer,
  merge,
  silenced_decoder,
  with_frozen_as,
)
from rfmedsam2_jax.training.step import compile_step, make_step
from rfmedsam2_jax.training.validation import quick_scores
from rfmedsam2_jax.weights.checkpoint import config_json, read_config, starting_params
from rfmedsam2_jax.weights.generator import check_generator_start, generator_json
from rfmedsam2_jax.weights.orbax import load_params, read_about, save_params


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


def _begun(run: RunFolder, phase: str) -> bool:
  return run.params(phase).is_dir() or has_checkpoint(run.checkpoints(phase))


def check_generator(run: RunFolder, config: Config, plan: Plan) -> None:
  """Sees to it that the generator can start as the config says, without reading parameters.

  Raises:
    UserError: no checkpoint, one of another network or of other labels, or no steps from scratch.
  """
  settings = config.generator
  if _begun(run, "generator"):
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


def train_generator(
  run: RunFolder,
  config: Config,
  plan: Plan,
  train: Sequence[str],
  held_out: Sequence[Case],
  report: Report,
  profile: bool,
) -> Segmenter:
  """Trains the generator, or loads it where it is trained already."""
  segmenter = untrained(config, plan)
  settings, phase = config.generator, generator_phase(config, plan)
  if not run.params("generator").is_dir():
    init_key, train_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    params = jax.jit(phase.init)(init_key)
    if settings.init_from and not _begun(run, "generator"):
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
  params = load_params(run.params("generator"), generator_shapes(segmenter))
  return dataclasses.replace(segmenter, generator=params)


def write_prompts(
  run: RunFolder, segmenter: Segmenter, identifiers: Sequence[str], report: Report
) -> None:
  """The generator's mask logits of the refiner's cases, float16 [K, D, 4G, 4G] each."""
  progress = Progress("prompts of the refiner's cases", report, compiles=True)
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
  # Once a phase has parameters of its own, these will replace all values given here.
  if source and not (_begun(run, "mask_adapter") or _begun(run, "refiner")):
    params = starting_params(source, config.sam2, key)
    run.write("init_from.json", json.dumps(read_config(source)[1], indent=1) + "\n")
    report(f"refiner: starts from {source}")
    return params
  params = init_params(config.sam2, key)
  if not source and any(stage.residual for stage in config.refinement.stages):
    params = silenced_decoder(params)
  return params


def train_refiner(
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
    return load_params(run.params(phase.name), refiner_shapes(segmenter))

  if run.params("refiner").is_dir():
    params = load_params(run.params("refiner"), refiner_shapes(segmenter))
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
