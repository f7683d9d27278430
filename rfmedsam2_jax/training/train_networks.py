"""The networks of a run: trained phase after phase in its folder, or loaded where they are.

In: phases, prepared cases. Out: a segmenter with what is trained so far.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Progress, Report
from rfmedsam2_jax.config.tracker import TrackerConfig
from rfmedsam2_jax.config.training import RefinerConfig
from rfmedsam2_jax.data.files import replacing
from rfmedsam2_jax.data.preprocessing import Prepared, load_case
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.nn import SAM2Config, init_params
from rfmedsam2_jax.nn.layers import Params
from rfmedsam2_jax.parallel import hosts
from rfmedsam2_jax.parallel.rules import place
from rfmedsam2_jax.refinement.first_prompts import shadows
from rfmedsam2_jax.segmentation.segmenter import Segmenter, first_prompts, run_generator
from rfmedsam2_jax.training.checkpoints import latest_checkpoint
from rfmedsam2_jax.training.loop import Training, train_phase
from rfmedsam2_jax.training.phases import Phase
from rfmedsam2_jax.training.state import silenced_decoder, with_frozen_as
from rfmedsam2_jax.weights.checkpoint import read_config, starting_params
from rfmedsam2_jax.weights.generator import check_generator_start
from rfmedsam2_jax.weights.orbax import is_saved, load_params, read_about, save_params


def _count(params: Any) -> str:
  return f"{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.2f} M"


def _begun(run: RunFolder, *phases: str) -> bool:
  """Whether one of these phases has parameters of its own, which replace all that it is given."""
  return any(is_saved(run.params(x)) or latest_checkpoint(run.checkpoints(x)) for x in phases)


def check_generator(run: RunFolder, phase: Phase) -> None:
  """Raises UserError for no checkpoint, another network's or labels', or no steps from scratch."""
  settings = phase.settings
  if _begun(run, phase.name):
    return
  if settings.init_from:
    check_generator_start(settings.init_from, phase.about["generator"])
    # Whole and finite; known now, and not after the data is prepared.
    load_params(settings.init_from, jax.eval_shape(phase.init, jax.random.key(0)))
  elif not settings.loop.steps:
    raise UserError("generator.loop.steps: is 0, which leaves a generator from scratch untrained; "
                    "give steps, or a trained one with generator.init_from")


def train_generator(
  training: Training, phase: Phase, segmenter: Segmenter, cases: Sequence[str]
) -> Segmenter:
  """Trains the generator on some cases, or loads it where it is trained already."""
  run, settings = training.run, phase.settings
  params: Params = {}
  init_key, key = jax.random.split(jax.random.fold_in(jax.random.key(training.seed), 0))
  if not is_saved(run.params(phase.name)):
    if not settings.init_from or _begun(run, phase.name):
      params = jax.jit(phase.init)(init_key)
    else:  # compiling what draws all members of an ensemble would take minutes
      params = load_params(settings.init_from, jax.eval_shape(phase.init, init_key))
      about = json.dumps(read_about(settings.init_from), indent=1)
      run.write("generator_init_from.json", about + "\n")
      training.report(f"generator: starts from {settings.init_from}")
    if not settings.loop.steps:
      _save(training, phase, params)
      training.report("generator: used as it is, no steps")
  params = _trained(training, phase, segmenter, cases, params, key)
  return dataclasses.replace(segmenter, generator=params)


def train_tracker(
  training: Training, legs: Sequence[Phase], config: SAM2Config, cases: Sequence[str]
) -> Params:
  """Trains SAM 2 on prompts, leg after leg, or loads it where it is trained already."""
  run, first = training.run, legs[0].settings
  assert isinstance(first, TrackerConfig)
  params: Params = {}
  init_key, key = jax.random.split(jax.random.fold_in(jax.random.key(training.seed), 3))
  if not is_saved(run.params(legs[0].name)):
    if first.init_from and not _begun(run, legs[0].name):
      params = starting_params(first.init_from, config, init_key)
      about = json.dumps(read_config(first.init_from)[1], indent=1)
      run.write("tracker_init_from.json", about + "\n")
      training.report(f"tracker: starts from {first.init_from}")
    else:
      params = init_params(config, init_key)
  for number, leg in enumerate(legs):
    of_leg = jax.random.fold_in(key, number) if number else key
    params = _trained(training, leg, None, cases, params, of_leg)
  return params


def train_refiner(
  training: Training, mask_adapter: Phase | None, refiner: Phase, segmenter: Segmenter,
  cases: Sequence[str], tracker: Params | None = None,
) -> Segmenter:
  """Trains SAM 2 as the refiner, its MaskAdapter first, or loads it where it is trained already.

  tracker: the parameters that it starts from, if there are any.
  """
  run, sam2, settings = training.run, segmenter.sam2.config, refiner.settings
  assert isinstance(settings, RefinerConfig)
  params: Params = {}
  key = jax.random.key(training.seed)
  init_key, train_key = jax.random.split(jax.random.fold_in(key, 1))
  if not is_saved(run.params(refiner.name)):
    if settings.init_from and not _begun(run, "mask_adapter", "refiner"):
      params = starting_params(settings.init_from, sam2, init_key)
      about = read_config(settings.init_from)[1]
      run.write("init_from.json", json.dumps(about, indent=1) + "\n")
      training.report(f"refiner: starts from {settings.init_from}")
    elif tracker is not None:
      params = tracker
    else:
      params = init_params(sam2, init_key)
      if not settings.init_from and any(x.residual for x in segmenter.refinement.stages):
        params = silenced_decoder(params)
    if mask_adapter:
      adapter_key = jax.random.fold_in(key, 2)
      params = _trained(training, mask_adapter, segmenter, cases, params, adapter_key)
    params = with_frozen_as(settings.frozen_dtype, params, settings.trainable)
  params = _trained(training, refiner, segmenter, cases, params, train_key)
  return dataclasses.replace(segmenter, refiner=params)


def _trained(
  training: Training, phase: Phase, segmenter: Segmenter | None, cases: Sequence[str],
  params: Params, key: jax.Array,
) -> Params:
  """The parameters at the end of a phase, which starts from `params` if it has not ended yet."""
  folder = training.run.params(phase.name)
  if not is_saved(folder):
    state = place(phase.start(params, key), training.mesh)
    training.report(f"{phase.name}: {_count(params)} parameters, {_count(state.trained)} of them "
                    "trained")
    state = train_phase(training, phase, segmenter, cases, state)
    _save(training, phase, phase.final(state, training.mesh))
  # Frozen parameters that are held in half precision are kept as float32.
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), jax.eval_shape(phase.init, key))
  return load_params(folder, like)


def _save(training: Training, phase: Phase, params: Params) -> None:
  about = {"phase": phase.name} | training.about | phase.about
  save_params(training.run.params(phase.name), params, about)


def write_prompts(
  run: RunFolder, segmenter: Segmenter, identifiers: Sequence[str], report: Report
) -> None:
  """The generator's mask logits of the refiner's cases, float16 [K, D, 4G, 4G] each.

  Where they lie in cuts these hold the truth, too: of what the generator missed, there is one.
  """

  def write(identifier: str) -> None:
    path = run / "prompts" / f"{identifier}.npy"
    if path.exists():
      return
    # Most generators see what the stages see: then there is one place, and it is read once.
    places = dict.fromkeys(run.prepared(segmenter.plan, for_generator)
                           for for_generator in (False, True))
    stored = [load_case(place, identifier) for place in places]
    prepared, *seen = (
      Prepared(np.asarray(case.image), case.window, case.restore) for case in stored)
    log_odds = run_generator(segmenter, prepared, report, *seen)
    shown = None
    if segmenter.refinement.zoom:
      assert stored[0].atoms is not None
      shown = shadows(stored[0].atoms, segmenter.plan.labels)
    made = first_prompts(segmenter, prepared, log_odds, shown)
    if shown is not None:
      cuts = run / "prompts" / "cuts" / path.name
      with replacing(cuts) as temporary:
        np.save(temporary, np.array(made.cuts, np.int32))
    with replacing(path) as temporary:
      np.save(temporary, made.prompts.logits)

  progress = Progress("prompts of the refiner's cases", report, compiles=True)
  hosts.each(identifiers, write, progress)
