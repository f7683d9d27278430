"""The ablations and the weak-generator study: one resumable run per row, one small file per result.

python benchmarks/accuracy/study.py CONFIG [key=value ...] --generator RUN --work FOLDER
    --results FOLDER [--list] [--only NAME ...]

Every row of `ROWS` trains a refiner of its own on the generator of RUN (ours.py --from); rows of
`SCORED` and `CORRUPTED` score the run of one of these in another way. Rows of `WEAK` train a
generator on a few cases, and a refiner on these or on all others. All are scored by score_run.py.
Overrides are of every row. Rows whose file is there are skipped, a row that was stopped goes on:
give the same command again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from score_run import CORRUPTIONS

HERE = Path(__file__).parent


COMMON = "residual: true, residual_limit: 3"  # of every stage in configs/hippocampus.yaml


def stages(change: str) -> str:
  """The override that changes both stages of configs/hippocampus.yaml alike."""
  both = f"{COMMON}, {change}"
  return f"refinement.stages=[{{{both}}}, {{{both}, pointers: true}}]"


def adapter_alone(steps: int) -> str:
  """The override of how long the MaskAdapter is trained before all else."""
  return f"refiner.mask_adapter.loop.steps={steps}"


NO_VOTE = "refinement.generator_weight=0"

# What is trained differently; the first row is the config as it is.
ROWS: dict[str, list[str]] = {
  "both-stages": [],
  "stage-1-alone": [f"refinement.stages=[{{{COMMON}}}]"],
  "no-memory": [stages("memory: none")],
  "no-dwconv-adapter": ["sam2.adapters.dwconv=false"],
  "no-cnn-adapter": ["sam2.adapters.cnn=false"],
  "no-mask-adapter": ["sam2.adapters.mask=false", adapter_alone(0)],
  "mask-adapter-alone": ["refiner.loop.steps=0"],
  "box-alone": [stages("mask: false")],
  "mask-alone": [stages("box: false")],
  "trained-on-mistakes": [
    "refiner.corruption.morphology_probability=0.6", "refiner.corruption.morphology=2",
    "refiner.corruption.drop_probability=0.2", "refiner.corruption.island_probability=0.6",
    adapter_alone(3000),
  ],
}
# The first row's run, scored in other ways: options and overrides of score_run.py.
SCORED: dict[str, list[str]] = {
  "generator-alone": ["refinement.stages=[]"],
  "stream": [stages("memory: stream")],
  "oracle-boxes": ["--prompts", "oracle"],
  "no-generator-vote": [NO_VOTE],
  "background-by-threshold": ["refinement.background=threshold"],
  "masks-replaced": ["refinement.fusion=masks"],
}
# With mistakes in the generator's masks, for which it would vote; the same, where the refiner was
# trained on such.
CORRUPTED: dict[str, tuple[str, list[str]]] = {
  f"{kind}{suffix}": (row, ["--corrupt", kind, NO_VOTE])
  for row, suffix in {"both-stages": "", "trained-on-mistakes": "-trained"}.items()
  for kind in CORRUPTIONS
}
# Whole runs whose generator sees a few of the 160 training cases, for as many steps as these take,
# and has no vote in the fused masks. The refiner sees those cases, or the others, which teach it
# more.
FEW = [NO_VOTE, "generator.loop.steps=500"]
SOME = [NO_VOTE, "generator.loop.steps=1000"]
WEAK: dict[str, list[str]] = {
  "cases-5": [*FEW, "data.split.train_cases=5"],
  "cases-20": [*SOME, "data.split.train_cases=20"],
  "generator-5": [*FEW, "refiner.held_back=0.96875", adapter_alone(16000)],
  "generator-20": [*SOME, "refiner.held_back=0.875", adapter_alone(10000)],
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("config", type=Path)
  parser.add_argument("overrides", nargs="*")
  parser.add_argument("--generator", type=Path, required=True, help="a finished run")
  parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
  parser.add_argument("--results", type=Path, required=True, help="folder of the JSON files")
  parser.add_argument("--only", nargs="+", choices=[*ROWS, *SCORED, *CORRUPTED, *WEAK])
  parser.add_argument("--list", action="store_true", help="say what is there and what is not")
  options = parser.parse_intermixed_args()
  scored_only = {name: ("both-stages", how) for name, how in SCORED.items()} | CORRUPTED
  for name in options.only or [*ROWS, *scored_only, *WEAK]:
    out = options.results / f"{name}.json"
    if options.list or out.exists():
      print(f"{name}: {'done' if out.exists() else 'to do'}")
      continue
    run, trained = options.work / name, options.work / f"{name}.json"
    commands = []
    if name not in scored_only:
      made_from = ["--from", str(options.generator)] if name in ROWS else []
      changes = ROWS[name] if name in ROWS else WEAK[name]
      commands.append(["ours.py", str(options.config), "--run", str(run), "--out", str(trained),
                       *made_from, *options.overrides, *changes])
    row, how = scored_only.get(name, (name, []))
    commands.append(["score_run.py", str(options.work / row), "--out", str(out), *how])
    for script, *arguments in commands:
      print(f"{name}: {script} {' '.join(arguments)}", flush=True)
      subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


if __name__ == "__main__":
  main()
