"""A trained nnU-Net v2 as the prompt generator.

Out: a checkpoint that `generator.init_from` starts from, with a config.yaml beside its parameters
that has nnU-Net's spacing, patch, intensity rules and network. Several folds become one generator,
whose logits are their mean, as nnU-Net predicts. The files are nnU-Net's own: plans.json,
dataset.json and fold_X/checkpoint_final.pth of a model folder; a checkpoint alone holds copies of
the first two.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Passing, Report, silent
from rfmedsam2_jax.data.files import read_json, replacing_whole, sha256_of
from rfmedsam2_jax.data.run_folder import versions
from rfmedsam2_jax.nn.unet import UNet, UNetConfig
from rfmedsam2_jax.weights.generator import generator_json
from rfmedsam2_jax.weights.orbax import save_params

from .nnunet_plans import Converted, read_plans
from .nnunet_weights import load_checkpoint, network_params


@dataclasses.dataclass(frozen=True)
class Wanted:
  """folds, checkpoint ("final", "best"): of a model's folder; several folds become an ensemble.
  configuration: of the plans, None for the checkpoint's own. like: a volume that it was trained on,
  whose orientation is the network's.
  """

  folds: tuple[str, ...] = ("0",)
  checkpoint: str = "final"
  configuration: str | None = None
  like: Path | None = None


def convert_nnunet(
  source: Path, out: Path, wanted: Wanted, report: Report, progress: Report = silent
) -> str:
  """Converts a model's folder or a .pth to the folder `out`, which is replaced.

  Returns:
    what was done.

  Raises:
    UserError: whatever stops it; nothing was written then.
  """
  read = [_read(file, source, wanted, progress) for file in _files(source, wanted)]
  first, *others = read
  for other in others:
    if other.found != first.found:
      raise UserError(f"{other.file}: its plans or dataset.json are not those of {first.file}; an "
                      "ensemble is of one training, convert the folds one by one")
  found, network = first.found, first.found.network
  if others:
    network = dataclasses.replace(network, members=len(read))
  outputs = len(found.labels.structures) + (0 if found.labels.regions else 1)
  params, facts = zip(*(network_params(
    one.weights, UNet(found.network, outputs), len(found.rules), found.head_order, str(one.file))
    for one in read), strict=True)
  blocks = f", residual blocks {list(network.blocks)}" if network.blocks else ""
  report(f"{first.file}: {first.dataset}, {first.configuration}, "
         f"{len(network.features)} stages{blocks}, {len(found.rules)} channels, {outputs} outputs")
  if others:
    report(f"  {len(read)} folds, whose logits are averaged: {', '.join(wanted.folds)}")
  for line in (*facts[0], *found.taken):
    report(f"  {line}")
  for line in found.differs:
    report(f"  differs: {line}")
  structures = [[structure.name, structure.values] for structure in found.labels.structures]
  name = first.file.name
  files = {f"{one.file.parent.name}/{name}" if others else name: one.file for one in read}
  about = {
    "generator": generator_json(UNet(network, outputs), len(found.rules), structures),
    "source": {"kind": "nnU-Net v2", "name": name, "configuration": first.configuration,
               "sha256": {name: sha256_of(file) for name, file in files.items()},
               "trainer": first.trainer},
    "differs": list(found.differs),
    "versions": versions(),
  }
  whole = {f"members_{i}": tree for i, tree in enumerate(params)} if others else params[0]
  with replacing_whole(out) as temporary:
    save_params(temporary, whole, about)
    text = yaml.safe_dump(_config(found, network, out), sort_keys=False)
    (temporary / "config.yaml").write_text(
      f"# Made by rfmedsam2 convert nnunet from {name}; name the data set: data.dataset=DIR\n"
      + text, encoding="utf-8")
  return f"converted; train with {out / 'config.yaml'}"


class _Read(NamedTuple):
  """One checkpoint of nnU-Net."""

  file: Path
  weights: Mapping[str, Any]
  found: Converted
  configuration: str
  dataset: str
  trainer: str


def _read(file: Path, source: Path, wanted: Wanted, progress: Report) -> _Read:
  progress(Passing(f"reading {file}"))
  stored = load_checkpoint(file)
  plans, dataset = _descriptions(source, file, stored)
  init = stored.get("init_args")
  init = init if isinstance(init, Mapping) else {}
  configuration = wanted.configuration or str(init.get("configuration", "3d_fullres"))
  if "configuration" in init and init["configuration"] != configuration:
    raise UserError(f"{file}: is of configuration {init['configuration']}, not {configuration}; "
                    "leave configuration out")
  mirrored = stored.get("inference_allowed_mirroring_axes")
  found = read_plans(plans, dataset, configuration, mirrored, wanted.like, str(file))
  return _Read(file, stored["network_weights"], found, configuration,
               str(plans.get("dataset_name", "nnU-Net")), str(stored.get("trainer_name", "")))


def _config(found: Converted, n: UNetConfig, out: Path) -> dict[str, Any]:
  plan = {key: value for key, value in dataclasses.asdict(found.plan).items() if value is not None}
  encoder = {"blocks": n.blocks} if n.blocks else {"convs_per_stage": n.convs_per_stage}
  ensemble = {"members": n.members} if n.members > 1 else {}
  generator = {"init_from": str(out), "features": n.features, **encoder,
               "decoder_convs": n.decoder_convs, "mirrored": n.mirrored, **ensemble,
               "loop": {"steps": 0}}
  return _plain({"plan": plan, "generator": generator,
                 "inference": {"mirror_axes": found.mirror_axes}})


def _plain(x: Any) -> Any:
  """Tuples as lists, which YAML has."""
  if isinstance(x, dict):
    return {key: _plain(value) for key, value in x.items()}
  return [_plain(value) for value in x] if isinstance(x, list | tuple) else x


def _files(source: Path, wanted: Wanted) -> list[Path]:
  if not source.is_dir() and len(wanted.folds) > 1:
    raise UserError(f"{source}: is one network, not folds {', '.join(wanted.folds)}; give the "
                    "model's folder")
  files = [source]
  if source.is_dir():
    name = f"checkpoint_{wanted.checkpoint}.pth"
    files = [source / f"fold_{fold}" / name for fold in dict.fromkeys(wanted.folds)]
  for file in files:
    if not file.is_file():
      raise UserError(f"{file}: no such file; give nnU-Net's model folder (with the right fold and "
                      "checkpoint) or a checkpoint file")
  return files


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
