"""SAM 2 with adapters, put together: the four functions that tracking and refinement are made of.

    images -> encode_image -> ImageFeatures
    features, a slice's mask -> remember -> memory map
    features, memory slots -> condition -> features that know their neighbours
    features, prompts -> decode -> Decoded

Submodules and parameters have the names of sam2 1.1.0 (sam2_base.SAM2Base), as weights.names needs
them. B counts slices, N counts cells, that is (object, slice) pairs; S is the image's side, G =
S / 16, C = d_model.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rfmedsam2_jax.base.ranges import STRICT, Count, Precision, Whole, fixed
from rfmedsam2_jax.nn.adapters import AdapterConfig
from rfmedsam2_jax.nn.convolutions import Conv2D
from rfmedsam2_jax.nn.fpn import FpnNeck, ImageEncoder
from rfmedsam2_jax.nn.hiera import Hiera
from rfmedsam2_jax.nn.layers import MLP, Array, DType, Params
from rfmedsam2_jax.nn.mask_decoder import Decoded, MaskDecoder
from rfmedsam2_jax.nn.memory_attention import MemoryAttention, MemorySlots
from rfmedsam2_jax.nn.memory_encoder import MemoryEncoder
from rfmedsam2_jax.nn.platform import Platform, default_platform
from rfmedsam2_jax.nn.positions import sine_positions_1d
from rfmedsam2_jax.nn.prompt_encoder import (
  PromptEncoder,
  Prompts,
  box_prompts,
  drawn,
  no_prompts,
  shown_prompts,
)
from rfmedsam2_jax.nn.remat import Remat

# The mask logit of an object that is not there (sam2_base.NO_OBJ_SCORE).
ABSENT_LOGIT = -1024.0
# Parameters that are buffers in PyTorch: no gradient reaches them, give them no optimizer state.
BUFFERS = ("sam_prompt_encoder/pe_layer/positional_encoding_gaussian_matrix",)

# Once fields of a config; checkpoints and config files may hold them.
FIXED = ("trunk_heads", "num_maskmem", "decoder_mlp", "prompt_mask_channels", "pointer_positions")
_DEEPEST = 256  # layers of one kind; the largest official network has 48


@dataclasses.dataclass(frozen=True)
class SAM2Config:
  """Sizes of SAM 2; the defaults are sam2.1_hiera_base_plus. nn.presets has the named ones."""

  __pydantic_config__ = STRICT

  image_size: int = 1024  # side S of the square image, divisible by 32; cost grows with its square

  # The trunk (Hiera).
  embed_dim: Count = 112  # channels of the first stage; doubled at every further stage
  stages: tuple[Count, ...] = (2, 3, 16, 3)  # blocks per stage
  global_att_blocks: tuple[Whole, ...] = (12, 16, 20)  # blocks that attend over the whole slice
  window_spec: tuple[Count, ...] = (8, 4, 14, 7)  # window side per stage, in tokens
  window_pos_embed_bkg_spatial_size: tuple[Count, Count] = (14, 14)  # grid of the learned positions

  d_model: Count = 256  # channels C of the image embedding and of all tokens
  mem_dim: Count = 64  # channels of a memory; divides d_model

  memory_layers: Count = 4  # layers of memory attention
  memory_ffn: Count = 2048  # hidden width of their MLPs, and of the mask decoder's
  memory_mask_channels: tuple[Count, Count, Count, Count] = (4, 16, 64, 256)
  # Of the mask's way down, per halving.
  fuser_layers: Count = 2  # ConvNeXt blocks that fuse mask and features

  decoder_depth: Count = 2  # two-way layers of the mask decoder
  decoder_heads: Count = 8
  iou_hidden: Count = 256  # hidden width of the IoU head

  absent_embedding: bool = True
  # What SAM 2.1 added to 2.0: the memories of slices without the object are marked, and object
  # pointers are told apart by their signed distance.

  drawn_prompts: bool = False
  # Boxes and points are drawn into the mask prompt, too (nn.prompt_encoder.drawn), which is learned
  # many times sooner than tokens are, and the decoder sees that prompt at its finest resolution.
  # Official weights do not know it and lack these layers; who was trained so wants it.

  adapters: AdapterConfig = AdapterConfig()
  dtype: Precision = "float32"  # of the computation; parameters stay float32
  # Training: what is kept of every block for the backward pass. "none": all. "block": its input, at
  # a third more time per step. "dots": also what dense layers give; between the two in both.
  remat: Remat = "none"

  num_maskmem: ClassVar[int] = 7  # rows of the temporal table; the last: conditioning slices
  prompt_mask_channels: ClassVar[int] = 16  # hidden width of the mask prompt's way down
  _read = fixed(*FIXED)

  def __post_init__(self):
    if self.image_size % 32 or not 64 <= self.image_size <= 2**14:
      demand = "divisible by 32" if self.image_size % 32 else f"64 to {2**14}"
      raise ValueError(f"image_size is {self.image_size}; it must be {demand}")
    for name in ("stages", "memory_layers", "fuser_layers", "decoder_depth"):
      layers = sum(self.stages) if name == "stages" else getattr(self, name)
      if layers > _DEEPEST:
        raise ValueError(f"{name} has {layers} layers; at most {_DEEPEST} are possible")
    if len(self.stages) != 4 or len(self.window_spec) != 4:
      raise ValueError("stages and window_spec need four numbers each")
    if self.embed_dim % self.trunk_heads:
      raise ValueError(f"trunk_heads {self.trunk_heads} does not divide embed_dim {self.embed_dim}")
    if self.d_model % (2 * self.decoder_heads) or self.d_model % 4:
      raise ValueError(f"d_model is {self.d_model}; it must be divisible by 4 and by twice "
                       f"decoder_heads ({self.decoder_heads})")
    if self.d_model % self.mem_dim:
      raise ValueError(f"mem_dim {self.mem_dim} does not divide d_model {self.d_model}")

  @property
  def trunk_heads(self) -> int:
    """Attention heads of the trunk's first stage, doubled at every further one."""
    return -(-self.embed_dim // 96)

  @property
  def decoder_mlp(self) -> int:
    return self.memory_ffn

  @property
  def pointer_positions(self) -> bool:
    return self.absent_embedding

  @property
  def grid(self) -> int:
    """Side G of the image embedding."""
    return self.image_size // 16

  @property
  def compute_dtype(self) -> DType:
    return jnp.dtype(self.dtype)


class ImageFeatures(NamedTuple):
  """What the decoder and the memory need of a slice.

  `embedding`: [B, G, G, C], before any memory and without `no_mem_embed`. `high_res`: [B, 4G, 4G,
  C/8] and [B, 2G, 2G, C/4], already projected for the decoder. `pixels`: the image [B, 4G, 4G, 3]
  for a MaskAdapter; None without one.
  """

  embedding: Array
  high_res: tuple[Array, Array]
  pixels: Array | None = None


class SAM2(nn.Module):
  """SAM 2 of a given size, with RFMedSAM 2's adapters; `apply` runs its parts."""

  config: SAM2Config
  platform: Platform | None = None  # what it is traced for; None: the default backend

  def setup(self):
    c, dtype = self.config, self.config.compute_dtype
    told: dict[str, Any] = {"remat": c.remat, "platform": self.platform or default_platform()}
    parts = {"adapters": c.adapters, "dtype": dtype, **told}
    small = nn.initializers.truncated_normal(0.02)
    trunk = Hiera(
      c.embed_dim, c.trunk_heads, c.stages, c.global_att_blocks, c.window_spec,
      c.window_pos_embed_bkg_spatial_size, **parts,
    )
    self.image_encoder = ImageEncoder(trunk, FpnNeck(c.d_model, **parts))
    self.sam_prompt_encoder = PromptEncoder(c.d_model, c.grid, c.prompt_mask_channels, dtype)
    self.sam_mask_decoder = MaskDecoder(
      c.d_model, c.decoder_depth, c.decoder_heads, c.decoder_mlp, c.iou_hidden, **parts,
      drawn=c.drawn_prompts,
    )
    self.memory_attention = MemoryAttention(c.memory_layers, c.memory_ffn, **parts)
    self.memory_encoder = MemoryEncoder(
      c.d_model, c.mem_dim, c.memory_mask_channels, c.fuser_layers, dtype, **told
    )
    self.maskmem_tpos_enc = self.param("maskmem_tpos_enc", small, (c.num_maskmem, c.mem_dim))
    self.no_mem_embed = self.param("no_mem_embed", small, (c.d_model,))
    # Nothing uses it, but checkpoints have it and it must survive the way there and back.
    self.no_mem_pos_enc = self.param("no_mem_pos_enc", small, (c.d_model,))
    self.no_obj_ptr = self.param("no_obj_ptr", small, (c.d_model,))
    self.mask_downsample = Conv2D(1, 4, stride=4, dtype=dtype)
    self.obj_ptr_proj = MLP(c.d_model, c.d_model, 3, dtype=dtype)
    if c.absent_embedding:
      self.no_obj_embed_spatial = self.param("no_obj_embed_spatial", small, (c.mem_dim,))
    if c.pointer_positions:
      self.obj_ptr_tpos_proj = nn.Dense(c.mem_dim, dtype=dtype)

  def encode_image(self, images_BSS3: Array) -> ImageFeatures:
    """Features of slices, float32 and normalised by ImageNet's mean and standard deviation."""
    side = self.config.image_size
    if images_BSS3.shape[1:] != (side, side, 3):
      raise ValueError(f"images are {images_BSS3.shape}; this SAM 2 takes [B, {side}, {side}, 3]")
    stride4, stride8, stride16 = self.image_encoder(images_BSS3)
    high_res = self.sam_mask_decoder.conv_s0(stride4), self.sam_mask_decoder.conv_s1(stride8)
    pixels = self.pixels(images_BSS3) if self.config.adapters.mask else None
    return ImageFeatures(stride16, high_res, pixels)

  def pixels(self, images_BSS3: Array) -> Array:
    """Slices on the mask grid [B, 4G, 4G, 3], as the MaskAdapter sees them."""
    side = images_BSS3.shape[1] // 4
    pixels = images_BSS3.reshape(-1, side, 4, side, 4, 3).mean((2, 4))
    return pixels.astype(self.config.compute_dtype)

  def remember(
    self, embedding_NGGC: Array, mask_logits_Nhh: Array, present_N: Array, binarize: bool = False
  ) -> Array:
    """Memory maps [N, G, G, mem_dim] of cells whose masks are known.

    Args:
      mask_logits_Nhh: logits at any resolution, -1024 where the object is absent; resized to S.
      present_N: bool; a cell without the object is marked as such (SAM 2.1).
      binarize: threshold the resized logits at 0; SAM 2 does so on prompted slices.
    """
    side = self.config.image_size
    logits = mask_logits_Nhh.astype(jnp.float32)
    # Torch's bilinear without antialias, as sam2_base.py:382 does it.
    logits = jax.image.resize(logits, (logits.shape[0], side, side), "linear", antialias=False)
    mask = (logits > 0).astype(jnp.float32) if binarize else nn.sigmoid(logits)
    maps = self.memory_encoder(embedding_NGGC, 20 * mask[..., None] - 10)
    if self.config.absent_embedding:
      absent = self.no_obj_embed_spatial.astype(maps.dtype)
      maps = jnp.where(present_N[:, None, None, None], maps, maps + absent)
    return maps

  def condition(self, embedding_NGGC: Array, slots: MemorySlots) -> Array:
    """Lets cells attend to their memories; a cell with no valid one is `unconditioned`. The
    embedding's leading axis is N, or 1 where all cells lie on one slice."""
    positions = None
    if self.config.pointer_positions and slots.pointers.shape[1]:
      sine = sine_positions_1d(slots.pointer_positions, self.config.d_model)
      positions = self.obj_ptr_tpos_proj(sine)
    known = self.memory_attention(embedding_NGGC, slots, self.maskmem_tpos_enc, positions)
    has_memory = slots.valid.any(axis=1) | slots.pointer_valid.any(axis=1)
    return jnp.where(has_memory[:, None, None, None], known, self.unconditioned(embedding_NGGC))

  def unconditioned(self, embedding_NGGC: Array) -> Array:
    """The embedding as the decoder wants it where there is no memory (conditioning slices)."""
    dtype = self.config.compute_dtype
    return embedding_NGGC.astype(dtype) + self.no_mem_embed.astype(dtype)

  def decode(
    self, embedding_NGGC: Array, high_res: tuple[Array, Array], prompts: Prompts,
    multimask: bool | Array = False, dynamic_multimask: bool = False,
  ) -> Decoded:
    """Masks of cells. Logits are raw: the presence gate is `gate`, apart.

    Args:
      embedding_NGGC: from `condition` or `unconditioned`; `high_res` of the same cells.
      multimask: three masks instead of one; the pointer is that of the highest predicted IoU. As
        bool [N], of every cell: all have three then, equal ones where it is False.
      dynamic_multimask: where the single mask is unstable, take the best of three; the pointer
        stays that of the single mask (mask_decoder.py:150).
    """
    shown = None
    if self.config.drawn_prompts:
      prompts = drawn(prompts, 4 * self.config.grid)
      shown = shown_prompts(prompts)
    tokens, exists, dense = self.sam_prompt_encoder(prompts)
    decoded = self.sam_mask_decoder(
      embedding_NGGC + dense, self.sam_prompt_encoder.grid_positions(), tokens, exists, high_res,
      multimask, dynamic_multimask, shown,
    )
    return decoded._replace(pointer=self.obj_ptr_proj(decoded.pointer))

  def gate(self, decoded: Decoded) -> Decoded:
    """Where the presence logit is not positive: masks of -1024 and the pointer `no_obj_ptr`."""
    present = decoded.presence > 0
    no_pointer = self.no_obj_ptr.astype(decoded.pointer.dtype)
    masks = jnp.where(present[:, None, None, None], decoded.masks, ABSENT_LOGIT)
    pointer = jnp.where(present[:, None], decoded.pointer, no_pointer)
    return decoded._replace(masks=masks, pointer=pointer)

  def correct_masks(self, pixels_Nhh3: Array, nearby_NRhh: Array) -> Array:
    """What the MaskAdapter adds to mask logits of cells, float32 [N, 4G, 4G]: from the pixels of
    their slices, and mask logits of the R = 2 mask_reach + 1 slices around, 0 where there is none.
    """
    return self.sam_mask_decoder.adapter(pixels_Nhh3, nearby_NRhh)

  def mask_prompt(self, masks_NSS: Array) -> Array:
    """A given mask (0 or 1, image resolution) as a mask prompt [N, 4G, 4G] on its own scale, from
    which SAM 2 makes the pointer of a slice with a given mask (sam2_base.py:440)."""
    x = masks_NSS[..., None].astype(self.config.compute_dtype)
    return self.mask_downsample(x)[..., 0].astype(jnp.float32)

  def __call__(self, images_BSS3: Array) -> Decoded:
    """Runs every part once; `init` calls it so that all parameters come to be."""
    c, n = self.config, images_BSS3.shape[0]
    features = self.encode_image(images_BSS3)
    mask = self.mask_prompt(jnp.zeros((n, c.image_size, c.image_size)))
    prompts = box_prompts(jnp.zeros((n, 4)), mask=mask)
    decoded = self.decode(self.unconditioned(features.embedding), features.high_res, prompts)
    if features.pixels is not None:
      nearby = decoded.masks.repeat(2 * c.adapters.mask_reach + 1, axis=1)
      self.correct_masks(features.pixels, nearby)
    gated = self.gate(decoded)
    maps = self.remember(features.embedding, gated.masks[:, 0], decoded.presence > 0)
    row, valid, position = jnp.zeros((n, 1), jnp.int32), jnp.ones((n, 1), bool), jnp.zeros((n, 1))
    slots = MemorySlots(maps[:, None], row, valid, gated.pointer[:, None], position, valid)
    conditioned = self.condition(features.embedding, slots)
    return self.decode(conditioned, features.high_res, no_prompts(n))


def apply(
  model: SAM2 | SAM2Config, params: Params, *inputs: Any, method: str, **options: Any
) -> Any:
  """Runs one part of SAM 2: a pure function that `jax.jit`, `vmap` and `grad` take.

  In bfloat16 on an NVIDIA GPU `vmap` is for `SAM2(config, Platform("gpu"))`, which does without
  cuDNN: JAX (0.10.2) cannot map cuDNN's attention over some of its inputs alone, nor with a mask.

  Args:
    model: a config for the default backend, or a SAM2 that says what it is traced for.
    inputs, options: of the method of `SAM2`: encode_image, remember, condition, unconditioned,
      decode or gate.
  """
  sam2 = model if isinstance(model, SAM2) else SAM2(model)
  return sam2.apply({"params": params}, *inputs, method=method, **options)
