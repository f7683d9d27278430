"""What the tracker is trained on: the sources of a config, prepared in the folder of a run.

In: `tracker.data`. Out: batches of data.object_runs. The run's own data set is prepared already.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rfmedsam2_jax.base.progress import Progress, Report
from rfmedsam2_jax.config import Config
from rfmedsam2_jax.config.tracker import SourceConfig
from rfmedsam2_jax.data import object_runs
from rfmedsam2_jax.data.datasets import Dataset, read_dataset
from rfmedsam2_jax.data.pipeline import BatchConfig, Cases, RunConfig
from rfmedsam2_jax.data.plan import PlanConfig, load_plan
from rfmedsam2_jax.data.preprocessing import stored_cases
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.data.splits import load_split
from rfmedsam2_jax.parallel import hosts
from rfmedsam2_jax.training.own_data import store_cases, write_plan

SYNTHETIC, OWN = "synthetic", "own"


def read_sources(config: Config) -> list[Dataset | None]:
  """The data sets of a config's sources, None for others; UserError for an unreadable one."""
  return [None if x.source in (SYNTHETIC, OWN) else read_dataset(x.source)
          for x in config.tracker.data]


def prepare_sources(
  run: RunFolder, config: Config, datasets: Sequence[Dataset | None], report: Report
) -> None:
  """Plans and preprocesses further data sets in `tracker/data` of the run, as far as not done."""
  for source, dataset in zip(config.tracker.data, datasets, strict=True):
    if dataset is None:
      continue
    folder = _folder(run.path, config, source)
    cases = [case for case in dataset.cases if case.label is not None]
    with hosts.together():
      if run.writes and not (folder / "plan.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        progress = Progress(f"{dataset.name}: fingerprint, cases", report)
        write_plan(folder, dataset, cases, PlanConfig(), progress)
    plan = load_plan(folder / "plan.json")
    store_cases({folder / "preprocessed": plan}, cases, dataset, config.seed, report)


def case_names(run: Path, config: Config) -> list[str]:
  """What the numbers of `case` in batches stand for."""
  return [name for source in config.tracker.data for name in _names(run, config, source)]


def batches(
  run: Path, config: Config, seed: int, rows: Sequence[int], start: int
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of `object_batches`, from number `start` on; the seed is that of what is drawn."""
  settings, data = config.tracker, config.data
  sample = RunConfig(
    config.sam2.image_size, settings.slices, settings.objects, data.sam_channels, data.sam_context)
  sources: list[tuple[object_runs.Sample, float, int]] = []
  for source in settings.data:
    names = _names(run, config, source)
    if source.source == SYNTHETIC:
      runs: object_runs.Sample = object_runs.SyntheticRuns(seed, sample, settings.plain)
    else:
      folder = _folder(run, config, source)
      plan = load_plan(folder / "plan.json")
      object_runs.check_channels(sample, len(plan.channels), source.source)
      cases = Cases(folder / "preprocessed", names, seed)
      runs = object_runs.CaseRuns(cases, sample, plan.labels.membership, settings.augmentation)
    sources.append((runs, source.weight, len(names)))
  part = BatchConfig(settings.batch_size, rows, start, data.loader)
  return object_runs.object_batches(sources, seed, part)


def _names(run: Path, config: Config, source: SourceConfig) -> Sequence[str]:
  if source.source == SYNTHETIC:
    return ["of the synthetic stream"]
  if source.source == OWN:
    return load_split(run / "splits.json").train
  return sorted(stored_cases(_folder(run, config, source) / "preprocessed"))


def _folder(run: Path, config: Config, source: SourceConfig) -> Path:
  if source.source == OWN:
    return run
  return run / "tracker" / "data" / str(config.tracker.data.index(source))
