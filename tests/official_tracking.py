"""The official video predictor on slices in memory, and a record of every step that it takes."""

import contextlib
import dataclasses
import io
from unittest import mock

import numpy as np
import torch_sam2

from rfmedsam2_jax.tracking import SlicePrompt

torch = torch_sam2.torch


@dataclasses.dataclass
class Step:
  """One slice of one object as the official predictor ran it, from its own memories.

  known: slice -> (is conditioning, the original's outputs there), what it could read.
  """

  track: int
  slice: int
  reverse: bool
  known: dict
  logits: np.ndarray
  presence: float
  pointer: np.ndarray
  maps: np.ndarray


@dataclasses.dataclass
class Result:
  """logits [N, D, 4G, 4G] gated, presence [N, D], pointer [N, D, C], and all steps in order."""

  logits: np.ndarray
  presence: np.ndarray
  pointer: np.ndarray
  steps: list[Step]


class OfficialTracker:
  """SAM2VideoPredictor over one volume.

  Args:
    slices: float32 [D, S, S, 3], normalised.
    record: keep every step, with what it read.
  """

  def __init__(self, model, slices, record=True):
    self.model, self.depth, self.side = model, len(slices), slices.shape[1]
    self.record = record
    frames = torch_sam2.nchw(slices), self.side, self.side
    with mock.patch("sam2.sam2_video_predictor.load_video_frames", return_value=frames):
      self.state = model.init_state("in memory")
    self.steps: list[Step] = []
    # In float32 the original cannot attend to memories of bfloat16 alone, where no pointer beside
    # them makes the sum float32.
    forward = model.memory_attention.forward
    model.memory_attention.forward = lambda memory, **rest: forward(memory=memory.float(), **rest)
    # After a first propagation a prompt is a correction.
    model.add_all_frames_to_correct_as_cond = True

  def prompt(self, prompt: SlicePrompt):
    where = dict(inference_state=self.state, frame_idx=prompt.slice, obj_id=prompt.track)
    if prompt.mask is not None:
      self.model.add_new_mask(**where, mask=prompt.mask)
    else:
      points = dict(points=prompt.points, labels=prompt.labels) if len(prompt.labels) else {}
      box = None if prompt.box is None else np.float32(prompt.box)
      self.model.add_new_points_or_box(**where, **points, box=box)

  def run(self, prompts=()) -> Result:
    """Adds prompts and follows forward, then backward, as a user of the predictor does."""
    with contextlib.redirect_stderr(io.StringIO()):
      for prompt in prompts:
        self.prompt(prompt)
      with self._recording() if self.record else contextlib.nullcontext():
        for reverse in (False, True):
          for _ in self.model.propagate_in_video(self.state, reverse=reverse):
            pass
    return self._result()

  def forget_tracked(self):
    """Drops what was remembered of slices that nobody prompted."""
    for outputs in self.state["output_dict_per_obj"].values():
      outputs["non_cond_frame_outputs"].clear()

  @contextlib.contextmanager
  def _recording(self):
    original = self.model._run_single_frame_inference
    tracks = {id(d): t for t, d in self.state["output_dict_per_obj"].items()}

    def record(**arguments):
      outputs = arguments["output_dict"]
      known = {
        z: (conditioning, out)
        for conditioning, kind in ((True, "cond_frame_outputs"), (False, "non_cond_frame_outputs"))
        for z, out in outputs[kind].items()
      }
      out, masks = original(**arguments)
      self.steps.append(Step(
        tracks[id(outputs)], arguments["frame_idx"], arguments["reverse"], known,
        masks[0, 0].numpy(), out["object_score_logits"].item(), out["obj_ptr"][0].numpy(),
        memory_map(out),
      ))
      return out, masks

    with mock.patch.object(self.model, "_run_single_frame_inference", record):
      yield

  def _result(self) -> Result:
    found = []
    for outputs in self.state["output_dict_per_obj"].values():
      whole = outputs["non_cond_frame_outputs"] | outputs["cond_frame_outputs"]
      found.append([whole[z] for z in range(self.depth)])
    stack = lambda what: np.stack([[what(out) for out in row] for row in found])  # noqa: E731
    return Result(
      stack(lambda out: out["pred_masks"][0, 0].numpy()),
      stack(lambda out: out["object_score_logits"].item()),
      stack(lambda out: out["obj_ptr"][0].numpy()),
      self.steps,
    )


def memory_map(out):
  """What the original stored of a slice, float32 [E, G, G] of bfloat16 values."""
  return out["maskmem_features"][0].float().numpy()
