"""Training SAM 2 on prompts: against the official classes, what is drawn, the phase of a run."""

import dataclasses
import functools
import itertools
import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict
from tiny_config import TINY

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import silent
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.config import parse_config
from rfmedsam2_jax.config.tracker import TrackerConfig
from rfmedsam2_jax.data import object_runs
from rfmedsam2_jax.data.run_folder import RunFolder
from rfmedsam2_jax.model import untrained
from rfmedsam2_jax.nn import SAM2, init_params
from rfmedsam2_jax.nn.prompt_encoder import ABSENT
from rfmedsam2_jax.parallel.mesh import MeshConfig, make_mesh
from rfmedsam2_jax.refinement.stages import encode_slices
from rfmedsam2_jax.training import shard, tracker_data, tracker_step
from rfmedsam2_jax.training import tracker_prompts as sampling
from rfmedsam2_jax.training import train_networks as networks
from rfmedsam2_jax.training.loop import Training
from rfmedsam2_jax.training.phases import PHASES, tracker_phases
from rfmedsam2_jax.weights.checkpoint import load_checkpoint
from rfmedsam2_jax.weights.names import from_official


def discs(tracks, length, side, seed=0):
  """Objects bool [T, L, S, S], a disc on every slice."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:side, :side]
  cy, cx = rng.uniform(0.3, 0.7, (2, tracks, length, 1, 1)) * side
  return np.hypot(y - cy, x - cx) < rng.uniform(0.12, 0.3, (tracks, length, 1, 1)) * side


# --- beside the official training -----------------------------------------------------------------


@pytest.mark.slow
def test_loss_and_gradient_are_those_of_the_official_training():
  """Boxes, points and masks, on one slice and on two, with corrections of one more slice, and
  slices on which no object is seen."""
  torch_sam2 = pytest.importorskip("torch_sam2")
  official = pytest.importorskip("official_sam2_training")
  length, tracks, rounds = 4, 4, 2
  config = dataclasses.replace(torch_sam2.TINY, image_size=64, memory_layers=1, fuser_layers=1)
  settings = TrackerConfig(slices=length, corrections=rounds)
  theirs = official.official_trainer(config, rounds)
  params, side = torch_sam2.params_of(theirs, config), config.image_size
  # Of such images that no hidden unit is at the kink of its ReLU, where float32 would decide.
  images = np.random.default_rng(2).random((length, 8, 8, 3), np.float32)
  images = images.repeat(side // 8, 1).repeat(side // 8, 2)
  whole = discs(tracks, length, side)
  keys = jax.random.split(jax.random.key(1), tracks)

  @jax.jit
  @jax.vmap
  def plans_of(seed):
    of_tracks, shared = jax.random.split(jax.random.key(seed))
    of_tracks = jax.random.split(of_tracks, tracks)
    return sampling.draw_plan(
      jnp.asarray(whole), jnp.ones(tracks, bool), of_tracks, shared, settings)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def ours(params, plan, truth):
    features = encode_slices(SAM2(config), params, jnp.asarray(images))
    told = tracker_step.follow(SAM2(config), params, features, truth, plan, keys, settings)
    return tracker_step.loss_of(tracker_step.sums_of(told, plan.used), settings.loss)[0], told

  @jax.jit
  def click(track, number, truth, found):
    return sampling.corrections(truth, found, jax.random.fold_in(keys[track], number)[None])

  def with_all(plan):
    kinds = plan.has_box, plan.labels != ABSENT, plan.takes_mask
    return all(kind.any() for kind in kinds)

  def compare(plan, truth):
    (value, _), gradient = ours(params, plan, truth)
    theirs.zero_grad()
    total = 0.0
    for track in range(tracks):
      def clicked(step, number, *masks, track=track):
        return click(track, step * (rounds + 1) + number, *masks)
      losses = official.losses_of(theirs, images, truth[track], plan, track, clicked)
      total += losses["core_loss"] / tracks
    total.backward()
    assert float(value) == pytest.approx(total.item(), rel=5e-6)
    grads = {name: np.zeros(x.shape, np.float32) for name, x in theirs.state_dict().items()} | {
      name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
    expected = flatten_dict(from_official(grads, config))
    found = {path: np.asarray(x) for path, x in flatten_dict(gradient).items()}
    norm, ours_norm = (
      np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in tree.values()))
      for tree in (expected, found))
    assert ours_norm == pytest.approx(norm, rel=5e-6)
    for path, x in expected.items():
      np.testing.assert_allclose(found[path], x, atol=1e-5 * norm, err_msg=str(path))

  drawn = jax.tree.map(np.asarray, plans_of(jnp.arange(40)))
  plans = [jax.tree.map(lambda x, i=i: x[i], drawn) for i in range(40)]
  plans = [plan for plan in plans if with_all(plan)]
  on_two = next(p for p in plans if p.prompted.sum() == 2 * tracks)
  truth = whole.copy()
  truth[0, on_two.slices[0, -1]] = False
  compare(on_two, truth)
  # A slice that is corrected further on. All objects are seen: one that is there and is not has
  # another loss here, see prompted_loss.
  further = next(p for p in plans if p.prompted.sum() == tracks and p.corrected.sum(1).max() == 2)
  truth = whole.copy()
  truth[1, further.slices[1, 1]] = False
  compare(further, truth)


def test_sampled_clicks_and_boxes_are_those_of_the_official_samplers():
  """Where a click may fall, its label, and how far a box's edges move: the same in many draws."""
  torch = pytest.importorskip("torch_sam2").torch
  from sam2.modeling import sam2_utils

  truth = np.zeros((12, 12), bool)
  truth[3:8, 2:9] = True
  found = np.roll(truth, 1, axis=0)
  found[3, 2:5] = True
  many = lambda x: torch.from_numpy(x).expand(2000, 1, *x.shape)  # noqa: E731
  keys = jax.random.split(jax.random.key(0), 2000)
  draw = jax.jit(jax.vmap(lambda key, t, f: sampling.clicks(t[None], f[None], key[None]),
                          (0, None, None)))
  for guess in (found, truth, np.zeros_like(truth)):
    points, labels = sam2_utils.sample_random_points_from_errors(many(truth), many(guess))
    ours, ours_labels = draw(keys, jnp.asarray(truth), jnp.asarray(guess))
    theirs = np.concatenate([points[:, 0].numpy(), labels.numpy()], axis=1)
    ours = np.concatenate([ours[:, 0], ours_labels], axis=1)
    places, counts = np.unique(theirs, axis=0, return_counts=True)
    ours_places, ours_counts = np.unique(ours, axis=0, return_counts=True)
    np.testing.assert_array_equal(ours_places, places)
    expected = 2000 / len(places)  # every place is as likely
    assert np.abs(ours_counts - expected).max() < 6 * np.sqrt(expected)
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)
  theirs = sam2_utils.sample_box_points(many(truth), noise_bound=20 * 12 / 1024)[0]
  theirs = theirs.reshape(2000, 4).numpy()
  ours = np.asarray(sampling._noisy_boxes(jnp.broadcast_to(truth, (2000, 12, 12)), keys))
  for quantile in (0.0, 0.25, 0.5, 0.75, 1.0):
    np.testing.assert_allclose(
      np.quantile(ours, quantile, axis=0), np.quantile(theirs, quantile, axis=0), atol=0.05)


def test_tracks_are_prompted_where_their_object_is():
  length, side, tracks = 6, 16, 300
  truth = discs(tracks, length, side)
  truth[:100, 0] = False   # from the last slice on, backward
  truth[100:150, ::5] = False  # at neither end
  truth[150:200, 1:] = False  # there is no second slice
  settings = TrackerConfig(slices=length, box=0.5, point=0.25)
  keys = jax.random.split(jax.random.key(0), tracks)
  draw = jax.jit(functools.partial(sampling.draw_plan, config=settings))
  has = np.ones(tracks, bool)
  has[-1] = False
  plans = [jax.tree.map(np.asarray, draw(truth, has, keys, jax.random.key(s))) for s in range(20)]
  numbers = {(int(p.prompted[200:].sum(1).max()), int(p.corrected.sum(1).max())) for p in plans}
  assert numbers == {(1, 1), (1, 2), (2, 2)}
  plan = next(p for p in plans if p.prompted[250].sum() == 2)
  present = truth.any((2, 3))
  at = np.take_along_axis(present, plan.slices, 1)
  assert plan.used.tolist() == [True] * 100 + [False] * 50 + [True] * 149 + [False]
  assert at[plan.prompted & plan.used[:, None]].all()
  assert (plan.slices[:100, 0] == length - 1).all() and (plan.prompted[150:200].sum(1) == 1).all()
  assert 0.3 < (plan.slices[200:, 0] == 0).mean() < 0.7  # either way
  assert (np.sort(plan.slices, 1) == np.arange(length)).all()
  # Prompted slices first, then the others in the order of the way.
  rest = np.diff(plan.places[:, 2:], axis=1)
  assert (rest > 0).all() and not plan.prompted[:, 2:].any()
  boxed, pointed = plan.has_box[:, 0], plan.labels[:, 0] == 1
  assert np.abs([boxed.mean() - 0.5, pointed[plan.used].mean() - 0.25]).max() < 0.1
  np.testing.assert_array_equal(plan.takes_mask[plan.used], (~boxed & ~pointed)[plan.used])
  assert not plan.corrected[plan.takes_mask].any()
  inside = truth[np.arange(tracks), plan.slices[:, 0]]
  x, y = plan.points[:, 0].astype(int).T
  assert inside[np.arange(tracks), y, x][pointed & plan.used].all()
  # As images: wherever the object is, and never by masks.
  images = jax.tree.map(np.asarray, jax.jit(functools.partial(
    sampling.draw_plan, config=dataclasses.replace(settings, every=1.0)))(
      truth, has, keys, jax.random.key(0)))
  there = np.take_along_axis(present, images.slices, 1)[images.used]
  np.testing.assert_array_equal(images.prompted[images.used], there)
  asked = images.has_box | (images.labels == 1)
  np.testing.assert_array_equal(asked[images.used], there)
  x0, y0, x1, y1 = np.moveaxis(images.boxes, -1, 0)
  shown = np.take_along_axis(truth, images.slices[..., None, None], 1)
  area = (x1 - x0 + 1) * (y1 - y0 + 1)
  assert (area >= 0.6 * shown.sum((2, 3)))[images.has_box].all()


# --- the phase of a run ---------------------------------------------------------------------------

TRACKER = {
  "generator": {"loop": {"steps": 0}},
  "refiner": {"loop": {"steps": 0}},
  "sam2": TINY["sam2"] | {"drawn_prompts": True, "adapters": {"dwconv": False, "cnn": False}},
  "tracker": {
    # Not all: the gradient of everything is compared with the original's above.
    "trainable": ["sam_mask_decoder/*", "memory_attention/*"],
    "slices": 3, "objects": 2, "promptings": 2, "corrections": 1,
    "loop": {"steps": 4, "log_every": 2, "checkpoint_every": 2},
    "optimizer": {"warmup_steps": 1},
  },
}


@pytest.fixture
def stream(monkeypatch):
  """Discs in the place of the synthetic stream."""
  module = types.ModuleType("rfmedsam2_jax.data.synthetic")

  def synthetic_run(config, seed, index, side, length, tracks):
    objects = discs(tracks, length, side, seed * 1000 + index)
    return types.SimpleNamespace(images=objects.any(0).astype(np.float32), objects=objects)

  module.SyntheticConfig, module.synthetic_run = types.SimpleNamespace, synthetic_run
  monkeypatch.setitem(sys.modules, module.__name__, module)


def written(path, tree):
  path.write_text(yaml.safe_dump(tree))
  return str(path)


@pytest.mark.slow
def test_a_tracker_is_trained_without_any_data_set_and_resumed_bit_for_bit(
  tmp_path, stream, capsys
):
  images = {"steps": 1, "slices": 1, "batch_size": 2, "every": 1, "learning_rate": 1e-3}
  legs = {"legs": [images, {"steps": 4}], "loop": TRACKER["tracker"]["loop"] | {"steps": 0}}
  config = written(tmp_path / "c.yaml", TRACKER | {"tracker": TRACKER["tracker"] | legs})
  assert main(["train", config, "--out", str(tmp_path / "whole")]) == 0

  # As it is when it was killed after its third step.
  shutil.copytree(tmp_path / "whole", tmp_path / "run")
  for folder in ("params", "checkpoints/4"):
    shutil.rmtree(tmp_path / "run" / "tracker" / folder)
  assert main(["train", config, "--out", str(tmp_path / "run"), "--resume"]) == 0
  assert "tracker: resumed at step 2 of 4" in capsys.readouterr().err
  whole, resumed = (load_checkpoint(tmp_path / name / "tracker" / "params")
                    for name in ("whole", "run"))
  assert resumed.config.drawn_prompts and resumed.about["phase"] == "tracker"
  for ours, theirs in zip(*map(jax.tree.leaves, (resumed.params, whole.params)), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  lines = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
  told = {"loss", "focal", "dice", "iou", "presence", "mask_iou", "gradient_norm"}
  assert [(x["phase"], x["step"]) for x in lines] == [
    ("tracker/leg-1", 1), ("tracker", 2), ("tracker", 4)]
  assert told <= lines[0].keys() and all(np.isfinite(x["loss"]) for x in lines)
  assert main(["predict", str(tmp_path / "run"), "x.nii.gz", "--out", str(tmp_path / "x")]) == 2
  assert "trained a tracker alone" in capsys.readouterr().err


def test_a_leg_sets_out_from_the_averaged_weights_of_the_one_before(tmp_path, monkeypatch):
  legs = [{"steps": 3, "slices": 1, "learning_rate": 0.5, "plain": 1},
          {"steps": 2, "box": 1, "point": 0}]
  config = parse_config(TRACKER | {"tracker": TRACKER["tracker"] | {"loop": {"steps": 0},
                                                                  "legs": legs}})
  first, last = tracker_phases(config)
  assert (first.batch["images"].shape[1], first.settings.optimizer.learning_rate) == (1, 0.5)
  asked = []
  monkeypatch.setattr(object_runs, "SyntheticRuns",
                      lambda seed, run, plain: asked.append((seed, plain)) or (lambda index: {}))
  for leg in (first, last):
    leg.batches(tmp_path, [], [0], 0)
  assert asked == [(0, 1), (1 << 32, 0)]  # runs of its own
  assert first.settings.loop.steps == 3 and last.settings.box == 1 != first.settings.box

  def trained(training, phase, segmenter, cases, state):
    further = lambda by: jax.tree.map(lambda x: x + by, state.trained)  # noqa: E731
    return state.replace(ema=further(1), trained=further(10))

  monkeypatch.setattr(networks, "train_phase", trained)
  training = Training(RunFolder(tmp_path), make_mesh(MeshConfig()), 0, [], {}, silent, False)
  params = networks.train_tracker(training, [first, last], config.sam2, [])
  key = jax.random.split(jax.random.fold_in(jax.random.key(0), 3))[0]
  moved, frozen = ("sam_mask_decoder", "iou_token"), ("no_mem_embed",)
  begun = flatten_dict(init_params(config.sam2, key))
  for path, by in ((moved, 2), (frozen, 0)):
    np.testing.assert_allclose(flatten_dict(params)[path], begun[path] + by, atol=1e-6)


def test_data_sets_are_prepared_and_mixed_with_the_stream(tmp_path, stream, phantoms, capsys):
  data = [{"source": str(phantoms)}, {"source": "synthetic", "weight": 2}]
  tree = TRACKER | {"tracker": TRACKER["tracker"] | {"data": data, "batch_size": 2}}
  config = parse_config(tree)
  run = RunFolder(tmp_path / "run")
  run.path.mkdir()
  tracker_data.prepare_sources(run, config, tracker_data.read_sources(config), silent)
  names = tracker_data.case_names(run.path, config)
  assert len(names) == 5 and names[-1] == "of the synthetic stream"
  batches = list(itertools.islice(tracker_data.batches(run.path, config, 0, [0, 1], 0), 8))
  for name, wanted in tracker_phases(config)[-1].batch.items():
    assert batches[0][name].shape == wanted.shape and batches[0][name].dtype == wanted.dtype
  drawn = np.concatenate([batch["case"] for batch in batches])
  assert {4} < set(drawn) and np.concatenate([batch["has"] for batch in batches]).any(1).all()
  nowhere = written(tmp_path / "c.yaml", tree | {"tracker": {"data": [{"source": "nowhere"}],
                                                           "loop": {"steps": 1}}})
  assert main(["train", nowhere, "--out", str(tmp_path / "other")]) == 2
  assert "nowhere: is not a folder" in capsys.readouterr().err


def test_the_refiner_starts_from_the_tracker_as_it_is(tmp_path):
  """Not silenced, although its stages are residual."""
  config = parse_config(TINY | {"refiner": TINY["refiner"] | {"loop": {"steps": 0}}})
  plan = shard._plan_of_shapes(config.plan, 1, 2)
  training = Training(RunFolder(tmp_path), make_mesh(MeshConfig()), 0, [], {}, silent, False)
  tracker = init_params(config.sam2, jax.random.key(7))
  trained = networks.train_refiner(
    training, None, PHASES["refiner"](config, plan), untrained(config, plan), ["a"], tracker)
  for found, given in zip(*map(jax.tree.leaves, (trained.refiner, tracker)), strict=True):
    np.testing.assert_array_equal(found, given)
  with pytest.raises(UserError, match=r"give tracker\.init_from instead"):
    parse_config(TINY | {"tracker": {"loop": {"steps": 1}}, "refiner": {"init_from": "x"}})
