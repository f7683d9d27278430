"""The official SAM 2 (sam2 1.1.0, PyTorch) of any size, and as a witness for convert.verify."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rfmedsam2_jax.nn.sam2 import SAM2Config

from .witness import Named, Prompted, Witness, flat, flat_tensor, nchw, nhwc

# What all official configurations have in common, as their YAML files say it.
_ALWAYS: dict[str, Any] = dict(
  sigmoid_scale_for_mem_enc=20.0, sigmoid_bias_for_mem_enc=-10.0, multimask_min_pt_num=0,
  multimask_max_pt_num=1,
) | dict.fromkeys((
  "use_mask_input_as_output_without_sam", "directly_add_no_mem_embed",
  "use_high_res_features_in_sam", "multimask_output_in_sam", "iou_prediction_use_sigmoid",
  "use_obj_ptrs_in_encoder", "only_obj_ptrs_in_the_past_for_eval", "pred_obj_scores",
  "pred_obj_scores_mlp", "fixed_no_obj_ptr", "multimask_output_for_tracking",
  "use_multimask_token_for_obj_ptr", "use_mlp_for_obj_ptr_proj",
), True)
# What `build_sam2_video_predictor` adds.
_VIDEO: dict[str, Any] = dict(
  binarize_mask_from_pts_for_mem_enc=True,
  sam_mask_decoder_extra_args=dict(
    dynamic_multimask_via_stability=True, dynamic_multimask_stability_delta=0.05,
    dynamic_multimask_stability_thresh=0.98,
  ),
)


def build(config: SAM2Config, video: bool = False, kind: Any = None, **options: Any) -> Any:
  """The official model of a config, in eval mode, on the CPU, with weights as its class draws them.

  The official classes fix the decoder's depth, heads and hidden widths; a config of other ones has
  no official model.

  Args:
    video: build SAM2VideoPredictor instead of SAM2Base, with the overrides of
      `build_sam2_video_predictor`.
    kind: a class of one's own that derives from SAM2Base, instead of it.
    options: further arguments of the class.
  """
  from sam2.modeling.sam2_base import SAM2Base
  from sam2.sam2_video_predictor import SAM2VideoPredictor

  c, kind = config, kind or (SAM2VideoPredictor if video else SAM2Base)
  arguments = dict(
    image_encoder=_image_encoder(c), memory_attention=_memory_attention(c),
    memory_encoder=_memory_encoder(c), image_size=c.image_size, num_maskmem=c.num_maskmem,
    no_obj_embed_spatial=c.absent_embedding, add_tpos_enc_to_obj_ptrs=c.pointer_positions,
    proj_tpos_enc_in_obj_ptrs=c.pointer_positions,
    use_signed_tpos_enc_to_obj_ptrs=c.pointer_positions,
  )
  return kind(**(arguments | _ALWAYS | (_VIDEO if video else {}) | options)).eval()


def _image_encoder(c: SAM2Config) -> Any:
  from sam2.modeling.backbones.hieradet import Hiera
  from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
  from sam2.modeling.position_encoding import PositionEmbeddingSine

  trunk = Hiera(
    embed_dim=c.embed_dim, num_heads=c.trunk_heads, stages=c.stages, window_spec=c.window_spec,
    global_att_blocks=c.global_att_blocks,
    window_pos_embed_bkg_spatial_size=c.window_pos_embed_bkg_spatial_size,
  )
  neck = FpnNeck(
    position_encoding=PositionEmbeddingSine(c.d_model), d_model=c.d_model,
    backbone_channel_list=trunk.channel_list, fpn_top_down_levels=[2, 3],
    fpn_interp_model="nearest",
  )
  return ImageEncoder(trunk, neck, scalp=1)


def _memory_attention(c: SAM2Config) -> Any:
  from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
  from sam2.modeling.sam.transformer import RoPEAttention

  grid = c.image_size // 16
  rope = dict(rope_theta=10000.0, feat_sizes=(grid, grid), embedding_dim=c.d_model, num_heads=1,
              downsample_rate=1, dropout=0.1)
  layer = MemoryAttentionLayer(
    activation="relu", dim_feedforward=c.memory_ffn, dropout=0.1, d_model=c.d_model,
    self_attention=RoPEAttention(**rope),
    cross_attention=RoPEAttention(**rope, rope_k_repeat=True, kv_in_dim=c.mem_dim),
    pos_enc_at_attn=False, pos_enc_at_cross_attn_keys=True, pos_enc_at_cross_attn_queries=False,
  )
  return MemoryAttention(c.d_model, True, layer, c.memory_layers)


def _memory_encoder(c: SAM2Config) -> Any:
  from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
  from sam2.modeling.position_encoding import PositionEmbeddingSine

  return MemoryEncoder(
    out_dim=c.mem_dim, in_dim=c.d_model, position_encoding=PositionEmbeddingSine(c.mem_dim),
    mask_downsampler=MaskDownSampler(c.d_model, kernel_size=3, stride=2, padding=1),
    fuser=Fuser(CXBlock(c.d_model), num_layers=c.fuser_layers),
  )


class Official(Witness):
  """Answers of sam2.modeling."""

  name = "sam2 (PyTorch)"

  def __init__(self, config: SAM2Config, state: Mapping[str, np.ndarray]):
    import torch

    self.model = build(config)
    self.model.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    self.pointer = self.model.obj_ptr_proj
    self._sizes = [(config.grid, config.grid)]

  def _levels(self, images: np.ndarray) -> list[np.ndarray]:
    return [nhwc(x) for x in self.model.forward_image(nchw(images))["backbone_fpn"]]

  def _prompts(self, prompted: Prompted) -> Any:
    import torch

    points, labels, mask = prompted
    return self.model.sam_prompt_encoder(
      points=(torch.tensor(points), torch.tensor(labels)), boxes=None, masks=nchw(mask[..., None])
    )

  def _decode(self, high_res: list[Any], **inputs: Any) -> tuple[Any, Any, Any, Any]:
    return self.model.sam_mask_decoder(
      image_pe=self.model.sam_prompt_encoder.get_dense_pe(), repeat_image=False,
      high_res_features=high_res, **inputs,
    )

  def remember(self, embedding: np.ndarray, logits: np.ndarray, present: np.ndarray) -> Named:
    import torch

    maps, _ = self.model._encode_new_memory(
      current_vision_feats=[flat(embedding)], feat_sizes=self._sizes,
      pred_masks_high_res=nchw(logits[..., None]),
      object_score_logits=torch.tensor(np.where(present, 1.0, -1.0))[:, None].float(),
      is_mask_from_pts=False,
    )
    return {"memory": nhwc(maps)}

  def condition(self, embedding: np.ndarray, maps: np.ndarray, pointers: np.ndarray) -> Named:
    import torch

    positions = self.model.image_encoder.neck.position_encoding(nchw(embedding))
    memory_positions = self.model.memory_encoder.position_encoding(nchw(maps[:, 0]))
    first, second = (
      dict(maskmem_features=nchw(maps[:, i]), maskmem_pos_enc=[memory_positions],
           obj_ptr=torch.tensor(pointers[:, i]))
      for i in range(2)
    )
    y = self.model._prepare_memory_conditioned_features(
      2, False, [flat(embedding)], [flat_tensor(positions)], self._sizes,
      dict(cond_frame_outputs={0: first}, non_cond_frame_outputs={1: second}), 3,
    )
    return {"conditioned": nhwc(y)}
