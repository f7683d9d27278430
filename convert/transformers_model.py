"""transformers' SAM 2 of any size, as a witness for convert.verify.

Where names come from Hugging Face it is the better witness than sam2: it gets the file's tensors by
their own names, so that a mistake in convert.huggingface would show.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.nn.sam2 import SAM2Config

from .witness import Named, Prompted, Witness, flat, flat_tensor, nchw, nhwc


def transformers_config(config: SAM2Config) -> Any:
  """The Sam2VideoConfig of our config; its parts also make a Sam2Config.

  Raises:
    UserError: `transformers` fixes a size that the config has otherwise.
  """
  from transformers import (
    Sam2HieraDetConfig,
    Sam2VideoConfig,
    Sam2VideoMaskDecoderConfig,
    Sam2VideoPromptEncoderConfig,
    Sam2VisionConfig,
  )

  c, side, grid = config, config.image_size, config.grid
  if c.mem_dim != 64:
    raise UserError(f"verify: transformers has memories of 64 channels only, not {c.mem_dim}")
  widths = [c.embed_dim * 2**stage for stage in range(4)]
  trunk = Sam2HieraDetConfig(
    hidden_size=c.embed_dim, num_attention_heads=c.trunk_heads, image_size=[side, side],
    blocks_per_stage=list(c.stages), embed_dim_per_stage=widths,
    num_attention_heads_per_stage=[c.trunk_heads * 2**stage for stage in range(4)],
    window_size_per_stage=list(c.window_spec), global_attention_blocks=list(c.global_att_blocks),
    window_positional_embedding_background_size=list(c.window_pos_embed_bkg_spatial_size),
  )
  vision = Sam2VisionConfig(
    backbone_config=trunk, backbone_channel_list=widths[::-1], fpn_hidden_size=c.d_model,
    backbone_feature_sizes=[[grid * scale] * 2 for scale in (4, 2, 1)],
  )
  return Sam2VideoConfig(
    vision_config=vision,
    prompt_encoder_config=Sam2VideoPromptEncoderConfig(
      hidden_size=c.d_model, image_size=side, mask_input_channels=c.prompt_mask_channels
    ),
    mask_decoder_config=Sam2VideoMaskDecoderConfig(
      hidden_size=c.d_model, mlp_dim=c.decoder_mlp, num_hidden_layers=c.decoder_depth,
      num_attention_heads=c.decoder_heads, iou_head_hidden_dim=c.iou_hidden,
      dynamic_multimask_via_stability=False,
    ),
    image_size=side, num_maskmem=c.num_maskmem,
    enable_occlusion_spatial_embedding=c.absent_embedding,
    enable_temporal_pos_encoding_for_object_pointers=c.pointer_positions,
    memory_attention_hidden_size=c.d_model, memory_attention_num_layers=c.memory_layers,
    memory_attention_feed_forward_hidden_size=c.memory_ffn,
    memory_attention_rope_feat_sizes=[grid, grid],
    memory_encoder_hidden_size=c.d_model, memory_encoder_output_channels=c.mem_dim,
    mask_downsampler_embed_dim=c.d_model, memory_fuser_num_layers=c.fuser_layers,
    memory_fuser_embed_dim=c.d_model, memory_fuser_intermediate_dim=4 * c.d_model,
  )


class Transformers(Witness):
  """Answers of Sam2VideoModel, whose image half is Sam2Model."""

  name = "transformers (PyTorch)"

  def __init__(self, config: SAM2Config, tensors: Mapping[str, np.ndarray]):
    """`tensors` by the names of transformers; the memory's may be missing."""
    import torch
    from transformers import Sam2VideoModel

    self.model = Sam2VideoModel(transformers_config(config)).eval()
    state = {name: torch.tensor(x) for name, x in tensors.items()}
    self.model.load_state_dict(state, strict=False)
    self.pointer = self.model.object_pointer_proj

  def _levels(self, images: np.ndarray) -> list[np.ndarray]:
    outputs = self.model.get_image_features(nchw(images), return_dict=True).fpn_hidden_states
    return [_nhwc_of_flat(x) for x in outputs]

  def _prompts(self, prompted: Prompted) -> Any:
    import torch

    points, labels, mask = prompted
    return self.model.prompt_encoder(
      torch.tensor(points)[:, None], torch.tensor(labels)[:, None], None, nchw(mask[..., None])
    )

  def _decode(self, high_res: list[Any], **inputs: Any) -> tuple[Any, Any, Any, Any]:
    masks, ious, tokens, presence = self.model.mask_decoder(
      image_positional_embeddings=self.model.get_image_wide_positional_embeddings(),
      high_resolution_features=high_res, **inputs,
    )
    return masks[:, 0], ious[:, 0], tokens[:, 0], presence[:, 0]

  def remember(self, embedding: np.ndarray, logits: np.ndarray, present: np.ndarray) -> Named:
    import torch

    # Not _encode_new_memory, which rounds to bfloat16.
    maps, _ = self.model.memory_encoder(
      nchw(embedding), 20 * torch.sigmoid(nchw(logits[..., None])) - 10
    )
    absent = self.model.occlusion_spatial_embedding_parameter
    if absent is not None:
      maps = maps + torch.tensor(~present)[:, None, None, None] * absent[..., None, None]
    return {"memory": nhwc(maps)}

  def condition(self, embedding: np.ndarray, maps: np.ndarray, pointers: np.ndarray) -> Named:
    import torch

    cpu, dtype = torch.device("cpu"), torch.float32
    positions = self.model.vision_encoder.neck.position_encoding
    memory_positions = self.model.memory_encoder.position_encoding(
      nchw(maps[:, 0]).shape, "cpu", dtype
    )
    frames = [
      dict(maskmem_features=flat(maps[:, i]), maskmem_pos_enc=flat_tensor(memory_positions))
      for i in range(2)
    ]
    memory, where = self.model._build_memory_attention_inputs(list(enumerate(frames)), cpu)
    tokens, token_positions = self.model._process_object_pointers(
      [2, 1], [torch.tensor(pointers[:, i]) for i in range(2)], 3, 1, embedding.shape[-1], cpu
    )
    y = self.model.memory_attention(
      current_vision_features=flat(embedding),
      current_vision_position_embeddings=flat_tensor(
        positions(nchw(embedding).shape, "cpu", dtype)),
      memory=torch.cat([*memory, tokens]),
      memory_posision_embeddings=torch.cat([*where, token_positions]),
      num_object_pointer_tokens=len(tokens),
    )
    return {"conditioned": y.reshape(embedding.shape).numpy()}


def _nhwc_of_flat(x: Any) -> np.ndarray:
  """[HW, N, C] tensor of a square grid to a [N, H, W, C] array."""
  side = round(x.shape[0] ** 0.5)
  return x.permute(1, 0, 2).reshape(x.shape[1], side, side, -1).numpy()
