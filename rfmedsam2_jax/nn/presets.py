"""The sizes of SAM 2 by name: the eight official ones, and `nano`, which trains on a CPU."""

import dataclasses

from rfmedsam2_jax.nn.sam2 import SAM2Config

_TINY = SAM2Config(
  embed_dim=96, stages=(1, 2, 7, 2), global_att_blocks=(5, 7, 9),
  window_pos_embed_bkg_spatial_size=(7, 7),
)
_SIZES = {
  "tiny": _TINY,
  "small": dataclasses.replace(_TINY, stages=(1, 2, 11, 2), global_att_blocks=(7, 10, 13)),
  "base_plus": SAM2Config(),
  "large": SAM2Config(
    embed_dim=144, stages=(2, 6, 36, 4), global_att_blocks=(23, 33, 43),
    window_pos_embed_bkg_spatial_size=(7, 7), window_spec=(8, 4, 16, 8),
  ),
}
# No published weights have this size: it is trained from scratch, with everything trainable.
_NANO = SAM2Config(
  image_size=192, embed_dim=24, stages=(1, 1, 2, 1), global_att_blocks=(3,),
  window_spec=(8, 4, 6, 6), window_pos_embed_bkg_spatial_size=(6, 6), d_model=64, mem_dim=16,
  memory_layers=1, memory_ffn=128, memory_mask_channels=(4, 8, 16, 32), fuser_layers=1,
  decoder_heads=4, iou_hidden=64,
)

PRESETS: dict[str, SAM2Config] = {
  **{f"sam2.1_hiera_{name}": size for name, size in _SIZES.items()},
  **{
    f"sam2_hiera_{name}": dataclasses.replace(size, absent_embedding=False)
    for name, size in _SIZES.items()
  },
  "nano": _NANO,
}
