"""The official SAM 2 (sam2 1.1.0, PyTorch) of any size, with weights that show mistakes.

Shared by the parity tests: build the official model for a config of ours, draw its weights, and
hand the same weights over as our parameters.
"""

import numpy as np
import pytest

from rfmedsam2_jax.nn.adapters import AdapterConfig
from rfmedsam2_jax.nn.sam2 import SAM2Config
from rfmedsam2_jax.weights.names import from_official

torch = pytest.importorskip("torch")
pytest.importorskip("sam2")

# The official classes fix the decoder's depth, heads and hidden widths; the rest can be small.
TINY = SAM2Config(
  image_size=128,
  embed_dim=16,
  trunk_heads=1,
  stages=(1, 1, 2, 1),
  global_att_blocks=(3,),
  window_spec=(8, 4, 6, 4),
  window_pos_embed_bkg_spatial_size=(7, 7),
  d_model=64,
  mem_dim=16,
  memory_layers=2,
  memory_ffn=96,
  adapters=AdapterConfig(dwconv=False, cnn=False),
)


def official(config, seed=0, presence_bias=3.0, video=False, **options):
  """The official model of a config, in eval mode, on the CPU, weights drawn.

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
  model = (SAM2VideoPredictor if video else SAM2Base)(**(arguments | options))
  draw_weights(model, seed, presence_bias)
  return model.eval()


def draw_weights(model, seed=0, presence_bias=3.0):
  """Draws every tensor of a SAM2Base anew.

  As initialised, position embeddings are zero and layer scales 1e-6, which hides mistakes; scaled
  up as they are, the network is chaotic. These deviations keep signals at order one.
  """
  generator = torch.Generator().manual_seed(seed)
  for module in model.modules():
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, tensor in tensors:
      if name == "weight" and isinstance(module, torch.nn.ConvTranspose2d):
        mean, deviation = 0.0, 0.6 / tensor.shape[0] ** 0.5
      elif name == "weight" and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
        mean, deviation = 0.0, 0.6 / tensor[0].numel() ** 0.5
      elif name == "weight" and tensor.ndim == 1:
        mean, deviation = 1.0, 0.2
      elif name == "bias":
        mean, deviation = 0.0, 0.1
      else:
        mean, deviation = 0.0, 0.5
      tensor.data.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))
  model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(presence_bias)


def params_of(model, config):
  """The weights of an official model as our parameters, without adapters."""
  return from_official({k: v.numpy() for k, v in model.state_dict().items()}, config)


def nchw(x):
  """[N, H, W, C] array to a torch tensor [N, C, H, W]."""
  return torch.from_numpy(np.array(x, np.float32)).permute(0, 3, 1, 2)


def relative_error(ours, theirs):
  """Largest difference over the largest value of the reference; shapes must agree."""
  theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
  ours = np.asarray(ours)
  assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
