"""nnU-Net v2 on a data set for a given wall time on a CPU, on the cases that a split names.

make .venv-nnunet/.installed
.venv-nnunet/bin/python benchmarks/accuracy/nnunet.py DATASET --splits splits.json --minutes 30
    --work runs/nnunet-30

Fingerprint, plan, preprocessing and training of `3d_fullres` (or `--configuration 2d`) by nnU-Net's
own classes, on the training cases alone; then the validation cases are predicted with its test-time
mirroring. Score them with `results.py`. What differs from `nnUNetv2_train`:

- The batch is 2 patches instead of nnU-Net's 9 or so, or 12 slices instead of 58 or so, which gives
  more steps on a CPU.
- The time limits the steps: after preprocessing, 50 steps are made, timed and thrown away, and as
  many are made as fit into what is left of the budget, with the learning rate's decay over these.
- An "epoch" has 50 steps and one of nnU-Net's online validation steps, and no curves are drawn.

The clock runs while fingerprint, plan, preprocessing and training run, data loading and saving
included. Stopped with Ctrl-C, it goes on from the last 50 steps with the clock of that moment.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

DATASET = "Dataset004_Benchmark"
BATCH, STEPS_PER_EPOCH = {"3d_fullres": 2, "2d": 12}, 50
WARM_UP, TIMED = 20, 30  # steps; during the first ones the loader still fills its queue


class Clock:
  """Seconds by part, kept in a file, so that a sitting goes on where the last one ended."""

  def __init__(self, path: Path):
    self.path = path
    self.seconds: dict[str, float] = json.loads(path.read_text("utf-8")) if path.exists() else {}

  def save(self) -> None:
    temporary = self.path.with_suffix(".new")
    temporary.write_text(json.dumps(self.seconds))
    temporary.replace(self.path)

  def add(self, part: str, seconds: float) -> None:
    self.seconds[part] = self.seconds.get(part, 0.0) + seconds
    self.save()

  @contextlib.contextmanager
  def runs(self, part: str) -> Iterator[None]:
    """Does not count what is stopped by an exception."""
    began = time.monotonic()
    yield
    self.add(part, time.monotonic() - began)


def link_dataset(source: Path, train: list[str], folder: Path) -> None:
  """The training cases in nnU-Net's raw layout."""
  description = json.loads((source / "dataset.json").read_text("utf-8"))
  channels = description.get("channel_names") or description["modality"]
  labels = description["labels"]
  if "0" in labels:  # the Decathlon's way: number to name
    labels = {name: int(value) for value, name in labels.items()}
  for name in ("imagesTr", "labelsTr"):
    (folder / name).mkdir(parents=True)
  for case in train:
    (folder / "imagesTr" / f"{case}_0000.nii.gz").symlink_to(source / "imagesTr" / f"{case}.nii.gz")
    (folder / "labelsTr" / f"{case}.nii.gz").symlink_to(source / "labelsTr" / f"{case}.nii.gz")
  description = {
    "channel_names": channels, "labels": labels, "numTraining": len(train), "file_ending": ".nii.gz"
  }
  (folder / "dataset.json").write_text(json.dumps(description))


def make_trainer(folder: Path, configuration: str, epochs: int):
  import torch
  from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

  class Trainer(nnUNetTrainer):
    """Some epochs of few steps, saved after each."""

    clock: Clock | None = None
    began = 0.0

    def on_epoch_end(self):
      super().on_epoch_end()
      if self.clock is not None:
        now = time.monotonic()
        self.clock.add("training", now - self.began)
        self.began = now

  plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
  description = json.loads((folder / "dataset.json").read_text("utf-8"))
  trainer = Trainer(plans, configuration, "all", description, torch.device("cpu"))
  # Here and not in a constructor, whose arguments nnU-Net wants to have its own names.
  trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = STEPS_PER_EPOCH, 1
  trainer.num_epochs, trainer.save_every = epochs, 1
  trainer.logger.plot_progress_png = lambda folder: None
  return trainer


def seconds_per_step(folder: Path, configuration: str) -> float:
  trainer = make_trainer(folder, configuration, 1)
  trainer.disable_checkpointing = True
  trainer.on_train_start()
  trainer.on_train_epoch_start()
  for step in range(WARM_UP + TIMED):
    if step == WARM_UP:
      began = time.monotonic()
    trainer.train_step(next(trainer.dataloader_train))
  taken = (time.monotonic() - began) / TIMED
  trainer.on_train_end()
  return taken


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("dataset", type=Path, help="folder in the Decathlon's layout")
  parser.add_argument("--splits", type=Path, required=True, help="splits.json of a run")
  parser.add_argument("--minutes", type=float, required=True)
  parser.add_argument("--work", type=Path, required=True, help="where everything is written")
  parser.add_argument("--epochs", type=int, help="instead of as many as fit")
  parser.add_argument("--configuration", choices=sorted(BATCH), default="3d_fullres")
  parser.add_argument("--planner", default="ExperimentPlanner",
                      help="of nnU-Net; nnUNetPlannerResEncM and so on have residual encoders")
  options = parser.parse_args()
  work, source = options.work.absolute(), options.dataset.absolute()
  for name in ("raw", "preprocessed", "results"):
    os.environ[f"nnUNet_{name}"] = str(work / name)
    (work / name).mkdir(parents=True, exist_ok=True)
  # One process makes batches beside the training, which has the rest of the cores.
  os.environ["nnUNet_n_proc_DA"] = "1"
  split = json.loads(options.splits.read_text("utf-8"))
  clock = Clock(work / "clock.json")
  folder = work / "preprocessed" / DATASET
  if "preprocessing" not in clock.seconds:
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    for name in ("raw", "preprocessed"):
      shutil.rmtree(work / name / DATASET, ignore_errors=True)
    link_dataset(source, split["train"], work / "raw" / DATASET)
    with clock.runs("preprocessing"):
      api.extract_fingerprints([4], num_processes=2, verbose=False)
      # Under the one name, whichever planner it was: a folder has one plan.
      api.plan_experiments([4], options.planner, overwrite_plans_name="nnUNetPlans")
      api.preprocess([4], configurations=[options.configuration], num_processes=[2])
    plans = json.loads((folder / "nnUNetPlans.json").read_text("utf-8"))
    plans["configurations"][options.configuration]["batch_size"] = BATCH[options.configuration]
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans, indent=1))
  if options.epochs:
    clock.seconds["epochs"] = options.epochs
  if "epochs" not in clock.seconds:
    step = seconds_per_step(folder, options.configuration)
    left = 60 * options.minutes - clock.seconds["preprocessing"]
    clock.seconds["epochs"] = max(int(left / (step * (STEPS_PER_EPOCH + 0.5))), 1)
    print(f"{step:.2f} s per step: {clock.seconds['epochs']} epochs of {STEPS_PER_EPOCH} steps")
    clock.save()
  epochs = int(clock.seconds["epochs"])
  trainer = make_trainer(folder, options.configuration, epochs)
  trainer.clock = clock
  trainer.initialize()
  results = Path(trainer.output_folder)
  for name in ("checkpoint_final.pth", "checkpoint_latest.pth"):
    if (results / name).exists():
      trainer.load_checkpoint(str(results / name))
      break
  if not (results / "checkpoint_final.pth").exists():
    trainer.began = time.monotonic()
    trainer.run_training()
  predict(trainer, source, split["validation"], work / "predictions", clock)
  about = {
    "what": "nnU-Net", "minutes": options.minutes, "steps": epochs * STEPS_PER_EPOCH,
    "configuration": options.configuration, "batch_size": BATCH[options.configuration],
    "planner": options.planner, "seconds": clock.seconds,
    "machine": platform.machine(), "cores": os.cpu_count(),
    "versions": {name: version(name) for name in ("nnunetv2", "torch")},
  }
  (work / "about.json").write_text(json.dumps(about, indent=1) + "\n")
  trained = clock.seconds["preprocessing"] + clock.seconds["training"]
  print(f"{epochs * STEPS_PER_EPOCH} steps, {trained / 60:.1f} minutes: {work / 'predictions'}")


def predict(trainer, source: Path, cases: list[str], out: Path, clock: Clock) -> None:
  from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

  out.mkdir(exist_ok=True)
  trainer.set_deep_supervision_enabled(False)
  trainer.network.eval()
  predictor = nnUNetPredictor(
    use_mirroring=True, perform_everything_on_device=False, device=trainer.device, allow_tqdm=False
  )
  predictor.manual_initialization(
    trainer.network, trainer.plans_manager, trainer.configuration_manager,
    [trainer.network.state_dict()], trainer.dataset_json, "nnUNetTrainer",
    trainer.inference_allowed_mirroring_axes,
  )
  clock.seconds.pop("prediction", None)
  with clock.runs("prediction"):
    predictor.predict_from_files_sequential(
      [[str(source / "imagesTr" / f"{case}.nii.gz")] for case in cases],
      [str(out / case) for case in cases],
    )


if __name__ == "__main__":
  main()
