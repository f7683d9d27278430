"""Names and shapes of transformers' Sam2Model and Sam2VideoModel as official ones.

`transformers` renames almost every part of SAM 2, keeps the four point embeddings in one tensor
and the random Fourier matrix twice. Sam2Model is the image half of Sam2VideoModel, under the same
names.
"""

import re
from collections.abc import Mapping

import numpy as np

# Rewritings of a whole name, in this order; each may apply or not.
_RULES: tuple[tuple[str, str], ...] = (
  # Multilayer perceptrons: in and out are layers 0 and 1, or 0 and 2 where one is between them.
  (r"(\.mlp)\.proj_in\.", r"\1.layers.0."),
  (r"(\.mlp)\.proj_out\.", r"\1.layers.1."),
  (r"(_head|_mlps\.\d+|object_pointer_proj)\.layers\.0\.", r"\1.layers.1."),
  (r"(_head|_mlps\.\d+|object_pointer_proj)\.proj_in\.", r"\1.layers.0."),
  (r"(_head|_mlps\.\d+|object_pointer_proj)\.proj_out\.", r"\1.layers.2."),
  # Convolution, norm and activation of the mask's way into memory count as three.
  (r"(mask_downsampler)\.final_conv\.", r"\1.encoder.12."),
  *(
    (rf"(mask_downsampler)\.layers\.{i}\.{part}\.", rf"\1.encoder.{3 * i + shift}.")
    for i in range(4) for shift, part in enumerate(("conv", "layer_norm"))
  ),
  (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
  (r"\.patch_embed\.projection\.", ".patch_embed.proj."),
  (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
  (r"^prompt_encoder\.shared_embedding\.positional_embedding$",
   "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
  (r"\.mask_embed\.conv1\.", ".mask_downscaling.0."),
  (r"\.mask_embed\.layer_norm1\.", ".mask_downscaling.1."),
  (r"\.mask_embed\.conv2\.", ".mask_downscaling.3."),
  (r"\.mask_embed\.layer_norm2\.", ".mask_downscaling.4."),
  (r"\.mask_embed\.conv3\.", ".mask_downscaling.6."),
  (r"\.upscale_conv1\.", ".output_upscaling.0."),
  (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
  (r"\.upscale_conv2\.", ".output_upscaling.3."),
  (r"^(prompt_encoder|mask_decoder)\.", r"sam_\1."),
  (r"^memory_encoder\.feature_projection\.", "memory_encoder.pix_feat_proj."),
  (r"^memory_encoder\.projection\.", "memory_encoder.out_proj."),
  (r"^memory_encoder\.memory_fuser\.", "memory_encoder.fuser."),
  (r"\.depthwise_conv\.", ".dwconv."),
  (r"\.pointwise_conv(\d)\.", r".pwconv\1."),
  (r"(fuser\.layers\.\d+)\.scale$", r"\1.gamma"),
  (r"\.o_proj\.", ".out_proj."),
  (r"\.layer_norm", ".norm"),
  (r"^object_pointer_proj\.", "obj_ptr_proj."),
  (r"^temporal_positional_encoding_projection_layer\.", "obj_ptr_tpos_proj."),
  (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
  (r"^no_object_pointer$", "no_obj_ptr"),
  (r"^occlusion_spatial_embedding_parameter$", "no_obj_embed_spatial"),
  (r"^no_memory_embedding$", "no_mem_embed"),
  (r"^no_memory_positional_encoding$", "no_mem_pos_enc"),
)
_POINTS = "prompt_encoder.point_embed.weight"
_MATRIX = "prompt_encoder.shared_embedding.positional_embedding"
_MATRIX_AGAIN = "shared_image_embedding.positional_embedding"


def official_name(name: str) -> str:
  """The official name of a tensor that has a counterpart; other names come back changed or not."""
  for pattern, replacement in _RULES:
    name = re.sub(pattern, replacement, name)
  return name


def to_official_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The state dict of the official class from that of Sam2Model or Sam2VideoModel.

  What the official class has no name for keeps its own; so does the second copy of the Fourier
  matrix where it differs from the first, which no official checkpoint can say.
  """
  state = {}
  for name, x in tensors.items():
    if name == _POINTS:
      for i, row in enumerate(x):
        state[f"sam_prompt_encoder.point_embeddings.{i}.weight"] = row[None]
    elif name == _MATRIX_AGAIN and np.array_equal(x, tensors.get(_MATRIX, x)):
      state[official_name(_MATRIX)] = x
    else:
      state[official_name(name)] = x
  return state
