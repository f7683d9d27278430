"""The command line: train, shard, predict, evaluate, track, quickstart.

Exit status: 0 done, 2 something that the user can mend (one line says what), 75 stopped by SIGTERM
and saved (start it again with --resume), 130 interrupted.
"""

import argparse
import importlib.resources
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rfmedsam2_jax.errors import RESUME, Stopped, UserError

# glibc then asks for huge pages. XLA:CPU allocates what lies between two operations anew for every
# call, and walks through it: page faults and misses of the address cache are what it waits for.
_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def _with_huge_pages() -> None:
  """Starts this process again, once, with a setting that glibc reads at the start only."""
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = _HUGE_PAGES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status."""
  parser = _parser()
  options, rest = parser.parse_known_args(arguments)
  # argparse takes positional arguments in one block only; overrides may also follow the options.
  if rest and not (hasattr(options, "overrides") and all("=" in a and a[0] != "-" for a in rest)):
    parser.error(f"unknown arguments: {' '.join(rest)}")
  if rest:
    options.overrides += rest
  if arguments is None:
    _with_huge_pages()
  _set_up_jax()
  try:
    options.run(options)
  except UserError as error:
    print(f"rfmedsam2: {error}", file=sys.stderr)
    return 2
  except Stopped as stopped:
    print(f"rfmedsam2: {stopped}", file=sys.stderr)
    return RESUME
  except KeyboardInterrupt:
    print("rfmedsam2: interrupted; what was finished is kept", file=sys.stderr)
    return 130
  except OSError as error:
    if error.filename is None:
      raise
    print(f"rfmedsam2: {error.filename}: {error.strerror}; free it or choose another place",
          file=sys.stderr)
    return 2
  return 0


def _set_up_jax() -> None:
  import jax

  # Compiled programs are kept between commands; set JAX_COMPILATION_CACHE_DIR to move them.
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "rfmedsam2_jax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  for name in ("absl", "orbax", "jax"):
    logging.getLogger(name).setLevel(logging.ERROR)


def _report(line: str) -> None:
  print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="rfmedsam2",
    description="Fully automatic segmentation of CT and MRI volumes with SAM 2, in JAX.",
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")

  train = commands.add_parser("train", help="train generator and refiner on a data set")
  train.add_argument("config", type=Path, help="YAML file, see configs/")
  train.add_argument("overrides", nargs="*", help="values by path, generator.loop.steps=500")
  train.add_argument("--out", type=Path, required=True, help="folder of the run")
  train.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
  train.add_argument("--overwrite", action="store_true", help="replace the run in --out")
  train.add_argument("--profile", action="store_true", help="leave a trace of some steps in --out")
  train.add_argument(
    "--distributed", default="auto", metavar="HOW",
    help="auto (TPU pods, SLURM, Open MPI), off, or HOST:PORT,PROCESSES,INDEX",
  )
  train.set_defaults(run=_train)

  shard = commands.add_parser(
    "shard", help="show what training would hold and send on a mesh, without its devices"
  )
  shard.add_argument("config", type=Path, help="YAML file, see configs/")
  shard.add_argument("overrides", nargs="*", help="values by path, mesh.fsdp=8")
  shard.add_argument("--devices", type=int, required=True, help="number of devices of the mesh")
  shard.add_argument("--phase", choices=("generator", "refiner"), help="one phase (both)")
  shard.add_argument("--channels", type=int, default=1, help="of the images (1)")
  shard.add_argument("--structures", type=int, default=15, help="to be segmented (15)")
  shard.add_argument(
    "--no-compile", action="store_true", help="only where arrays lie: seconds, not minutes"
  )
  shard.set_defaults(run=_shard)

  predict = commands.add_parser("predict", help="segment volumes with a trained run")
  predict.add_argument(
    "paths", nargs="+", type=Path, metavar="RUN... INPUT...",
    help="one run folder, or several to be averaged, then NIfTI files or folders",
  )
  predict.add_argument("--out", type=Path, required=True, help="folder of the label maps")
  predict.add_argument(
    "--prompts", choices=("generated", "oracle", "given"), default="generated",
    help="automatic (default), boxes from true labels (upper limit), or a person's",
  )
  predict.add_argument("--labels", type=Path, help="folder of label maps for oracle or given")
  predict.add_argument("--given", type=Path, help="JSON of boxes and points for --prompts given")
  predict.add_argument("--save-stages", action="store_true", help="also write every stage")
  predict.add_argument("--overwrite", action="store_true", help="replace label maps that exist")
  predict.set_defaults(run=_predict)

  evaluate = commands.add_parser("evaluate", help="score label maps against references")
  evaluate.add_argument("predictions", type=Path, help="folder or file")
  evaluate.add_argument("references", type=Path, help="folder or file")
  evaluate.add_argument(
    "--labels",
    type=Path,
    help="data set folder, or run, that names the structures; default: label values are the names",
  )
  evaluate.add_argument("--tolerance", type=float, default=1.0, help="mm, of the surface Dice (1)")
  evaluate.add_argument("--partial", action="store_true", help="not all references are predicted")
  evaluate.add_argument("--json", type=Path, help="all scores; default PREDICTIONS/scores.json")
  evaluate.set_defaults(run=_evaluate)

  track = commands.add_parser(
    "track", help="follow prompted structures through a volume with a checkpoint of SAM 2"
  )
  track.add_argument("image", type=Path, help="NIfTI file")
  track.add_argument(
    "--checkpoint", type=Path, required=True, help="folder made by python -m convert"
  )
  track.add_argument("--out", type=Path, required=True, help="folder of the results")
  track.add_argument(
    "--box", action="append", default=[], metavar="LABEL:z,x0,y0,x1,y1",
    help="a box on slice z, in voxels of the file from 0; repeat for more (coronal slices: "
    "LABEL:y,x0,z0,x1,z1, sagittal ones: LABEL:x,y0,z0,y1,z1)",
  )
  track.add_argument(
    "--point", action="append", default=[], metavar="LABEL:z,x,y,+|-",
    help="a point inside (+) or outside (-) of a structure",
  )
  track.add_argument(
    "--prompts", type=Path, action="append", default=[], metavar="FILE.json",
    help="boxes and points, in rounds if some correct what others found",
  )
  track.add_argument(
    "--masks", type=Path, action="append", default=[], metavar="LABELS.nii.gz",
    help="label map with masks on some slices",
  )
  track.add_argument("--world", action="store_true", help="coordinates are millimetres, RAS+")
  track.add_argument(
    "--plane", choices=("axial", "coronal", "sagittal"), default="axial", help="of the slices"
  )
  track.add_argument(
    "--window", default="percentiles", metavar="NAME|CENTRE,WIDTH",
    help="what SAM sees: soft-tissue, liver, lung, bone, brain, 40,400, or percentiles (default)",
  )
  track.add_argument("--image-size", type=int, help="side of the square (the checkpoint's)")
  track.add_argument(
    "--single-mask", action="store_true",
    help="one mask per slice instead of the best of three, for networks trained so",
  )
  track.add_argument(
    "--no-cache", action="store_true",
    help="encode slices again for corrections instead of keeping their features in memory",
  )
  track.add_argument("--overwrite", action="store_true", help="replace results that exist")
  track.set_defaults(run=_track)

  quickstart = commands.add_parser(
    "quickstart", help="generate phantoms, train on them, segment unseen ones, score and picture"
  )
  quickstart.add_argument("overrides", nargs="*", help="values of the config, by path")
  quickstart.add_argument("--out", type=Path, default=Path("demo"), help="folder (demo)")
  quickstart.add_argument("--resume", action="store_true", help="go on where it stopped")
  quickstart.add_argument("--overwrite", action="store_true", help="start anew")
  quickstart.set_defaults(run=_quickstart)
  return parser


def _train(options: argparse.Namespace) -> None:
  from rfmedsam2_jax.config import load_config
  from rfmedsam2_jax.experiment import train
  from rfmedsam2_jax.parallel import hosts

  hosts.initialise(options.distributed)
  config = load_config(options.config, options.overrides)
  if not config.data.dataset:
    raise UserError(f"{options.config}: data.dataset is empty; name the folder of the data set")
  train(config, options.out, options.resume, options.overwrite, _report, options.profile)


def _shard(options: argparse.Namespace) -> None:
  import jax

  from rfmedsam2_jax.config import load_config

  if options.devices < 1 or options.channels < 1 or options.structures < 1:
    raise UserError("--devices, --channels and --structures: give numbers from 1 on")
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", options.devices)
  from rfmedsam2_jax.shard import shard

  shard(
    load_config(options.config, options.overrides), options.channels, options.structures,
    [options.phase] if options.phase else ["generator", "refiner"], print, not options.no_compile,
  )


def _split_runs(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
  """Leading run folders, and the inputs behind them."""
  count = 0
  while count < len(paths) and (paths[count] / "config.yaml").is_file():
    count += 1
  runs, inputs = list(paths[: max(count, 1)]), list(paths[max(count, 1) :])
  if not inputs:
    raise UserError(f"{paths[-1]}: no input given behind the run; name NIfTI files or folders")
  return runs, inputs


def _predict(options: argparse.Namespace) -> None:
  from rfmedsam2_jax.api import load, predict

  runs, inputs = _split_runs(options.paths)
  models = [load(run) for run in runs]
  began = time.monotonic()
  written = predict(
    models, inputs, options.out, options.prompts, options.labels, options.given,
    options.save_stages, options.overwrite, _report,
  )
  _report(f"{len(written)} label maps in {options.out}, {time.monotonic() - began:.0f} s")


def _evaluate(options: argparse.Namespace) -> None:
  from rfmedsam2_jax.data.datasets import Labels, read_dataset
  from rfmedsam2_jax.data.plan import load_plan
  from rfmedsam2_jax.inference.evaluate import evaluate_folders, save_scores, table

  labels: Labels | None = None
  if options.labels:
    # A run may have been trained on a few of its data set's structures: those are scored.
    plan = options.labels / "plan.json"
    labels = load_plan(plan).labels if plan.is_file() else read_dataset(options.labels).labels
  scores = evaluate_folders(
    options.predictions, options.references, labels, options.tolerance, options.partial
  )
  print(table(scores))
  folder = options.predictions if options.predictions.is_dir() else options.predictions.parent
  target = options.json or folder / "scores.json"
  save_scores(target, scores)
  print(f"\nall scores: {target}")


def _track(options: argparse.Namespace) -> None:
  from rfmedsam2_jax.data.volumes import load_image
  from rfmedsam2_jax.inference.tracked import parse_window
  from rfmedsam2_jax.progress import Progress
  from rfmedsam2_jax.prompting import (
    check_prompts,
    open_volume,
    prompts_of_options,
    result_paths,
    write_tracked,
  )
  from rfmedsam2_jax.tracking import TrackingConfig

  # Everything that can be wrong is looked at before anything that takes long.
  window = parse_window(options.window)
  volume = load_image(options.image)
  prompts = prompts_of_options(
    volume, options.box, options.point, options.prompts, options.masks, options.plane,
    options.world,
  )
  check_prompts(options.checkpoint, volume, prompts, options.plane, options.image_size)
  result_paths(options.out, options.image, options.overwrite)
  config = TrackingConfig(
    multimask=not options.single_mask,
    dynamic_multimask=not options.single_mask,
    cache="none" if options.no_cache else "bfloat16",
  )
  prompted = open_volume(
    options.checkpoint, volume, options.plane, window, options.image_size, config,
    Progress("slices", _report),
  )
  found = prompted.track(prompts)
  about = {"checkpoint": str(options.checkpoint), "plane": options.plane}
  for path in write_tracked(options.out, volume, found, about, options.overwrite):
    _report(f"written: {path}")


def packaged_config(name: str) -> Path:
  """A config of configs/, in a clone or in an installed package."""
  clone = Path(__file__).parents[1] / "configs" / name
  if clone.is_file():
    return clone
  return Path(str(importlib.resources.files("rfmedsam2_jax.configs") / name))


def _quickstart(options: argparse.Namespace) -> None:
  from rfmedsam2_jax.quickstart import quickstart

  quickstart(
    packaged_config("quickstart.yaml"), options.overrides, options.out, options.resume,
    options.overwrite, _report,
  )
