"""`python -m convert nnunet MODEL OUT`: a trained nnU-Net v2 as the prompt generator.

Out: a checkpoint that `generator.init_from` starts from, with a config.yaml beside its parameters
that has nnU-Net's spacing, patch, intensity rules and network. The files are nnU-Net's own:
plans.json, dataset.json and fold_X/checkpoint_final.pth of a model folder; a checkpoint alone holds
copies of the first two.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from convert.nnunet_plans import Converted, read_plans
from convert.nnunet_weights import load_checkpoint, network_params
from convert.outputs import check_target
from convert.sources import file_sha256
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Passing, Report, silent
from rfmedsam2_jax.data.files import read_json, replacing_whole
from rfmedsam2_jax.data.run_folder import versions
from rfmedsam2_jax.nn.unet import UNet
from rfmedsam2_jax.weights.generator import generator_json
from rfmedsam2_jax.weights.orbax import save_params


def parser() -> argparse.ArgumentParser:
  result = argparse.ArgumentParser(
    prog="python -m convert nnunet",
    description="Turns a trained nnU-Net v2 (a plain 3D conv U-Net) into a prompt generator and "
    "the config that goes with it.",
  )
  result.add_argument("source", type=Path,
                      help="the model's folder nnUNetTrainer__nnUNetPlans__3d_fullres, or a .pth")
  result.add_argument("out", type=Path, help="the checkpoint's folder")
  result.add_argument("--fold", default="0", help="of a model's folder: 0 to 4 or all")
  result.add_argument("--checkpoint", choices=("final", "best"), default="final",
                      help="of a model's folder")
  result.add_argument("--configuration", help="of the plans; that of the checkpoint unless given")
  result.add_argument("--like", type=Path, metavar="VOLUME",
                      help="a volume that it was trained on: its orientation is the network's")
  result.add_argument("--overwrite", action="store_true", help="replace OUT")
  return result


def convert_nnunet(
  options: argparse.Namespace, report: Report, progress: Report = silent
) -> str:
  """Converts `options.source` to `options.out`; returns what was done.

  Raises:
    UserError: whatever stops it; nothing was written then.
  """
  check_target(options.out, options.overwrite, is_ours=(options.out / "about").is_dir())
  file = _file(options)
  progress(Passing(f"reading {file}"))
  stored = load_checkpoint(file)
  plans, dataset = _descriptions(options.source, file, stored)
  init = stored.get("init_args")
  init = init if isinstance(init, Mapping) else {}
  configuration = options.configuration or str(init.get("configuration", "3d_fullres"))
  if "configuration" in init and init["configuration"] != configuration:
    raise UserError(f"{file}: is of configuration {init['configuration']}, not {configuration}; "
                    "leave --configuration out")
  mirrored = stored.get("inference_allowed_mirroring_axes")
  found = read_plans(plans, dataset, configuration, mirrored, options.like, str(file))
  outputs = len(found.labels.structures) + (0 if found.labels.regions else 1)
  unet = UNet(found.network, outputs)
  params, facts = network_params(
    stored["network_weights"], unet, len(found.rules), found.head_order, str(file))
  report(f"{file}: {plans.get('dataset_name', 'nnU-Net')}, {configuration}, "
         f"{len(found.network.features)} stages, {len(found.rules)} channels, {outputs} outputs")
  for line in (*facts, *found.taken):
    report(f"  {line}")
  for line in found.differs:
    report(f"  differs: {line}")
  structures = [[structure.name, structure.values] for structure in found.labels.structures]
  about = {
    "generator": generator_json(unet, len(found.rules), structures),
    "source": {"kind": "nnU-Net v2", "name": file.name, "configuration": configuration,
               "sha256": {file.name: file_sha256(file)},
               "trainer": str(stored.get("trainer_name", ""))},
    "differs": list(found.differs),
    "versions": versions(),
  }
  with replacing_whole(options.out) as temporary:
    save_params(temporary, params, about)
    text = yaml.safe_dump(_config(found, options.out), sort_keys=False)
    (temporary / "config.yaml").write_text(
      f"# Made by python -m convert nnunet from {file.name}; name the data set: data.dataset=DIR\n"
      + text, encoding="utf-8")
  return f"converted; train with {options.out / 'config.yaml'}"


def _config(found: Converted, out: Path) -> dict[str, Any]:
  plan = {key: value for key, value in dataclasses.asdict(found.plan).items() if value is not None}
  n = found.network
  generator = {"init_from": str(out), "features": n.features, "convs_per_stage": n.convs_per_stage,
               "decoder_convs": n.decoder_convs, "mirrored": n.mirrored, "loop": {"steps": 0}}
  return _plain({"plan": plan, "generator": generator,
                 "inference": {"mirror_axes": found.mirror_axes}})


def _plain(x: Any) -> Any:
  """Tuples as lists, which YAML has."""
  if isinstance(x, dict):
    return {key: _plain(value) for key, value in x.items()}
  return [_plain(value) for value in x] if isinstance(x, list | tuple) else x


def _file(options: argparse.Namespace) -> Path:
  source = options.source
  if source.is_dir():
    source = source / f"fold_{options.fold}" / f"checkpoint_{options.checkpoint}.pth"
  if not source.is_file():
    raise UserError(f"{source}: no such file; give nnU-Net's model folder (choose with --fold and "
                    "--checkpoint) or a checkpoint file")
  return source


def _descriptions(source: Path, file: Path, stored: Mapping[str, Any]) -> tuple[Any, Any]:
  """plans.json and dataset.json: those of the folder, or the checkpoint's own copies."""
  folder = source if source.is_dir() else file.parent.parent
  init = stored.get("init_args")
  found = []
  for name, key in (("plans.json", "plans"), ("dataset.json", "dataset_json")):
    if isinstance(init, Mapping) and isinstance(init.get(key), Mapping):
      found.append(init[key])
    else:
      found.append(read_json(folder / name))
  return found[0], found[1]
