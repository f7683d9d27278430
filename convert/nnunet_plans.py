"""nnU-Net's plans and dataset.json as a plan, labels and network of this program.

What cannot be represented is an error in one line; what is done in another way is a line in
`Converted.differs`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import Labels, read_labels
from rfmedsam2_jax.data.plan import PLANES, ChannelRule, PlanConfig, Triple
from rfmedsam2_jax.data.volumes import load_image
from rfmedsam2_jax.nn.unet import UNetConfig

PLAIN, RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"


class Converted(NamedTuple):
  """What nnU-Net's files say, in this program's words.

  head_order: nnU-Net's output for each of ours.
  taken, differs: lines for people.
  """

  plan: PlanConfig
  rules: tuple[ChannelRule, ...]
  labels: Labels
  network: UNetConfig
  head_order: tuple[int, ...]
  mirror_axes: tuple[int, ...]
  taken: tuple[str, ...]
  differs: tuple[str, ...]


def read_plans(
  plans: Mapping[str, Any], dataset: Mapping[str, Any], configuration: str,
  mirrored: Sequence[int] | None, like: Path | None, source: str,
) -> Converted:
  """Judges plans and dataset.json.

  Args:
    mirrored: axes that nnU-Net mirrors in prediction, its order.
    like: a volume that nnU-Net was trained on, whose orientation its network knows.
    source: named in errors.

  Raises:
    UserError: what cannot be represented, or entries that are missing.
  """
  try:
    return _read_plans(plans, dataset, configuration, mirrored, like, source)
  except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
    raise UserError(f"{source}: its plans have a missing or wrong entry ({type(error).__name__}: "
                    f"{error}); nnU-Net v2 wrote other ones, copy them again") from None


def _read_plans(plans, dataset, configuration, mirrored, like, source) -> Converted:
  c = _configuration(plans, configuration, source)
  if len(c["patch_size"]) != 3:
    raise UserError(f"{source}: {configuration} is a 2D network; the generator is 3D, convert "
                    "3d_fullres")
  if c.get("previous_stage") is not None or configuration == "3d_cascade_fullres":
    raise UserError(f"{source}: {configuration} is the second network of a cascade, which also "
                    "sees the first one's result; convert 3d_fullres or 3d_lowres")
  forward = _triple(plans["transpose_forward"])
  if sorted(forward) != [0, 1, 2] or list(forward[1:]) != sorted(forward[1:]):
    raise UserError(f"{source}: transpose_forward is {list(forward)}; only the first axis may be "
                    "chosen here, the other two keep their order")
  names = dataset["channel_names"] if "channel_names" in dataset else dataset["modality"]
  channels = tuple(str(names[key]) for key in sorted(names, key=int))
  rules = _rules(plans, c, channels, source)
  labels = read_labels(dataset, Path(source))
  heads = _head_order(labels, source)
  network = _network(c, source)
  plane = next(name for name, axis in PLANES.items() if axis == forward[0])
  plan = PlanConfig(
    plane=plane,  # type: ignore[arg-type]
    spacing=_floats(c["spacing"]), patch_size=_triple(c["patch_size"]), channels=rules,
    strides=network.strides, kernels=network.kernels,
  )
  if not all(1e-3 <= size <= 1e4 for size in plan.spacing or ()) or not all(
      1 <= size <= 2**12 for size in plan.patch_size or ()):
    raise UserError(f"{source}: its plans have spacing {plan.spacing} and patch_size "
                    f"{plan.patch_size}, which cannot be; copy the plans again")
  mirror_axes = tuple(sorted(int(axis) for axis in mirrored or ()))
  taken = [
    f"spacing {list(plan.spacing or ())} mm, patch {list(plan.patch_size or ())}, {plane} slices "
    f"first (transpose_forward {list(forward)})",
    "intensities: " + ", ".join(
      f"{rule.name} {rule.kind}{' inside the object' if rule.masked else ''}" for rule in rules),
    f"mirrored axes of prediction: {list(mirror_axes)}",
  ]
  differs = []
  if like is None:
    differs.append("nnU-Net takes the axes as they lie in a file, this program turns volumes to "
                   "LPS first; name a training volume (like), else files must be LPS")
  else:
    seen = _mirrored(like, forward)
    network = dataclasses.replace(network, mirrored=seen)
    taken.append(f"the network sees axes {list(seen)} mirrored, as in {like.name}")
  if any(rule.kind == "ct" for rule in rules):
    differs.append("volumes with a CT channel are not cropped to their nonzero box")
  for key in ("resampling_fn_data", "resampling_fn_probabilities"):
    name = c.get(key, "resample_data_or_seg_to_shape")
    expected = {"order": 3 if key.endswith("data") else 1, "order_z": 0, "force_separate_z": None}
    given = {k: v for k, v in c.get(f"{key}_kwargs", expected).items() if k in expected}
    if name != "resample_data_or_seg_to_shape" or given != expected:
      differs.append(f"{key} is {name} with {given}; here it is nnU-Net's default, {expected}")
  differs.append("an axis that shrinks by more than 1.5 is averaged instead of sampled by a spline")
  return Converted(plan, rules, labels, network, heads, mirror_axes, tuple(taken), tuple(differs))


def _mirrored(like: Path, forward: Triple) -> tuple[int, ...]:
  """Axes of prepared volumes that run against those of a file."""
  geometry = load_image(like).geometry
  if geometry.axes != (2, 1, 0):
    raise UserError(f"{like}: its axes are not in the order x, y, z (they are {geometry.axes} of "
                    "z, y, x), in which nnU-Net sees other slices than this program; not possible")
  return tuple(i for i, axis in enumerate(forward) if geometry.flipped[axis])


def _configuration(plans, name: str, source: str) -> dict[str, Any]:
  """A configuration with what it inherits."""
  every = plans["configurations"]
  if name not in every:
    raise UserError(f"{source}: its plans have no configuration {name}; choose from "
                    f"{', '.join(every)}")
  merged: dict[str, Any] = {}
  seen: list[str] = []
  while name is not None and name not in seen:
    seen.append(name)
    merged = {**every[name], **merged}
    name = every[name].get("inherits_from")
  return merged


def _rules(plans, c, channels, source) -> tuple[ChannelRule, ...]:
  schemes, masked = c["normalization_schemes"], c["use_mask_for_norm"]
  if not len(schemes) == len(masked) == len(channels):
    raise UserError(f"{source}: has {len(schemes)} normalisations for {len(channels)} channels; "
                    "plans and dataset.json do not belong together")
  rules = []
  for index, (name, scheme, inside) in enumerate(zip(channels, schemes, masked, strict=True)):
    if scheme == "ZScoreNormalization":
      rules.append(ChannelRule(name, "zscore", masked=bool(inside)))
    elif scheme == "CTNormalization":
      p = plans["foreground_intensity_properties_per_channel"][str(index)]
      rules.append(ChannelRule(
        name, "ct", float(p["percentile_00_5"]), float(p["percentile_99_5"]), float(p["mean"]),
        max(float(p["std"]), 1e-8)))
    else:
      raise UserError(f"{source}: channel {name} is normalised by {scheme}; this program has "
                      "CTNormalization and ZScoreNormalization")
  return tuple(rules)


def _head_order(labels: Labels, source: str) -> tuple[int, ...]:
  """nnU-Net orders outputs by label value, this program as dataset.json does."""
  if labels.regions:
    return tuple(range(len(labels.structures)))
  if sorted(labels.output_values) != list(range(1, len(labels.output_values) + 1)):
    raise UserError(f"{source}: label values {sorted(labels.output_values)} are not consecutive, "
                    "which nnU-Net demands; check dataset.json")
  return (0, *labels.output_values)


def _network(c, source: str) -> UNetConfig:
  a = c.get("architecture")
  if a is None:  # plans of nnU-Net before 2.3
    kind, k = str(c["UNet_class_name"]), {
      "kernel_sizes": c["conv_kernel_sizes"], "strides": c["pool_op_kernel_sizes"],
      "n_conv_per_stage": c["n_conv_per_stage_encoder"],
      "n_blocks_per_stage": c["n_conv_per_stage_encoder"],
      "n_conv_per_stage_decoder": c["n_conv_per_stage_decoder"],
      "features_per_stage": [
        min(int(c["UNet_base_num_features"]) * 2**i, int(c["unet_max_num_features"]))
        for i in range(len(c["conv_kernel_sizes"]))],
    }
  else:
    kind, k = str(a["network_class_name"]).rpartition(".")[2], a["arch_kwargs"]
  if kind not in (PLAIN, RESIDUAL):
    raise UserError(f"{source}: the network is a {kind}; only {PLAIN} and {RESIDUAL} can be "
                    "converted")
  norm, leaky = k.get("norm_op_kwargs") or {}, k.get("nonlin_kwargs") or {}
  for what, value, wanted in (
    ("conv_op", _last(k.get("conv_op", "Conv3d")), "Conv3d"),
    ("norm_op", _last(k.get("norm_op", "InstanceNorm3d")), "InstanceNorm3d"),
    ("norm_op_kwargs.eps", norm.get("eps", 1e-5), 1e-5),
    ("norm_op_kwargs.affine", norm.get("affine", True), True),
    ("dropout_op", k.get("dropout_op"), None),
    ("nonlin", _last(k.get("nonlin", "LeakyReLU")), "LeakyReLU"),
    ("nonlin_kwargs.negative_slope", leaky.get("negative_slope", 0.01), 0.01),
    ("nonlin_first", k.get("nonlin_first", False), False),
    ("block", _last(k.get("block", "BasicBlockD")), "BasicBlockD"),
    ("stem_channels", k.get("stem_channels"), None),
  ):
    if value != wanted:
      raise UserError(f"{source}: the network has {what}={value}; the generator has {wanted}")
  strides, kernels = _triples(k["strides"]), _triples(k["kernel_sizes"])
  if strides[0] != (1, 1, 1) or any(n % 2 == 0 for kernel in kernels for n in kernel):
    raise UserError(f"{source}: strides {strides} or kernels {kernels}; the first stage must keep "
                    "the resolution, and kernels be odd")
  if "n_stages" in k and int(k["n_stages"]) != len(strides):
    raise ValueError(f"n_stages is {k['n_stages']} with {len(strides)} strides")
  features = tuple(int(n) for n in k["features_per_stage"])
  decoder = _same(k["n_conv_per_stage_decoder"], "n_conv_per_stage_decoder", source)
  if kind == PLAIN:
    convs = _same(k["n_conv_per_stage"], "n_conv_per_stage", source)
    return UNetConfig(features, strides, kernels, convs, decoder_convs=decoder)
  given = k["n_blocks_per_stage"]
  blocks = tuple(int(n) for n in (given if isinstance(given, list | tuple)
                                  else [given] * len(strides)))
  if not all(1 <= n <= 100 for n in blocks):
    raise UserError(f"{source}: n_blocks_per_stage is {given}; give 1 or more")
  return UNetConfig(features, strides, kernels, decoder_convs=decoder, blocks=blocks)


def architecture(network: UNetConfig, channels: int, outputs: int) -> dict[str, Any]:
  """The way back: what plans.json says of a network, with what nnU-Net takes from dataset.json."""
  stages = len(network.features)
  kwargs = {
    "n_stages": stages, "features_per_stage": network.features, "kernel_sizes": network.kernels,
    "strides": network.strides, "n_conv_per_stage_decoder": (network.convs_up,) * (stages - 1),
    "conv_op": "torch.nn.modules.conv.Conv3d", "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
  }
  if network.blocks is None:
    kind, kwargs["n_conv_per_stage"] = PLAIN, (network.convs_per_stage,) * stages
  else:
    kind, kwargs["n_blocks_per_stage"] = RESIDUAL, network.blocks
  return {
    "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
    "arch_kwargs": kwargs, "_kw_requires_import": ("conv_op", "norm_op", "dropout_op", "nonlin"),
    "input_channels": channels, "num_classes": outputs,
  }


def _same(value: Any, name: str, source: str) -> int:
  numbers = {int(n) for n in (value if isinstance(value, list | tuple) else [value])}
  if len(numbers) != 1:
    raise UserError(f"{source}: {name} is {value}; the generator has the same number of "
                    "convolutions in every stage")
  (number,) = numbers
  if not 1 <= number <= 100:
    raise UserError(f"{source}: {name} is {value}; give 1 or more")
  return number


def _last(name: Any) -> str:
  return str(name).rpartition(".")[2]


def _triple(values: Any) -> Triple:
  a, b, c = (int(n) for n in ([values] * 3 if isinstance(values, int) else values))
  return a, b, c


def _triples(values: Any) -> tuple[Triple, ...]:
  return tuple(_triple(value) for value in values)


def _floats(values: Any) -> tuple[float, float, float]:
  a, b, c = (float(n) for n in values)
  return a, b, c
