"""`rfmedsam2 track`: follow prompted structures through a volume with a checkpoint of SAM 2."""

import argparse
from pathlib import Path

from rfmedsam2_jax.base.addresses import shown
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.places import BUILTIN, word_or_path
from rfmedsam2_jax.base.progress import Passing, Progress
from rfmedsam2_jax.cli.console import Console, named_options
from rfmedsam2_jax.data.formats import FORMATS, HELP


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("image", type=Path, help="volume, or folder or .zip with a DICOM series or study")
  add("--checkpoint", type=word_or_path, default=BUILTIN,
      help="made by rfmedsam2 convert or train, or the name of fetched weights or of an installed "
      "tracker (the built-in weights)")
  add("--out", type=Path, required=True, help="folder of the results")
  add("--box", action="append", default=[], metavar="LABEL:z,x0,y0,x1,y1",
      help="a box on slice z, in voxels of the file from 0; repeat for more (coronal slices: "
      "LABEL:y,x0,z0,x1,z1, sagittal ones: LABEL:x,y0,z0,y1,z1)")
  add("--point", action="append", default=[], metavar="LABEL:z,x,y,+|-",
      help="a point inside (+) or outside (-) of a structure")
  add("--prompts", type=Path, action="append", default=[], metavar="FILE.json",
      help="boxes and points, in rounds if some correct what others found")
  add("--masks", type=Path, action="append", default=[], metavar="LABELS.nii.gz",
      help="label map with masks on some slices")
  add("--format", choices=FORMATS, default="nifti", help=HELP)
  add("--series", metavar="UID|NUMBER|NAME",
      help="which series of a study (a folder or .zip), also by its description or modality")
  add("--world", action="store_true", help="coordinates are millimetres, RAS+")
  add("--plane", choices=("axial", "coronal", "sagittal"), default="axial", help="of the slices")
  add("--window", default="percentiles", metavar="NAME|CENTRE,WIDTH",
      help="what SAM sees: soft-tissue, liver, lung, bone, brain, 40,400, or percentiles (default)")
  add("--image-size", type=int, help="side of the square (the checkpoint's)")
  add("--zoom", type=float, metavar="FACTOR",
      help="side of the cut around each structure, in sides of what its prompts enclose; 0: whole "
      "slices (2 for networks trained so, else 0)")
  add("--between", action="store_true",
      help="a structure ends at its first and its last prompted slice")
  add("--single-mask", action="store_true",
      help="one mask per slice instead of the best of three, for networks trained so")
  add("--no-cache", action="store_true",
      help="encode slices again for corrections instead of keeping their features in memory")
  add("--overwrite", action="store_true", help="replace results that exist")


def run(options: argparse.Namespace, console: Console) -> None:
  from rfmedsam2_jax.data.segmentations import check_format
  from rfmedsam2_jax.data.volumes import load_image
  # Everything that can be wrong is looked at before anything that takes long.
  if not (options.box or options.point or options.prompts or options.masks):
    raise UserError("no prompt: name a structure with --box, --point, --masks or --prompts")
  console.line(Passing(f"reading {options.image}"))
  volume = load_image(options.image, series=options.series)
  check_format(options.format, volume.geometry)
  for said in volume.geometry.remarks:
    console.warning(f"{options.image}: {said}")

  from rfmedsam2_jax.cli.prompt_options import prompts_of
  from rfmedsam2_jax.data.cuts import check_zoom
  from rfmedsam2_jax.data.files import sha256_of
  from rfmedsam2_jax.prompted.files import check_prompts, open_volume, result_paths, write_tracked
  from rfmedsam2_jax.prompted.slice_frame import names_of
  from rfmedsam2_jax.prompted.tracked import parse_window
  from rfmedsam2_jax.tracking import TrackingConfig
  from rfmedsam2_jax.weights import single_file
  window = parse_window(options.window)
  check_zoom(options.zoom)
  prompts = prompts_of(options, volume.geometry)
  names = names_of(prompts)
  check_prompts(options.checkpoint, volume, prompts, options.plane, options.image_size)
  with named_options():
    result_paths(options.out, options.image, options.overwrite, options.format)
  several = not options.single_mask
  config = TrackingConfig(multimask=several, dynamic_multimask=several, between=options.between,
                          cache="none" if options.no_cache else "bfloat16")
  if options.checkpoint == BUILTIN:
    console.line(f"{single_file.builtin_words()}; --checkpoint brings another")
  console.line(Passing(f"reading {options.checkpoint}"))
  prompted = open_volume(options.checkpoint, volume, options.plane, window, options.image_size,
                         config, Progress("slices", console.line), options.zoom)
  console.line("compiling the network")
  found = prompted.track(prompts)
  console.line(Passing("writing"))
  about = {"checkpoint": shown(str(options.checkpoint)), "plane": options.plane}
  if single_file.is_single(place := single_file.located(options.checkpoint)):
    about["sha256"] = sha256_of(place)[:12]
  written = write_tracked(options.out, volume, found, about, options.overwrite, options.format,
                          names)
  console.result("\n".join(f"written: {path}" for path in written), {"written": written})
