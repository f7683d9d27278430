"""A generator on a grid of its own (plan.generator_spacing): from the volume to it, and back."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from scipy.special import expit
from small_sam2 import MASK_SIDE, MODEL

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.data.cuts import Cut
from rfmedsam2_jax.data.files import load_json
from rfmedsam2_jax.data.fingerprint import Fingerprint
from rfmedsam2_jax.data.plan import PlanConfig, load_plan, make_plan, save_plan
from rfmedsam2_jax.data.preprocessing import load_case
from rfmedsam2_jax.data.volumes import load_image
from rfmedsam2_jax.model import load
from rfmedsam2_jax.nn.unet import UNet, UNetConfig
from rfmedsam2_jax.refinement import RefinementConfig
from rfmedsam2_jax.refinement.prompts import stage0_logits
from rfmedsam2_jax.segmentation import segmenter as segmenter_lib
from rfmedsam2_jax.segmentation.segmenter import label_maps, segment_volume

COARSE = (24.0, 9.0, 13.0)  # mm, beside the phantoms' 9.5, 5.5 and 5.5: another ratio on every axis


def zoomed(array, shape):
  """scipy's linear interpolation between half-pixel centres, borders repeated."""
  ratios = np.divide(shape, array.shape)
  return ndimage.zoom(np.float64(array), ratios, order=1, mode="nearest", grid_mode=True)


def coarse(run):
  """The run's networks with a generator that sees less."""
  found = load(run)
  return dataclasses.replace(
    found, plan=dataclasses.replace(found.plan, generator_spacing=COARSE))


@pytest.fixture
def volume(phantoms):
  return load_image(sorted((phantoms / "imagesTs").glob("*.nii.gz"))[0])


def test_a_coarse_generator_is_one_of_coarse_volumes_brought_to_the_slices(tiny_run, volume):
  """Witness: a run whose volumes are all coarse, and scipy."""
  model = coarse(tiny_run)
  alone = dataclasses.replace(model, refiner=None, plan=model.plan.of_generator)
  assert alone.plan.spacing == COARSE and alone.plan.generator_spacing is None
  found, witness = segment_volume(model, volume), segment_volume(alone, volume)
  made, shape = found.generated, found.prepared.image.shape[1:]
  np.testing.assert_array_equal(made.log_odds, witness.generated.log_odds)
  assert made.log_odds.shape[1:] == witness.prepared.image.shape[1:] != shape
  for organ in range(2):
    expected = zoomed(expit(np.float64(made.log_odds[organ])), shape)
    expected = found.prepared.restore.to_native(expected.astype(np.float32), fill=0.0)
    np.testing.assert_allclose(found.probability(0, organ), expected, atol=2e-4)
  # Stages run on the slices' own grid, and fusion is of their size.
  assert found.results[-1].cells[:, 1].max() >= made.log_odds.shape[1]
  assert all(each.shape == volume.array.shape[1:] for each in label_maps([found]))


def test_first_prompts_are_the_coarse_masks_between_slices_and_pixels(monkeypatch):
  rng, coarse_shape, depth = np.random.default_rng(0), (3, 11, 13), 7
  slab = np.float32(rng.standard_normal((*coarse_shape, 3)) * 8)
  monkeypatch.setattr(segmenter_lib, "predict_slabs", lambda *_: [(slice(0, 3), slab)])
  labels = types.SimpleNamespace(structures=("a", "b"), regions=False)
  plan = types.SimpleNamespace(labels=labels, patch_size=coarse_shape)
  owner = segmenter_lib.Segmenter(
    plan, UNet(UNetConfig(), 3), {}, MODEL, None, RefinementConfig())
  seen, prepared = (types.SimpleNamespace(image=np.zeros((1, *shape), np.float32))
                    for shape in (coarse_shape, (depth, 44, 30)))
  made = segmenter_lib.first_prompts(
    owner, prepared, segmenter_lib.run_generator(owner, prepared, seen=seen))
  odds = np.moveaxis(np.asarray(stage0_logits(jnp.asarray(slab), False)), -1, 0)
  for organ, mine in enumerate(odds):
    inside, outside = (zoomed(expit(sign * np.float64(mine)), (depth, 44, 30)) for sign in (1, -1))
    expected = jax.image.resize(
      np.float32(np.log(inside / outside)), (depth, MASK_SIDE, MASK_SIDE), "linear", antialias=True)
    np.testing.assert_allclose(made.prompts.logits[organ], expected, rtol=5e-3, atol=3e-2)
  assert made.prompts.presence.shape == (2, depth)


def test_a_plan_without_the_key_is_the_plan_it_was(tiny_run, tmp_path):
  plan = load_plan(tiny_run / "plan.json")
  old = json.loads((tiny_run / "plan.json").read_text())
  del old["generator_spacing"]
  (tmp_path / "plan.json").write_text(json.dumps(old))
  assert load_plan(tmp_path / "plan.json") == plan == plan.of_generator
  fingerprint = load_json(tiny_run / "fingerprint.json", Fingerprint)
  config = PlanConfig(patch_size=plan.patch_size, poolings=1)
  assert make_plan(fingerprint, config) == plan
  same = dataclasses.replace(config, generator_spacing=plan.spacing)
  assert make_plan(fingerprint, same) == plan


def test_a_patch_that_is_not_given_is_cut_to_the_generators_own_grid(tiny_run, tmp_path):
  fingerprint = load_json(tiny_run / "fingerprint.json", Fingerprint)
  spacing = (10.0, 10.0, 10.0)
  plan = make_plan(fingerprint, PlanConfig(generator_spacing=spacing))
  as_a_whole = make_plan(fingerprint, PlanConfig(spacing=spacing))
  assert plan.spacing == make_plan(fingerprint).spacing
  assert (plan.patch_size, plan.strides) == (as_a_whole.patch_size, as_a_whole.strides)
  save_plan(tmp_path / "plan.json", plan)
  assert load_plan(tmp_path / "plan.json").generator_spacing == spacing
  with pytest.raises(UserError, match=r"plan.generator_spacing: is \(0"):
    make_plan(fingerprint, PlanConfig(generator_spacing=(0.0, 1.0, 1.0)))


def test_the_faster_way_leaves_a_generator_of_distant_slices_as_it_is(tiny_run):
  model = coarse(tiny_run)
  apart = model.plan.spacing[0]
  assert model.faster().plan.spacing[0] == 2 * apart
  assert model.faster().plan.generator_spacing == COARSE  # 24 mm, beside 2 x 9.5
  near = dataclasses.replace(model.plan, generator_spacing=(12.0, *COARSE[1:]))
  near = dataclasses.replace(model, plan=near).faster().plan.generator_spacing
  assert near == (2 * apart, *COARSE[1:])


def test_a_run_trains_its_generator_on_its_own_grid(tiny_config, tiny_run, tmp_path, phantoms):
  """And shows its stages cuts."""
  run = tmp_path / "run"
  # The generator has the steps of the tiny run, whose program will do; a refiner is not trained.
  assert main(["train", str(tiny_config), "--out", str(run), "refiner.loop.steps=0",
               "refiner.structures=1", "refinement.zoom=1.5",
               "plan.generator_spacing=[14,9,13]"]) == 0
  case = sorted((run / "prompts").glob("*.npy"))[0].stem
  fine, small = load_case(run / "preprocessed", case), load_case(
    run / "preprocessed" / "generator", case)
  np.testing.assert_array_equal(fine.image, load_case(tiny_run / "preprocessed", case).image)
  expected = np.array(fine.image.shape[1:]) * fine.spacing / (14.0, 9.0, 13.0)
  assert small.image.shape[1:] == tuple(np.rint(expected))
  # What the refiner learns from lies on its own slices.
  assert np.load(run / "prompts" / f"{case}.npy").shape[1] == fine.image.shape[1]
  cuts = np.load(run / "prompts" / "cuts" / f"{case}.npy")
  for cut, members in zip(cuts, load(run).plan.labels.membership.T, strict=True):
    rows, columns = np.nonzero(np.isin(fine.atoms, np.flatnonzero(members)).any(axis=0))
    assert Cut(*cut).holds(*np.array([[rows.min(), columns.min()], [rows.max(), columns.max()]]))
  assert main(["predict", str(run), str(phantoms / "imagesTs"), "--out", str(tmp_path / "p")]) == 0
