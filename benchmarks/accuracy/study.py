"""Studies of what decides accuracy: one resumable run per row, one small file per result.

python benchmarks/accuracy/study.py CONFIG ROWS.yaml [key=value ...] --generator RUN --work FOLDER
    --results FOLDER [--list] [--only NAME ...]

A file of `rows/` has three kinds. `refiners`: overrides; each trains a refiner of its own on the
generator of RUN (ours.py --from). `scored`: the run of one of these, scored in another way, with
options and overrides of score_run.py. `runs`: overrides of runs with generators of their own. All
are scored by score_run.py. Overrides of the command are of every row. Rows whose file is there are
skipped, a row that was stopped goes on: give the same command again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("config", type=Path)
  parser.add_argument("rows", type=Path)
  parser.add_argument("overrides", nargs="*")
  parser.add_argument("--generator", type=Path, help="a finished run; for `refiners`")
  parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
  parser.add_argument("--results", type=Path, required=True, help="folder of the JSON files")
  parser.add_argument("--only", nargs="+")
  parser.add_argument("--list", action="store_true", help="say what is there and what is not")
  options = parser.parse_intermixed_args()
  rows = yaml.safe_load(options.rows.read_text("utf-8"))
  names = [name for kind in ("refiners", "scored", "runs") for name in rows[kind]]
  if unknown := set(options.only or ()) - set(names):
    parser.error(f"{options.rows} has no {', '.join(sorted(unknown))}; its rows are "
                 f"{', '.join(names)}")
  for name in options.only or names:
    out = options.results / f"{name}.json"
    if options.list or out.exists():
      print(f"{name}: {'done' if out.exists() else 'to do'}")
      continue
    commands = []
    row, *how = rows["scored"].get(name, [name])
    if name not in rows["scored"]:
      changes, source = rows["runs"].get(name), []
      if changes is None:
        if options.generator is None:
          parser.error(f"{name}: trains a refiner alone; give --generator")
        changes, source = rows["refiners"][name], ["--from", str(options.generator)]
      commands.append(["ours.py", str(options.config), "--run", str(options.work / name), "--out",
                       str(options.work / f"{name}.json"), *source, *options.overrides, *changes])
    commands.append(["score_run.py", str(options.work / row), "--out", str(out), *how])
    for script, *arguments in commands:
      print(f"{name}: {script} {' '.join(arguments)}", flush=True)
      subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


if __name__ == "__main__":
  main()
