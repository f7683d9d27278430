"""Model folders as nnU-Net v2 leaves them, with random weights."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
unet_module = pytest.importorskip("dynamic_network_architectures.architectures.unet")

ISOTROPIC = dict(
  n_stages=3, features_per_stage=[4, 6, 8], kernel_sizes=[[3, 3, 3]] * 3,
  strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2]], n_conv_per_stage=[2, 2, 2],
  n_conv_per_stage_decoder=[1, 1],
)
ANISOTROPIC = dict(
  n_stages=4, features_per_stage=[4, 6, 8, 8],
  kernel_sizes=[[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]],
  strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]], n_conv_per_stage=[2] * 4,
  n_conv_per_stage_decoder=[2] * 3,
)
# Skips with a pooling, a projection, and both.
RESIDUAL = dict(
  n_stages=4, features_per_stage=[4, 6, 8, 8],
  kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
  strides=[[1, 1, 1], [1, 2, 2], [1, 1, 1], [2, 2, 2]], n_blocks_per_stage=[1, 2, 1, 2],
  n_conv_per_stage_decoder=[1] * 3,
)
LABELS = {"background": 0, "b": 2, "a": 1}  # not in the order of the values


def write_model(folder, network_kwargs, channels, labels=LABELS, bias=True, fold=0, **changes):
  """A model folder as nnU-Net leaves it, with random weights; gives the network too."""
  torch.manual_seed(fold)
  kind = "ResidualEncoderUNet" if "n_blocks_per_stage" in network_kwargs else "PlainConvUNet"
  network = getattr(unet_module, kind)(
    channels, conv_op=torch.nn.Conv3d, num_classes=len(labels), conv_bias=bias,
    norm_op=torch.nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
    nonlin=torch.nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    **network_kwargs)
  for parameter in network.parameters():  # nothing stays at its neutral element
    parameter.data += 0.1 * torch.randn_like(parameter)
  kwargs = network_kwargs | {
    "conv_op": "torch.nn.modules.conv.Conv3d", "conv_bias": bias, "dropout_op": None,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
  }
  configuration = {
    "patch_size": [16, 32, 32], "spacing": [3.0, 1.0, 1.5],
    "normalization_schemes": ["CTNormalization", "ZScoreNormalization"][:channels],
    "use_mask_for_norm": [False, True][:channels],
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"order": 3, "order_z": 0, "force_separate_z": None},
    "architecture": {
      "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
      "arch_kwargs": kwargs,
    },
  } | changes
  statistics = {"percentile_00_5": -50.0, "percentile_99_5": 200.0, "mean": 60.0, "std": 25.0}
  plans = {
    "dataset_name": "Dataset001_Test", "transpose_forward": [0, 1, 2],
    "configurations": {"3d_fullres": configuration},
    "foreground_intensity_properties_per_channel": {"0": statistics},
  }
  dataset = {"channel_names": {str(i): name for i, name in enumerate(["CT", "T2"][:channels])},
             "labels": labels, "file_ending": ".nii.gz"}
  (folder / f"fold_{fold}").mkdir(parents=True)
  torch.save({
    "network_weights": network.state_dict(), "trainer_name": "nnUNetTrainer",
    "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": fold,
                  "dataset_json": dataset, "device": torch.device("cpu")},
    "inference_allowed_mirroring_axes": (0, 1, 2), "_best_ema": np.float64(0.5),
    "logging": {"train_losses": [np.float32(1)], "dice": [[np.float64(0.5)]]},
    "grad_scaler_state": None,
  }, folder / f"fold_{fold}" / "checkpoint_final.pth")
  return network.eval()
