"""A training step of the refiner, written with the modules of the official SAM 2 (sam2 1.1.0).

The official training code (its top-level `training`) trains another task: a video with clicks,
slice after slice, as our tracker is (tests/test_tracker_training.py compares the two). So the
refiner's stages are put together here from the official modules as they are. Every cell gets just
the memories that it has: cells with equally many go through memory attention together, nothing is
padded. benchmarks/training_step.py compares it with ours.
"""

import contextlib
import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sam2.modeling.sam2_utils import get_1d_sine_pe

from convert.official import build
from rfmedsam2_jax.base.constants import IMAGE_MEAN, IMAGE_STD, LOGIT_LIMIT
from rfmedsam2_jax.config.training import OptimizerConfig
from rfmedsam2_jax.nn import SAM2Config
from rfmedsam2_jax.nn.losses import RefinerLossConfig
from rfmedsam2_jax.nn.memory_bank import CONDITIONING_ROW
from rfmedsam2_jax.refinement import RefinementConfig, StageConfig

Tensor = torch.Tensor


class OfficialTraining:
  """One run of L slices with T tracks; cells are ordered by track, then slice.

  Args:
    state: official names and weights. trained: prefixes of names; "" is all of them.
    batch: as data.pipeline.refiner_batches makes it, of one run; every structure is on every slice.
  """

  def __init__(
    self,
    config: SAM2Config,
    state: dict[str, np.ndarray],
    trained: tuple[str, ...],
    batch: dict[str, np.ndarray],
    refinement: RefinementConfig,
    loss: RefinerLossConfig,
    optimizer: OptimizerConfig,
    device: torch.device,
  ):
    # eval: the only thing that it switches off here is dropout, which ours does not have.
    self.model = build(config)
    self.model.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})
    self.model.to(device)
    for name, parameter in self.model.named_parameters():
      parameter.requires_grad_(name.startswith(trained))
    self.trained = [p for p in self.model.parameters() if p.requires_grad]
    self.config, self.refinement, self.loss_config = config, refinement, loss
    self.device, self.half = device, config.dtype == "bfloat16"
    self.clip_norm = optimizer.clip_norm
    matrices = [p for p in self.trained if p.ndim > 1]
    others = [p for p in self.trained if p.ndim <= 1]
    self.optimizer = torch.optim.AdamW(
      [
        {"params": matrices, "weight_decay": optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
      ],
      lr=optimizer.learning_rate,
      fused=device.type == "cuda",
    )
    _, self.tracks, self.length, *size = batch["logits"].shape
    images = (batch["images"][0] - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
    self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    self.logits = torch.from_numpy(batch["logits"]).reshape(-1, 1, *size).to(device)
    self.target = torch.from_numpy(batch["masks"]).reshape(-1, *size).to(device)
    self.depth = int(batch["depth"][0])

  def step(self) -> tuple[Tensor, Tensor]:
    """Loss and norm of the gradient, before it is clipped."""
    self.optimizer.zero_grad(set_to_none=True)
    loss = self.loss()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
    self.optimizer.step()
    return loss.detach(), norm

  def loss(self) -> Tensor:
    half: Any = contextlib.nullcontext()
    if self.half:
      half = torch.autocast(self.device.type, torch.bfloat16)
    with half:
      outputs = self.stages()
    return sum(
      stage.loss_weight * self.stage_loss(*output)
      for stage, output in zip(self.refinement.stages, outputs, strict=True)
    )

  def stages(self) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Mask logits [N, 1, 4G, 4G], IoU and presence [N, 1] of every stage."""
    model, side, grid = self.model, self.config.image_size, self.config.grid
    encoded = model.forward_image(self.images)
    _, features, positions, _ = model._prepare_backbone_features(encoded)
    own = torch.arange(self.length, device=self.device).repeat(self.tracks)
    high_res = [x[own] for x in encoded["backbone_fpn"][:2]]
    embedding, position = features[-1][:, own], positions[-1][:, own]
    logits, presence = self.logits, torch.ones(len(own), 1, device=self.device)
    pointers = None
    outputs = []
    for stage in self.refinement.stages:
      masks = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
      maps, map_positions = model._encode_new_memory(
        [embedding], [(grid, grid)], masks, presence, is_mask_from_pts=False
      )
      conditioned = self.condition(
        stage, embedding, position, maps, map_positions[-1], pointers if stage.pointers else None,
        self.anchors(logits, presence),
      )
      boxes = boxes_of(logits[:, 0] > 0, side, self.refinement.box_margin)
      labels = torch.tensor([[2, 3]], device=self.device).expand(len(own), 2)
      points = dict(point_coords=boxes.reshape(-1, 2, 2), point_labels=labels)
      decoded, _, ious, _, _, pointers, presence = model._forward_sam_heads(
        conditioned, points, logits, high_res, multimask_output=False
      )
      outputs.append((decoded, ious, presence))
      # As in ours masks and boxes carry no gradient to the next stage, pointers do.
      logits, presence = decoded.detach().float(), presence.detach().float()
      logits = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    return outputs

  def anchors(self, logits: Tensor, presence: Tensor) -> list[int]:
    """The slice of each track that is most surely segmented, see refinement.anchor_score."""
    inside = logits > 0
    mean = (logits.sigmoid() * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp(min=1)
    score = presence[:, 0].sigmoid() * mean
    return score.reshape(self.tracks, self.length).argmax(1).tolist()

  def memories(self, stage: StageConfig, anchors: list[int]) -> list[list[tuple[int, int, int]]]:
    """For every cell (cell remembered, row of the temporal table, own slice less remembered)."""
    found = []
    for track, own in itertools.product(range(self.tracks), range(self.length)):
      near = range(max(own - stage.reach, 0), min(own + stage.reach + 1, self.length))
      anchor = [anchors[track]] if stage.anchors else []
      slots = [(z, abs(own - z) - 1) for z in near if z not in (own, *anchor)]
      slots += [(z, CONDITIONING_ROW) for z in anchor if z != own]
      found.append([(track * self.length + z, row, own - z) for z, row in slots])
    return found

  def condition(
    self,
    stage: StageConfig,
    embedding: Tensor,
    position: Tensor,
    maps: Tensor,
    map_positions: Tensor,
    pointers: Tensor | None,
    anchors: list[int],
  ) -> Tensor:
    """[N, C, G, G] after memory attention.

    Args:
      embedding, position: [GG, N, C]. maps, map_positions: [N, E, G, G]. pointers: [N, C].
    """
    model, grid, dim = self.model, self.config.grid, self.config.mem_dim
    found = self.memories(stage, anchors)
    parts, order = [], []
    for count in sorted({len(slots) for slots in found}):
      cells = [cell for cell, slots in enumerate(found) if len(slots) == count]
      order += cells
      table = torch.tensor([found[cell] for cell in cells], device=self.device)  # [n, M, 3]
      where, row, offset = table.unbind(-1)

      def tokens(x: Tensor, where: Tensor = where) -> Tensor:
        """[N, E, G, G] to [M GG, n, E]."""
        return x.flatten(2)[where].permute(1, 3, 0, 2).flatten(0, 1)

      temporal = model.maskmem_tpos_enc[row][:, :, 0, 0].permute(1, 0, 2)
      memory = [tokens(maps)]
      memory_position = [tokens(map_positions) + temporal.repeat_interleave(grid * grid, 0)]
      pointer_tokens = 0
      if pointers is not None:
        split = pointers.shape[1] // dim  # a pointer is as wide as this many tokens
        tokens_MnsE = pointers[where].reshape(*where.shape, split, dim).permute(1, 2, 0, 3)
        memory.append(tokens_MnsE.flatten(0, 1))
        span = max(min(self.depth, model.max_obj_ptrs_in_encoder) - 1, 1)
        sine = get_1d_sine_pe(offset / span, dim=self.config.d_model)
        distance = model.obj_ptr_tpos_proj(sine).permute(1, 0, 2)
        memory_position.append(distance.repeat_interleave(split, 0))
        pointer_tokens = count * split
      parts.append(
        model.memory_attention(
          curr=[embedding[:, cells]], curr_pos=[position[:, cells]], memory=torch.cat(memory),
          memory_pos=torch.cat(memory_position), num_obj_ptr_tokens=pointer_tokens,
        )
      )
    conditioned = torch.cat(parts, 1)[:, np.argsort(order)]
    return conditioned.permute(1, 2, 0).unflatten(2, (grid, grid))

  def stage_loss(self, logits: Tensor, ious: Tensor, presence: Tensor) -> Tensor:
    """losses.refiner_loss where every structure is on every slice and every voxel is known."""
    c, target = self.loss_config, self.target
    logits, ious, presence = logits[:, 0].float(), ious[:, 0].float(), presence[:, 0].float()
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    balance = c.focal_alpha * target + (1 - c.focal_alpha) * (1 - target)
    focal = (entropy * (target - p).square() ** (c.focal_gamma / 2) * balance).mean()
    total = p.sum((1, 2)) + target.sum((1, 2))
    overlap = total - (p - target).abs().sum((1, 2))
    dice = (1 - (overlap + 1) / (total + 1)).mean()
    ours, theirs = logits.detach() > 0, target > 0.5
    true = (ours & theirs).sum((1, 2)) / (ours | theirs).sum((1, 2)).clamp(min=1)
    error = F.l1_loss(ious, true)
    seen = F.binary_cross_entropy_with_logits(presence, torch.ones_like(presence))
    return c.focal * focal + c.dice * dice + c.iou * error + c.presence * seen


def boxes_of(masks: Tensor, side: int, margin: float) -> Tensor:
  """[N, 4] in pixels of the image, of masks [N, m, m] that are not empty; see scaled_boxes."""
  size = masks.shape[-1]
  edges = []
  for along in (masks.any(1), masks.any(2)):
    first, last = along.int().argmax(1), size - 1 - along.flip(1).int().argmax(1)
    edges.append((first * side / size - margin, (last + 1) * side / size - 1 + margin))
  (x0, x1), (y0, y1) = edges
  return torch.stack([x0, y0, x1, y1], 1).clamp(0, side - 1)
