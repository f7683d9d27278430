"""The official SAM 2 (sam2 1.1.0, PyTorch) of any size, and as a witness for convert.verify."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rfmedsam2_jax.nn.sam2 import SAM2Config

Named = dict[str, np.ndarray]


def build(config: SAM2Config, video: bool = False, **options: Any) -> Any:
  """The official model of a config, in eval mode, on the CPU, with weights as its class draws them.

  The official classes fix the decoder's depth, heads and hidden widths; a config of other ones has
  no official model.

  Args:
    video: build SAM2VideoPredictor instead of SAM2Base, with the overrides of
      `build_sam2_video_predictor`.
    options: further arguments of the class.
  """
  from sam2.modeling.backbones.hieradet import Hiera
  from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
  from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
  from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
  from sam2.modeling.position_encoding import PositionEmbeddingSine
  from sam2.modeling.sam.transformer import RoPEAttention
  from sam2.modeling.sam2_base import SAM2Base
  from sam2.sam2_video_predictor import SAM2VideoPredictor

  c = config
  grid = c.image_size // 16
  rope = dict(rope_theta=10000.0, feat_sizes=(grid, grid), embedding_dim=c.d_model, num_heads=1,
              downsample_rate=1, dropout=0.1)
  layer = MemoryAttentionLayer(
    activation="relu", dim_feedforward=c.memory_ffn, dropout=0.1, d_model=c.d_model,
    self_attention=RoPEAttention(**rope),
    cross_attention=RoPEAttention(**rope, rope_k_repeat=True, kv_in_dim=c.mem_dim),
    pos_enc_at_attn=False, pos_enc_at_cross_attn_keys=True, pos_enc_at_cross_attn_queries=False,
  )
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
  memory_encoder = MemoryEncoder(
    out_dim=c.mem_dim, in_dim=c.d_model, position_encoding=PositionEmbeddingSine(c.mem_dim),
    mask_downsampler=MaskDownSampler(c.d_model, kernel_size=3, stride=2, padding=1),
    fuser=Fuser(CXBlock(c.d_model), num_layers=c.fuser_layers),
  )
  arguments = dict(
    image_encoder=ImageEncoder(trunk, neck, scalp=1),
    memory_attention=MemoryAttention(c.d_model, True, layer, c.memory_layers),
    memory_encoder=memory_encoder,
    image_size=c.image_size, num_maskmem=c.num_maskmem,
    sigmoid_scale_for_mem_enc=20.0, sigmoid_bias_for_mem_enc=-10.0,
    use_mask_input_as_output_without_sam=True, directly_add_no_mem_embed=True,
    no_obj_embed_spatial=c.absent_embedding, use_high_res_features_in_sam=True,
    multimask_output_in_sam=True, iou_prediction_use_sigmoid=True, use_obj_ptrs_in_encoder=True,
    add_tpos_enc_to_obj_ptrs=c.pointer_positions, proj_tpos_enc_in_obj_ptrs=c.pointer_positions,
    use_signed_tpos_enc_to_obj_ptrs=c.pointer_positions,
    only_obj_ptrs_in_the_past_for_eval=True, pred_obj_scores=True, pred_obj_scores_mlp=True,
    fixed_no_obj_ptr=True, multimask_output_for_tracking=True,
    use_multimask_token_for_obj_ptr=True, multimask_min_pt_num=0, multimask_max_pt_num=1,
    use_mlp_for_obj_ptr_proj=True,
  )
  if video:
    arguments |= dict(
      binarize_mask_from_pts_for_mem_enc=True,
      sam_mask_decoder_extra_args=dict(
        dynamic_multimask_via_stability=True,
        dynamic_multimask_stability_delta=0.05,
        dynamic_multimask_stability_thresh=0.98,
      ),
    )
  return (SAM2VideoPredictor if video else SAM2Base)(**(arguments | options)).eval()


def nchw(x: np.ndarray) -> Any:
  """[N, H, W, C] array to a torch tensor [N, C, H, W]."""
  import torch

  return torch.from_numpy(np.array(x, np.float32)).permute(0, 3, 1, 2)


def flat(x: np.ndarray) -> Any:
  """[N, H, W, C] array to a torch tensor [HW, N, C], the order of memory attention."""
  return nchw(x).flatten(2).permute(2, 0, 1)


def nhwc(x: Any) -> np.ndarray:
  """The inverse of `nchw`."""
  return x.permute(0, 2, 3, 1).numpy()


class Official:
  """Answers of sam2.modeling; the methods are those that convert.verify asks every witness."""

  name = "sam2 (PyTorch)"

  def __init__(self, config: SAM2Config, state: Mapping[str, np.ndarray]):
    import torch

    self.model = build(config)
    self.model.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    self.grid = config.grid

  def image(self, images: np.ndarray) -> Named:
    levels = self.model.forward_image(nchw(images))["backbone_fpn"]
    return dict(zip(("stride 4", "stride 8", "embedding"), map(nhwc, levels), strict=True))

  def prompts(self, points: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> Named:
    tokens, dense = self._prompts(points, labels, mask)
    return {"tokens": tokens.numpy(), "dense": nhwc(dense)}

  def _prompts(self, points: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> Any:
    import torch

    return self.model.sam_prompt_encoder(
      points=(torch.tensor(points), torch.tensor(labels)), boxes=None, masks=nchw(mask[..., None])
    )

  def decode(
    self, embedding: np.ndarray, high_res: list[np.ndarray], points: np.ndarray,
    labels: np.ndarray, mask: np.ndarray, multimask: bool,
  ) -> Named:
    tokens, dense = self._prompts(points, labels, mask)
    masks, ious, chosen, presence = self.model.sam_mask_decoder(
      image_embeddings=nchw(embedding), image_pe=self.model.sam_prompt_encoder.get_dense_pe(),
      sparse_prompt_embeddings=tokens, dense_prompt_embeddings=dense, multimask_output=multimask,
      repeat_image=False, high_res_features=[nchw(x) for x in high_res],
    )
    chosen = chosen[:, ious.argmax(-1)[0] if multimask else 0]
    pointer = self.model.obj_ptr_proj(chosen)
    return {"masks": masks.numpy(), "ious": ious.numpy(), "presence": presence[:, 0].numpy(),
            "pointer": pointer.numpy()}

  def remember(self, embedding: np.ndarray, logits: np.ndarray, present: np.ndarray) -> Named:
    import torch

    maps, _ = self.model._encode_new_memory(
      current_vision_feats=[flat(embedding)], feat_sizes=[(self.grid, self.grid)],
      pred_masks_high_res=nchw(logits[..., None]),
      object_score_logits=torch.tensor(np.where(present, 1.0, -1.0))[:, None].float(),
      is_mask_from_pts=False,
    )
    return {"memory": nhwc(maps)}

  def condition(
    self, embedding: np.ndarray, maps: np.ndarray, pointers: np.ndarray
  ) -> Named:
    """On slice 2 of 3, with slice 0 conditioning and slice 1 tracked."""
    import torch

    positions = self.model.image_encoder.neck.position_encoding(nchw(embedding))
    memory_positions = self.model.memory_encoder.position_encoding(nchw(maps[:, 0]))
    frames = [
      dict(maskmem_features=nchw(maps[:, i]), maskmem_pos_enc=[memory_positions],
           obj_ptr=torch.tensor(pointers[:, i]))
      for i in range(2)
    ]
    y = self.model._prepare_memory_conditioned_features(
      2, False, [flat(embedding)], [positions.flatten(2).permute(2, 0, 1)],
      [(self.grid, self.grid)],
      dict(cond_frame_outputs={0: frames[0]}, non_cond_frame_outputs={1: frames[1]}), 3,
    )
    return {"conditioned": nhwc(y)}
