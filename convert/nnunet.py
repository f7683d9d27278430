"""A trained nnU-Net v2 as the prompt generator.

Out: a checkpoint that `generator.init_from` starts from, with a config.yaml beside its parameters
that has nnU-Net's spacing, patch, intensity rules and network. The files are nnU-Net's own:
plans.json, dataset.json and fold_X/checkpoint_final.pth of a model folder; a checkpoint alone holds
copies of the first two.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Passing, Report, silent
from rfmedsam2_jax.data.files import read_json, replacing_whole, sha256_of
from rfmedsam2_jax.data.run_folder import versions
from rfmedsam2_jax.nn.unet import UNet
from rfmedsam2_jax.weights.generator import generator_json
from rfmedsam2_jax.weights.orbax import save_params

from .nnunet_plans import Converted, read_plans
from .nnunet_weights import load_checkpoint, network_params


@dataclasses.dataclass(frozen=True)
class Wanted:
  """fold, checkpoint ("final", "best"): of a model's folder. configuration: of the plans, None for
  the checkpoint's own. like: a volume that it was trained on, whose orientation is the network's.
  """

  fold: str = "0"
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
  file = _file(source, wanted)
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
               "sha256": {file.name: sha256_of(file)},
               "trainer": str(stored.get("trainer_name", ""))},
    "differs": list(found.differs),
    "versions": versions(),
  }
  with replacing_whole(out) as temporary:
    save_params(temporary, params, about)
    text = yaml.safe_dump(_config(found, out), sort_keys=False)
    (temporary / "config.yaml").write_text(
      f"# Made by rfmedsam2 convert nnunet from {file.name}; name the data set: data.dataset=DIR\n"
      + text, encoding="utf-8")
  return f"converted; train with {out / 'config.yaml'}"


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


def _file(source: Path, wanted: Wanted) -> Path:
  if source.is_dir():
    source = source / f"fold_{wanted.fold}" / f"checkpoint_{wanted.checkpoint}.pth"
  if not source.is_file():
    raise UserError(f"{source}: no such file; give nnU-Net's model folder (with the right fold and "
                    "checkpoint) or a checkpoint file")
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
