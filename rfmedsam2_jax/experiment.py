"""A whole run: from a config to two trained networks and their scores, and back from its folder.

The order of things: fingerprint and plan, preprocessing, the generator, its prompts for the
training cases, the refiner, validation. Each part is skipped where an earlier, interrupted attempt
has finished it.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.config import Config, config_yaml, load_config
from rfmedsam2_jax.data.datasets import IGNORED, Case, Dataset, read_case, read_dataset
from rfmedsam2_jax.data.files import replacing, save_json
from rfmedsam2_jax.data.fingerprint import make_fingerprint
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
from rfmedsam2_jax.data.splits import Split, load_split, make_split, save_split
from rfmedsam2_jax.data.volumes import Volume
from rfmedsam2_jax.errors import UserError
from rfmedsam2_jax.inference.evaluate import Scores, as_dict, evaluate_arrays
from rfmedsam2_jax.inference.segmenter import (
  Segmenter,
  label_maps,
  run_generator,
  segment_volume,
  unet_for,
)
from rfmedsam2_jax.metrics import dice
from rfmedsam2_jax.nn import SAM2, init_params
from rfmedsam2_jax.progress import Progress, duration
from rfmedsam2_jax.report.curves import save_curves
from rfmedsam2_jax.training.checkpoints import has_checkpoint
from rfmedsam2_jax.training.config import GeneratorConfig, RefinerConfig
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
from rfmedsam2_jax.training.step import (
  Loss,
  compile_step,
  generator_loss_fn,
  make_step,
  refiner_loss_fn,
)
from rfmedsam2_jax.weights.checkpoint import (
  check_starting_point,
  config_json,
  read_config,
  starting_params,
)
from rfmedsam2_jax.weights.orbax import load_params, save_params

Report = Callable[[str], None]


def train(
  config: Config, out: str | Path, resume: bool = False, overwrite: bool = False,
  report: Report = print,
) -> dict[str, Any]:
  """Trains generator and refiner and scores the held-out cases.

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
  with open_run(out, resume, overwrite) as run:
    if resume:
      _check_same_config(run, config)
    else:
      run.write("config.yaml", config_yaml(config))
      run.write("versions.json", json.dumps(versions(), indent=1) + "\n")
    began = time.monotonic()
    split, plan = _plan(run, dataset, config, report)
    cases = {case.identifier: case for case in dataset.cases}
    _preprocess(run, [cases[name] for name in split.train], dataset, plan, config, report)
    held_out = [cases[name] for name in split.validation]
    report(f"prepared {len(split.train)} training cases, {duration(time.monotonic() - began)}")
    segmenter = _generator(run, config, plan, split, held_out, report)
    _write_prompts(run, segmenter, split.train, report)
    segmenter = _refiner(run, config, segmenter, split, held_out, report)
    save_curves(run.path / "log.jsonl", run.path / "curves.png")
    result = _validate(run, segmenter, held_out, report)
    report(f"done after {duration(time.monotonic() - began)}: {run.path}")
    return result


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
  return dataclasses.replace(segmenter, generator=generator, refiner=refiner)


def _check_same_config(run: RunFolder, config: Config) -> None:
  before = load_config(run.config)
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
  if (run / "splits.json").exists():
    split = load_split(run / "splits.json")
    gone = sorted({*split.train, *split.validation} - set(identifiers))
    if gone:
      raise UserError(f"{run / 'splits.json'}: case {gone[0]} is no longer in the data set; "
                      "put it back or train into another folder")
  else:
    split = make_split(identifiers, config.data.split)
    save_split(run / "splits.json", split)
  if not (run / "plan.json").exists():
    train_cases = [case for case in dataset.cases if case.identifier in set(split.train)]
    fingerprint = make_fingerprint(
      dataset, train_cases, progress=Progress("fingerprint, cases", report)
    )
    save_json(run / "fingerprint.json", fingerprint)
    save_plan(run / "plan.json", make_plan(fingerprint, config.plan))
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
  for done, case in enumerate(cases, 1):
    if case.identifier in stored:
      continue
    volume, atoms = read_case(case, len(dataset.channels), dataset.labels)
    assert atoms is not None, "training cases have labels"
    prepared = preprocess(volume, plan)
    save_case(folder, case.identifier, prepared, prepare_atoms(atoms, plan, prepared.restore),
              plan.labels, config.seed)
    progress(done, len(cases))


def _untrained(config: Config, plan: Plan) -> Segmenter:
  channels = len(plan.channels)
  wrong = [channel for channel in config.data.sam_channels if not 0 <= channel < channels]
  if wrong:
    raise UserError(
      f"data.sam_channels: has {wrong[0]}, but images have channels 0 to {channels - 1}"
    )
  generator = config.generator
  return Segmenter(
    plan=plan,
    unet=unet_for(
      plan, generator.features, generator.convs_per_stage, generator.dtype, generator.remat
    ),
    generator={},
    sam2=SAM2(config.sam2),
    refiner=None,
    refinement=config.refinement,
    inference=config.inference,
    sam_channels=config.data.sam_channels,
  )


def _init_generator(segmenter: Segmenter, key: jax.Array) -> Params:
  # Fully convolutional: the smallest patch will do.
  patch = segmenter.unet.config.divisor
  image = jnp.zeros((1, *patch, len(segmenter.plan.channels)))
  return segmenter.unet.init(key, image, deep_supervision=True)["params"]


def _generator_shapes(segmenter: Segmenter) -> Any:
  return jax.eval_shape(functools.partial(_init_generator, segmenter), jax.random.key(0))


def _refiner_shapes(segmenter: Segmenter) -> Any:
  return jax.eval_shape(functools.partial(init_params, segmenter.sam2.config), jax.random.key(0))


def _count(params: Any) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def _about(config: Config, plan: Plan, phase: str) -> dict[str, Any]:
  about = {
    "phase": phase,
    "config": json.loads(json.dumps(dataclasses.asdict(config))),
    "labels": json.loads(json.dumps(dataclasses.asdict(plan.labels))),
    "versions": versions(),
  }
  return about | ({"sam2": config_json(config.sam2)} if phase == "refiner" else {})


def _train_network(
  phase: Literal["generator", "refiner"],
  run: RunFolder,
  config: Config,
  segmenter: Segmenter,
  held_out: Sequence[Case],
  params: Params,
  patterns: Sequence[str],
  loss: Loss,
  batches: Any,
  key: jax.Array,
  report: Report,
) -> None:
  """Trains one of the two networks and keeps its final parameters in the run's folder.

  Args:
    phase: also the name of the segmenter's and the config's field.
    params: fresh. patterns: of the paths that are trained.
    batches: grain iterator.
  """
  settings: GeneratorConfig | RefinerConfig = getattr(config, phase)
  optimizer = make_optimizer(settings.optimizer, settings.loop.steps)
  state = init_state(params, patterns, optimizer, key)
  report(
    f"{phase}: {_count(params) / 1e6:.2f} M parameters, "
    f"{_count(state.trained) / 1e6:.2f} M of them trained"
  )

  def final(state: TrainState) -> Params:
    return merge(state.ema if settings.optimizer.ema_decay else state.trained, state.frozen)

  def validate(state: TrainState) -> dict[str, float]:
    trained: dict[str, Any] = {phase: final(state)}
    cases = held_out[: settings.loop.validation_cases]
    return _quick_scores(dataclasses.replace(segmenter, **trained), cases)

  state = train_phase(
    phase,
    run,
    settings.loop,
    state,
    compile_step(make_step(loss, optimizer, settings.optimizer)),
    batches,
    settings.batch_size,
    validate if held_out else None,
    report,
  )
  save_params(run.params(phase), final(state), _about(config, segmenter.plan, phase))


def _generator(
  run: RunFolder, config: Config, plan: Plan, split: Split, held_out: Sequence[Case], report: Report
) -> Segmenter:
  """Trains the generator, or loads it where it is trained already."""
  segmenter = _untrained(config, plan)
  settings, labels = config.generator, plan.labels
  if not run.params("generator").is_dir():
    init_key, train_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    params = jax.jit(functools.partial(_init_generator, segmenter))(init_key)
    loss = generator_loss_fn(segmenter.unet, settings, labels.membership, labels.regions)
    batches = generator_batches(
      run / "preprocessed",
      split.train,
      plan.patch_size,
      settings.batch_size,
      settings.augmentation,
      config.seed,
      settings.oversample_foreground,
      loader=config.data.loader,
    )
    _train_network(
      "generator",
      run,
      config,
      segmenter,
      held_out,
      params,
      ("*",),
      loss,
      batches,
      train_key,
      report,
    )
  params = load_params(run.params("generator"), _generator_shapes(segmenter))
  return dataclasses.replace(segmenter, generator=params)


def _write_prompts(
  run: RunFolder, segmenter: Segmenter, identifiers: Sequence[str], report: Report
) -> None:
  """The generator's mask logits of the training cases, float16 [K, D, 4G, 4G] each."""
  progress = Progress("prompts of the training cases", report)
  for done, identifier in enumerate(identifiers, 1):
    path = run / "prompts" / f"{identifier}.npy"
    if not path.exists():
      case = load_case(run / "preprocessed", identifier)
      made = run_generator(segmenter, Prepared(np.asarray(case.image), case.window, case.restore))
      with replacing(path) as temporary:
        np.save(temporary, made.prompts.logits)
    progress(done, len(identifiers))


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
  split: Split,
  held_out: Sequence[Case],
  report: Report,
) -> Segmenter:
  """Trains SAM 2 as the refiner, or loads it where it is trained already."""
  settings, plan = config.refiner, segmenter.plan
  if not run.params("refiner").is_dir():
    init_key, train_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
    params = _starting_refiner(run, config, init_key, report)
    params = with_frozen_as(settings.frozen_dtype, params, settings.trainable)
    loss = refiner_loss_fn(segmenter.sam2, settings, config.refinement)
    batches = refiner_batches(
      run / "preprocessed",
      split.train,
      RunConfig(
        image_size=config.sam2.image_size,
        slices=settings.slices,
        structures=min(settings.structures, len(plan.labels.structures)),
        channels=config.data.sam_channels,
        oversample_foreground=settings.oversample_foreground,
      ),
      plan.labels.membership,
      settings.batch_size,
      settings.augmentation,
      settings.corruption,
      config.seed,
      prompts=run / "prompts",
      loader=config.data.loader,
    )
    _train_network(
      "refiner", run, config, segmenter, held_out, params, settings.trainable, loss, batches,
      train_key, report,
    )
  params = load_params(run.params("refiner"), _refiner_shapes(segmenter))
  return dataclasses.replace(segmenter, refiner=params)


def _stage_maps(segmenter: Segmenter, case: Case) -> tuple[Volume, np.ndarray, list[np.ndarray]]:
  """A labelled case: its image, its true label map, and the label map of every stage."""
  labels = segmenter.plan.labels
  volume, atoms = read_case(case, len(segmenter.plan.channels), labels)
  assert atoms is not None, "validation cases have labels"
  truth = np.array(labels.atom_values)[np.where(atoms == IGNORED, 0, atoms)]
  if labels.ignore is not None:
    truth[atoms == IGNORED] = labels.ignore
  return volume, truth, label_maps([segment_volume(segmenter, volume)])


def _quick_scores(segmenter: Segmenter, cases: Sequence[Case]) -> dict[str, float]:
  """Mean Dice of every stage over a few cases."""
  found: list[list[float]] = [[] for _ in range(segmenter.stages)]
  for case in cases:
    _, truth, maps = _stage_maps(segmenter, case)
    for stage, guess in enumerate(maps):
      for structure in segmenter.plan.labels.structures:
        mask, true_mask = np.isin(guess, structure.values), np.isin(truth, structure.values)
        found[stage].append(dice(mask, true_mask))
  return {f"stage{stage} Dice": float(np.nanmean(values)) for stage, values in enumerate(found)}


def _validate(
  run: RunFolder, segmenter: Segmenter, cases: Sequence[Case], report: Report
) -> dict[str, Any]:
  """Scores every stage on all held-out cases and writes validation.json."""
  if not cases:
    report("no validation cases: nothing is scored")
    return {}
  labels = segmenter.plan.labels
  found: list[dict[str, Any]] = [{} for _ in range(segmenter.stages)]
  progress = Progress("validation, cases", report)
  for done, case in enumerate(cases, 1):
    volume, truth, maps = _stage_maps(segmenter, case)
    for stage, guess in enumerate(maps):
      found[stage][case.identifier] = evaluate_arrays(
        guess, truth, volume.geometry.spacing, labels.structures, labels.ignore
      )
    progress(done, len(cases))
  stages = [Scores(labels.names, 1.0, scores) for scores in found]
  result = {f"stage{stage}": as_dict(scores) for stage, scores in enumerate(stages)}
  run.write("validation.json", json.dumps(result, indent=1) + "\n")
  for stage, scores in enumerate(stages):
    each = "  ".join(f"{name} {scores.of_structure(name).dice:.4f}" for name in scores.structures)
    report(f"validation stage {stage}: mean Dice {scores.mean.dice:.4f}, "
           f"HD95 {scores.mean.hd95:.2f} mm  ({each})")
  return result
