"""Official weights that are fine-tuned here and go back: the official predictor gives our masks."""

import dataclasses
import json

import numpy as np
import pytest
import yaml

from rfmedsam2_jax.base.constants import IMAGE_MEAN, IMAGE_STD
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.tracking import SlicePrompt, TrackingConfig, VolumeTracker
from rfmedsam2_jax.tracking.recurrence import gated_logits
from rfmedsam2_jax.weights.checkpoint import load_checkpoint

torch_sam2 = pytest.importorskip("torch_sam2")
from official_tracking import OfficialTracker  # noqa: E402

torch, TINY = torch_sam2.torch, torch_sam2.TINY
DEPTH = 4


@pytest.mark.full
def test_fine_tuned_official_weights_go_back_to_the_official_predictor(tmp_path):
  pt, checkpoint, run = tmp_path / "official.pt", tmp_path / "checkpoint", tmp_path / "run"
  torch.save({"model": torch_sam2.official(TINY, 0).state_dict()}, pt)
  network = json.loads(json.dumps(dataclasses.asdict(TINY)))
  adapters = {"dwconv": False, "cnn": False, "mask": False}
  sam2 = {"preset": "nano"} | network | {"adapters": adapters}
  tracker = {"init_from": str(checkpoint), "slices": 2, "objects": 1, "corrections": 0, "box": 1,
             "point": 0, "loop": {"steps": 3, "log_every": 1},
             "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "ema_decay": 0.5}}
  config = tmp_path / "config.yaml"
  config.write_text(yaml.safe_dump({"sam2": sam2, "tracker": tracker,
                                    "generator": {"loop": {"steps": 0}},
                                    "refiner": {"loop": {"steps": 0}}}))
  assert main(["convert", str(pt), str(checkpoint), "--config", str(config)]) == 0
  assert main(["train", str(config), "--out", str(run)]) == 0
  tuned = run / "tracker" / "params"
  assert main(["convert", "--to-torch", str(tuned), str(tmp_path / "tuned.pt")]) == 0

  found = load_checkpoint(tuned)
  official = torch_sam2.build(TINY, video=True)
  before = torch.load(pt, weights_only=True)["model"]
  after = torch.load(tmp_path / "tuned.pt", weights_only=True)["model"]
  assert max((after[name] - x).abs().max() for name, x in before.items()) > 1e-3
  official.load_state_dict(after, strict=True)
  pictures = np.random.default_rng(0).random((DEPTH, TINY.image_size, TINY.image_size, 3))
  slices = ((pictures - IMAGE_MEAN) / IMAGE_STD).astype(np.float32)
  prompts = [SlicePrompt(0, 1, box=(20.0, 30.0, 80.0, 90.0))]
  ours = VolumeTracker(SAM2(found.config), found.params, TrackingConfig(cache="float32"),
                       lambda z: slices[z], DEPTH).track(prompts).cells
  with torch.inference_mode():
    theirs = OfficialTracker(official, slices).run(prompts)
  np.testing.assert_array_equal(ours.presence > 0, theirs.presence > 0)
  masks = np.asarray(gated_logits(ours.logits, ours.presence)) > 0
  assert 0.01 < masks.mean() < 0.99
  assert (masks == (theirs.logits > 0)).mean() > 0.9999
