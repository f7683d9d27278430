import dataclasses
import itertools
import json

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from scipy import ndimage

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.augmentation import (
  AugmentationConfig,
  augment_intensity,
  draw_affine,
  sample_patch,
)
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.pipeline import (
  BatchConfig,
  Cases,
  LoaderConfig,
  RunConfig,
  generator_batches,
  refiner_batches,
)
from rfmedsam2_jax.data.preprocessing import Prepared, Restore, save_case
from rfmedsam2_jax.data.prompt_mistakes import (
  PromptCorruptionConfig,
  corrupt,
  logits_of_truth,
)
from rfmedsam2_jax.data.sam_slices import resize_area, resize_linear

LABELS = Labels((Structure("core", (1,)), Structure("whole", (1, 2))), True, (1, 2), ignore=9)
SHAPES = ((14, 40, 32), (9, 36, 44), (5, 30, 30))
PATCH = (8, 24, 24)
NO_CORRUPTION = PromptCorruptionConfig(**{
  field.name: 0 for field in dataclasses.fields(PromptCorruptionConfig)
  if field.name.endswith("_probability")})


class Upright(AugmentationConfig):
  rotation_probability = scaling_probability = 0.0


class Still(Upright):
  noise_probability = blur_probability = brightness_probability = contrast_probability = 0.0
  gamma_probability = gamma_inverted_probability = 0.0


class Turned(Still):
  rotation_probability = 1.0


class Affine(Still):
  rotation_probability = scaling_probability = 1.0


NO_AUGMENTATION, AFFINE_ONLY = Still(), Affine(flips=(0, 1, 2))
RUN = RunConfig(image_size=64, slices=6, structures=2)


def store_case(folder, identifier, image, atoms, window=((0.0, 1.0),), spacing=(1.0, 1.0, 1.0)):
  shape = image.shape[1:]
  restore = Restore(shape, spacing, (0, 0, 0), shape, (0, 1, 2), shape)
  prepared = Prepared(image.astype(np.float32), np.array(window, np.float32), restore)
  save_case(folder, identifier, prepared, atoms.astype(np.uint8), LABELS)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  """Three cases whose image is their label: 1 in the core, 0.5 in the rest of the whole."""
  folder = tmp_path_factory.mktemp("prepared")
  rng = np.random.default_rng(0)
  for number, shape in enumerate(SHAPES):
    field = ndimage.gaussian_filter(rng.standard_normal(shape), (2, 6, 6))
    field = (field - field.mean()) / field.std()
    atoms = np.where(field > 1.2, 1, np.where(field > 0.4, 2, 0))
    store_case(folder, f"case{number}", np.choose(atoms, [0, 1, 0.5])[None], atoms)
  for name, side in (("prompts", 16), ("fine", 32)):
    (folder / name).mkdir()
    for number in range(len(SHAPES)):
      atoms = np.load(folder / f"case{number}_atoms.npy")
      truth = np.moveaxis(LABELS.membership[atoms], -1, 0)
      logits = 64 * resize_area(truth, side) - 32
      np.save(folder / name / f"case{number}.npy", logits.astype(np.float16))
  return folder


CASES = ("case0", "case1", "case2")


def patches(folder, augmentation=None, **options):
  seed, size = options.pop("seed", 7), options.pop("batch_size", 2)
  return generator_batches(
    Cases(folder, CASES, seed), PATCH, augmentation or AugmentationConfig(), 0.33,
    BatchConfig(size, **options),
  )


def runs(folder, augmentation=None, corruption=None, run=RUN, **options):
  names, seed = options.pop("cases", CASES), options.pop("seed", 7)
  return refiner_batches(
    Cases(folder, names, seed, options.pop("prompts", folder / "prompts")),
    run,
    LABELS.membership,
    augmentation or AugmentationConfig(),
    corruption or PromptCorruptionConfig(),
    BatchConfig(options.pop("batch_size", 2), **options),
  )


def assert_same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("make", [patches, runs])
def test_restored_iterator_goes_on_exactly_where_it_was(store, make, tmp_path, monkeypatch):
  iterator = make(store)
  for _ in range(3):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    wanted = [next(iterator) for _ in range(3)]
    monkeypatch.setattr(LoaderConfig, "threads", 2)
    monkeypatch.setattr(LoaderConfig, "prefetch", 4)
    by_orbax = make(store)
    manager.restore(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(by_orbax)))
  monkeypatch.setattr(LoaderConfig, "threads", 0)
  monkeypatch.setattr(LoaderConfig, "prefetch", 0)
  by_state = make(store)
  by_state.set_state(state)
  for batch in wanted:
    assert_same(batch, next(by_orbax))
    assert_same(batch, next(by_state))
  assert not np.array_equal(*(next(make(store, seed=s))[list(batch)[0]] for s in (7, 8)))


@pytest.mark.parametrize("make", [patches, runs])
def test_processes_together_see_the_batches_of_one(store, make):
  whole = make(store, batch_size=4)
  parts = [make(store, batch_size=4, rows=(2 * i, 2 * i + 1)) for i in range(2)]
  for _ in range(3):
    batches = [next(part) for part in parts]
    assert_same(next(whole), {k: np.concatenate([b[k] for b in batches]) for k in batches[0]})


@pytest.mark.parametrize("make", [patches, runs])
def test_an_iterator_may_start_at_any_batch(store, make):
  whole = make(store, batch_size=2)
  for _ in range(3):
    next(whole)
  assert_same(next(whole), next(make(store, batch_size=2, start=3)))


@pytest.mark.slow
def test_worker_processes_change_nothing(store):
  with_workers = runs(store, loader=LoaderConfig(workers=2))
  for batch in itertools.islice(runs(store), 3):
    assert_same(batch, next(with_workers))
  with_workers.close()


def test_resizing_equals_jax_and_torch():
  rng = np.random.default_rng(0)
  for height, width in ((36, 50), (300, 129), (64, 64)):
    x = rng.standard_normal((2, height, width)).astype(np.float32)
    ours = resize_linear(x, 64)
    theirs = torch.nn.functional.interpolate(
      torch.from_numpy(x)[None], (64, 64), mode="bilinear", antialias=True
    )[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    jaxs = jax.image.resize(x, (2, 64, 64), "linear", antialias=True)
    np.testing.assert_allclose(ours, jaxs, atol=1e-5)
  x = rng.standard_normal((2, 128, 96)).astype(np.float32)
  pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x)[None], 32)[0]
  np.testing.assert_allclose(resize_area(x, 32), pooled, atol=1e-5)
  mask = rng.random((3, 37, 53)) > 0.5
  np.testing.assert_allclose(resize_area(mask, 16).mean((1, 2)), mask.mean((1, 2)), rtol=1e-5)


def test_label_follows_image_through_every_transform_of_a_patch(store):
  # The image is the label, so they must still be each other's after turning and scaling.
  iterator = patches(store, AFFINE_ONLY, batch_size=4)
  for batch in itertools.islice(iterator, 4):
    image, target = batch["image"][..., 0], batch["target"]
    assert image.shape == (4, *PATCH) and target.dtype == np.uint8
    agree = (image > 0.25) == (target > 0)
    assert agree.mean() > 0.97
    assert ((target > 0).mean() > 0.02) and len(np.unique(target)) == 3


def test_untransformed_patches_are_cut_out_bit_for_bit(store):
  volume = np.load(store / "case0_image.npy")[0]
  flip = np.diag([1.0, -1.0, 1.0])
  patch = sample_patch(volume, np.array([6.5, 11.5, 11.5]), PATCH, flip, order=1, fill=0)
  np.testing.assert_array_equal(patch, volume[3:11, 0:24, 0:24][:, ::-1])
  # A volume that is smaller than the patch lies in its middle, in zeros.
  small = np.load(store / "case2_image.npy")[0]
  cases = Cases(store, ["case2"], seed=0)
  iterator = generator_batches(cases, (8, 34, 34), NO_AUGMENTATION, 0.33, BatchConfig(1))
  patch = next(iterator)["image"][0, ..., 0]
  np.testing.assert_array_equal(patch[1:6, 2:32, 2:32], small)
  assert patch.sum() == pytest.approx(small.sum())


def test_rotations_are_rigid_in_millimetres():
  spacing = (4.0, 0.7, 1.3)
  config = Turned()
  rng = np.random.default_rng(0)
  for in_plane in (False, True):
    voxels = draw_affine(rng, config, spacing, in_plane)
    millimetres = np.diag(spacing) @ voxels @ np.diag(1 / np.array(spacing))
    np.testing.assert_allclose(millimetres @ millimetres.T, np.eye(3), atol=1e-12)
    assert np.abs(millimetres - np.eye(3)).max() > 0.01
    assert (millimetres[0, 0] == 1) == in_plane
  assert draw_affine(rng, NO_AUGMENTATION, spacing, False) is None


def test_every_intensity_change_happens_and_keeps_what_it_promises(monkeypatch):
  names = ("noise", "blur", "brightness", "contrast", "gamma", "gamma_inverted")
  image = np.random.default_rng(0).standard_normal((1, 8, 16, 16)).astype(np.float32) + 1
  config = Upright()
  for name in names:
    for other in names:
      monkeypatch.setattr(AugmentationConfig, f"{other}_probability", float(other == name))
    changed = augment_intensity(np.random.default_rng(1), image, config, in_plane=False)
    assert np.abs(changed - image).max() > 0.01, name
    assert changed.dtype == np.float32
    if name in ("contrast", "gamma", "gamma_inverted", "blur"):
      assert changed.mean() == pytest.approx(image.mean(), abs=0.02), name
    if name.startswith("gamma"):
      assert changed.std() == pytest.approx(image.std(), rel=1e-3)
  same = augment_intensity(np.random.default_rng(1), image, NO_AUGMENTATION, in_plane=False)
  np.testing.assert_array_equal(same, image)


def test_foreground_share_and_every_case_once_per_epoch(store):
  empty = np.zeros((4, 60, 60))
  atoms = empty.copy()
  atoms[2, 50, 50] = 1
  folder = store / "corner"
  for name in ("a", "b", "c"):
    store_case(folder, name, empty[None] + ord(name), atoms)
  cases = Cases(folder, ["a", "b", "c"], seed=0)
  iterator = generator_batches(cases, (4, 16, 16), NO_AUGMENTATION, 0.5, BatchConfig(1))
  batches = list(itertools.islice(iterator, 24))
  seen = [chr(int(b["image"].max())) for b in batches]
  epochs = ["".join(seen[i : i + 3]) for i in range(0, 24, 3)]
  assert all(sorted(epoch) == ["a", "b", "c"] for epoch in epochs)
  assert len(set(epochs)) > 1
  assert sum((b["target"] == 1).any() for b in batches) >= 12


def test_images_masks_and_prompts_of_a_run_stay_together(store):
  # Stored prompts are the truth, the image is the label: all three must agree after the transform.
  sure = dataclasses.replace(NO_CORRUPTION, truth_probability=0.0)
  run = dataclasses.replace(RUN, image_size=128, oversample_foreground=1.0)
  seen = 0
  iterator = runs(store, AFFINE_ONLY, sure, run=run, prompts=store / "fine")
  for batch in itertools.islice(iterator, 6):
    assert batch["images"].shape == (2, 6, 128, 128, 3)
    shapes = {batch[key].shape for key in ("masks", "known", "logits")}
    assert shapes == {(2, 2, 6, 32, 32)}
    bright = resize_area(batch["images"][..., 0], 32)
    for sample, track in itertools.product(range(2), range(2)):
      whole = batch["structures"][sample, track] == 1
      inside = batch["inside"][sample]
      mask = batch["masks"][sample, track]
      prompt = batch["logits"][sample, track] / 64 + 0.5
      assert np.abs(prompt - mask)[inside].mean() < 0.03
      if whole:
        assert (np.abs((bright[sample] > 0.25) ^ (mask > 0.5))[inside]).mean() < 0.03
      seen += int((mask > 0.5).sum())
      assert (mask[~inside] == 0).all() and (batch["logits"][sample, track][~inside] == -32).all()
      assert (batch["known"][sample, track][~inside] == 0).all()
  assert seen > 500


def test_untransformed_run_is_the_plain_resize_of_consecutive_slices(store):
  exact = dataclasses.replace(NO_CORRUPTION, truth_probability=1.0)
  batch = next(runs(store, NO_AUGMENTATION, exact, cases=["case1"], batch_size=1))
  image, atoms = np.load(store / "case1_image.npy")[0], np.load(store / "case1_atoms.npy")
  wanted = resize_linear(image, 64)
  starts = [
    z for z in range(4) if np.allclose(batch["images"][0, ..., 0], wanted[z : z + 6], atol=1e-5)
  ]
  assert len(starts) == 1 and batch["depth"][0] == 9 and batch["inside"].all()
  truth = LABELS.membership[atoms[starts[0] : starts[0] + 6]]
  for track, structure in enumerate(batch["structures"][0]):
    mask = resize_area(truth[..., structure], 16)
    np.testing.assert_allclose(batch["masks"][0, track], mask, atol=1e-6)
    np.testing.assert_allclose(batch["logits"][0, track], logits_of_truth(mask), atol=1e-5)


def test_context_shows_the_slices_before_and_behind_also_in_a_reversed_run(store):
  run = dataclasses.replace(RUN, context=True)
  mirrored = dataclasses.replace(NO_AUGMENTATION, flips=(0,))
  wanted = resize_linear(np.load(store / "case1_image.npy")[0], 64)
  directions = set()
  iterator = runs(store, mirrored, run=run, cases=["case1"], batch_size=1)
  for batch in itertools.islice(iterator, 8):
    middle = batch["images"][0, ..., 1]
    at = [int(np.abs(wanted - image).max((1, 2)).argmin()) for image in middle]
    step = at[1] - at[0]
    directions.add(step)
    for colour, offset in enumerate((-step, 0, step)):
      beside = np.clip(np.array(at) + offset, 0, len(wanted) - 1)
      np.testing.assert_allclose(batch["images"][0, ..., colour], wanted[beside], atol=1e-5)
  assert directions == {-1, 1}


def test_slices_beyond_a_short_volume_and_ignored_voxels_are_not_known(store):
  folder = store / "ignored"
  atoms = np.full((3, 32, 32), 1)
  atoms[:, :16] = 255
  store_case(folder, "short", np.ones((1, 3, 32, 32)), atoms)
  batch = next(runs(folder, NO_AUGMENTATION, cases=["short"], prompts=None, batch_size=1))
  assert batch["inside"][0].tolist() == [True] * 3 + [False] * 3 and batch["depth"][0] == 3
  known = batch["known"][0, 0]
  assert (known[:3, :8] == 0).all() and (known[:3, 8:] == 1).all() and (known[3:] == 0).all()
  np.testing.assert_array_equal(batch["masks"][0, 0], known)
  assert (batch["images"][0, 3:] == 0).all() and (batch["images"][0, :3] == 1).all()


def test_presence_is_that_of_single_voxels_and_absence_of_a_slice_without_ignored_ones(store):
  """A structure of 2 x 2 voxels fills a quarter of a pixel of the mask grid at most."""
  folder = store / "thin"
  atoms = np.zeros((6, 128, 128))
  atoms[1, 40:42, 60:62] = 1
  atoms[2, 70:72, 3:5] = 2
  atoms[3, 5, 5] = 255
  store_case(folder, "thin", np.zeros((1, 6, 128, 128)), atoms)
  run = dataclasses.replace(RUN, image_size=128, slices=7)
  flipped = dataclasses.replace(NO_AUGMENTATION, flips=(2,))
  for batch in itertools.islice(
    runs(folder, flipped, cases=["thin"], prompts=None, run=run, batch_size=1), 2
  ):
    for track, structure in enumerate(batch["structures"][0]):
      members = np.flatnonzero(LABELS.membership[:, structure])
      found = [bool(np.isin(z, members).any()) for z in atoms]
      assert sum(found) == 1 + structure  # the whole has both
      assert batch["masks"][0, track].max() <= 0.25 + 1e-6
      np.testing.assert_array_equal(batch["present"][0, track], [*found, False])
      absent = [not here and z != 3 for z, here in enumerate(found)]
      np.testing.assert_array_equal(batch["absent"][0, track], [*absent, False])


def test_prompts_of_another_plan_or_missing_ones_are_named(store, tmp_path):
  with pytest.raises(UserError, match="case0.npy: cannot be read.*predict the prompts again"):
    next(runs(store, prompts=tmp_path, cases=["case0"]))
  for number in range(3):
    np.save(tmp_path / f"case{number}.npy", np.zeros((2, 4, 16, 16), np.float16))
  with pytest.raises(UserError, match=r"case case0 have shape \(2, 4, 16, 16\)"):
    next(runs(store, prompts=tmp_path, cases=["case0"]))


def test_each_corruption_makes_its_mistake_within_the_limits():
  occupancy = np.zeros((8, 24, 24), np.float32)
  occupancy[:, 8:16, 8:16] = 1
  clean = logits_of_truth(occupancy)
  assert ((clean > 0) == (occupancy > 0.5)).all() and np.abs(clean).max() <= 8
  np.testing.assert_array_equal(corrupt(np.random.default_rng(0), clean, NO_CORRUPTION), clean)

  def mistakes(name, seed):
    config = dataclasses.replace(NO_CORRUPTION, **{f"{name}_probability": 1.0})
    changed = corrupt(np.random.default_rng(seed), clean, config)
    assert np.abs(changed).max() <= 32
    return (changed > 0).sum() - (clean > 0).sum(), changed

  sizes = [mistakes("morphology", seed)[0] for seed in range(8)]
  assert min(sizes) < 0 < max(sizes)
  assert all(mistakes("island", seed)[0] >= 0 for seed in range(8))
  assert max(mistakes("island", seed)[0] for seed in range(8)) > 5
  assert (mistakes("lose", 0)[1] == -32).all() and (mistakes("drop", 0)[1] == -32).all()
  moved = mistakes("shift", 3)[1] > 0
  assert moved.sum() == (clean > 0).sum() and (moved != (clean > 0)).any()
  assert 0.1 < np.abs(mistakes("noise", 0)[1] - clean).std() < 8
