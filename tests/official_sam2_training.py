"""The official training of SAM 2 (top-level `training` of sam2 1.1.0) on prompts of ours.

What it imports beside itself and these tests lack, has stand-ins: its trainer, for the name of the
loss, and tensordict, for a decorator.
"""

import sys
import types
from unittest import mock

import numpy as np
import torch_sam2

from rfmedsam2_jax.base.constants import IMAGE_MEAN, IMAGE_STD
from rfmedsam2_jax.nn.prompt_encoder import ABSENT

torch = torch_sam2.torch


def _imported():
  trainer, tensordict = types.ModuleType("training.trainer"), types.ModuleType("tensordict")
  trainer.CORE_LOSS_KEY = "core_loss"
  tensordict.tensorclass = lambda kind: kind
  stand_ins = {"training.trainer": trainer, "tensordict": tensordict}
  with mock.patch.dict(sys.modules, {k: v for k, v in stand_ins.items() if k not in sys.modules}):
    from training import loss_fns
    from training.model import sam2
  return loss_fns, sam2


loss_fns, official_sam2 = _imported()


def official_trainer(config, corrections, presence_bias=3.0):
  """SAM2Train in training mode, but for what is random in it beside prompts, with drawn weights."""
  model = torch_sam2.build(
    config, kind=official_sam2.SAM2Train, num_correction_pt_per_frame=corrections,
    add_all_frames_to_correct_as_cond=True,
  )
  torch_sam2.draw_weights(model, 0, presence_bias)
  model.train()
  for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
      module.p = 0.0
    if hasattr(module, "dropout_p"):
      module.dropout_p = 0.0
    if hasattr(module, "drop_prob"):
      module.drop_prob = 0.0
  return model


def official_loss():
  """MultiStepMultiMasksAndIous with the weights of SAM 2.1's fine-tuning."""
  return loss_fns.MultiStepMultiMasksAndIous(
    dict(loss_mask=20, loss_dice=1, loss_iou=1, loss_class=1), supervise_all_iou=True,
    iou_use_l1_loss=True, pred_obj_scores=True, focal_gamma_obj_score=0.0,
    focal_alpha_obj_score=-1.0,
  )


def losses_of(model, images, truth, plan, track, click):
  """The official losses of one track: a dict of tensors, those of the slices that are decoded.

  Args:
    images: float32 [L, S, S, 3] in [0, 1]. truth: bool [L, S, S].
    plan: training.tracker_prompts.Plan of numpy arrays.
    click: (step, round, truth, found) -> point [2] and label, what comes instead of
      `get_next_point`.
  """
  slices, places = plan.slices[track], plan.places[track]
  way = slices[np.argsort(places)]
  targets = torch.from_numpy(truth[way])[:, None]
  normalised = (images[way] - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
  encoded = model.forward_image(torch_sam2.nchw(normalised))
  points, masks = {}, {}
  prompted = [int(p) for p, is_prompted in zip(places, plan.prompted[track], strict=True)
              if is_prompted]
  for step, place in enumerate(prompted):
    if plan.takes_mask[track]:
      masks[place] = targets[place][None]
    elif plan.has_box[track, step]:
      corners = torch.tensor(plan.boxes[track, step]).reshape(1, 2, 2)
      points[place] = dict(point_coords=corners, point_labels=torch.tensor([[2, 3]]).int())
    else:
      assert plan.labels[track, step] != ABSENT
      points[place] = dict(
        point_coords=torch.tensor(plan.points[track, step]).reshape(1, 1, 2),
        point_labels=torch.tensor([[plan.labels[track, step]]]).int(),
      )
  corrected = [int(p) for p, yes in zip(places, plan.corrected[track], strict=True) if yes]
  prompts = dict(
    gt_masks_per_frame={z: x[None] for z, x in enumerate(targets)}, num_frames=len(way),
    use_pt_input=not plan.takes_mask[track], init_cond_frames=prompted,
    frames_not_in_init_cond=[z for z in range(len(way)) if z not in prompted],
    mask_inputs_per_frame=masks, point_inputs_per_frame=points,
    frames_to_add_correction_pt=corrected,
  )
  steps = iter([(step, r) for step, yes in enumerate(plan.corrected[track]) if yes
                for r in range(model.num_correction_pt_per_frame)])

  def next_point(gt_masks, pred_masks, method):
    assert method == "uniform"
    where, label = click(*next(steps), gt_masks[:, 0].numpy(), pred_masks[:, 0].numpy())
    return torch.tensor(np.array(where))[:, None], torch.tensor(np.array(label))[:, None].int()

  batch = types.SimpleNamespace(
    num_frames=len(way), flat_obj_to_img_idx=torch.arange(len(way))[:, None]
  )
  with mock.patch.object(official_sam2, "get_next_point", next_point):
    outputs = model.forward_tracking(encoded | prompts, batch)
  told = [z for z in range(len(way)) if z not in masks]
  return official_loss()([outputs[z] for z in told], torch.stack([targets[z] for z in told]))
