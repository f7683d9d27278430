"""Stages that see a cut around each structure: as if the volume ended there, and back to voxels."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage
from scipy.special import expit
from small_refinement import CONFIG
from small_sam2 import MODEL, SIDE, drawn

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.data.augmentation import transform_slices
from rfmedsam2_jax.data.cuts import Cut
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.preprocessing import Prepared, Restore
from rfmedsam2_jax.data.sam_slices import resize_linear
from rfmedsam2_jax.nn.unet import UNet, UNetConfig
from rfmedsam2_jax.refinement import refine as refine_lib
from rfmedsam2_jax.refinement.first_prompts import GivenPrompt, with_given
from rfmedsam2_jax.segmentation import segmenter as segmenter_lib
from rfmedsam2_jax.segmentation.segmenter import Segmentation, Segmenter, first_prompts, refine
from rfmedsam2_jax.segmentation.structures import structure_details

SHAPE = 6, 60, 48
WINDOW = np.array([[-1, 2]], np.float32)
LABELS = Labels((Structure("a", (1,)), Structure("b", (2,))), False, (1, 2))


def prepared_of(array):
  shape = array.shape
  return Prepared(array[None], WINDOW, Restore(
    shape, (3.0, 1.0, 1.0), (0, 0, 0), shape, (0, 1, 2), shape))


def model_of(zoom, stages=CONFIG.stages):
  plan = SimpleNamespace(labels=LABELS, slice_axis=0, generator_spacing=None)
  config = dataclasses.replace(CONFIG, zoom=zoom, stages=stages)
  return Segmenter(plan, UNet(UNetConfig(), 3), {}, MODEL, drawn(), config)


@pytest.fixture(scope="module")
def scan():
  """A volume and log-odds of two structures, one of them at the border of the slices."""
  rng = np.random.default_rng(0)
  array = ndimage.gaussian_filter(rng.standard_normal(SHAPE), (0, 2, 2)).astype(np.float32) * 4
  z, y, x = np.ogrid[tuple(map(slice, SHAPE))]
  odds = np.stack([9 - np.hypot(y - 25 - z, x - 30), 6 - np.hypot(y - 50, x - 3 - z / 2)])
  odds[1, :2] = -8
  return array, np.clip(odds, -32, 32).astype(np.float16)


def segmented(model, array, odds, shown=None):
  prepared = prepared_of(array)
  made = first_prompts(model, prepared, odds, shown)
  return Segmentation(model, prepared, made, refine(model, prepared, made.cuts, made.prompts))


def test_a_structure_is_refined_as_if_the_volume_ended_where_its_cut_does(scan):
  array, odds = scan
  found = segmented(model_of(1.5), array, odds)
  first, second = found.generated.cuts
  assert second.left < 0 and first.height == first.width < 45
  for organ, cut in enumerate(found.generated.cuts):
    alone = segmented(model_of(0.0), cut.of(array, -1.0), cut.of(odds[organ : organ + 1], -32.0))
    for stage in (1, 2):
      ours, theirs = found.results[stage - 1], alone.results[stage - 1]
      mine = ours.cells[:, 0] == organ
      np.testing.assert_array_equal(ours.cells[mine, 1], theirs.cells[:, 1])
      # float32 in batches of other sizes, kept as float16.
      np.testing.assert_allclose(ours.logits[mine], theirs.logits, rtol=5e-3, atol=5e-3)
      np.testing.assert_allclose(ours.boxes[mine], theirs.boxes, atol=1e-4)
      np.testing.assert_allclose(ours.iou[mine], theirs.iou, atol=1e-4)
      # What it says stands in the cut, and the generator around it.
      expected = expit(odds[organ].astype(np.float32))
      cut.put(expected, alone.probability(stage, 0))
      np.testing.assert_allclose(found.probability(stage, organ), expected, atol=2e-3)
  assert (found.results[0].logits > 0).any() and (found.results[0].logits < 0).any()


def test_cuts_hold_what_is_shown_beside_what_was_found(scan):
  array, odds = scan
  prepared, model = prepared_of(array), model_of(1.25)
  given = [GivenPrompt(0, 3, box=np.array([40, 2, 45, 9])),
           GivenPrompt(1, 0, points=((20, 30, True),))]
  shown = segmenter_lib.shown_by(given, 2, SHAPE[1:])
  assert np.argwhere(shown[0]).min(axis=0).tolist() == [2, 40]
  assert np.argwhere(shown[0]).max(axis=0).tolist() == [9, 45]
  made = first_prompts(model, prepared, odds, shown)
  found = (odds > 0).any(axis=1)
  for cut, mask in zip(made.cuts, found | shown, strict=True):
    voxels = np.argwhere(mask)
    assert cut.holds(voxels.min(axis=0), voxels.max(axis=0))
  # Nothing was found and nothing is shown: all of the slice.
  nothing = first_prompts(model, prepared, np.full_like(odds, -8.0))
  assert set(nothing.cuts) == {Cut(0, 0, *SHAPE[1:])}


def test_a_mask_by_hand_lies_in_the_cut_as_its_box_does(scan):
  array, odds = scan
  model, mask = model_of(1.5), np.zeros(SHAPE[1:], np.float32)
  mask[20:31, 24:34] = 1
  made = first_prompts(model, prepared_of(array), odds)
  given = [GivenPrompt(0, 2, mask=mask), GivenPrompt(0, 3, box=np.array([24, 20, 33, 30]))]
  prompts = with_given(made.prompts, given, made.cuts, SIDE, SIDE // 4, resize_linear)
  np.testing.assert_allclose(prompts.boxes[0, 2], prompts.boxes[0, 3], rtol=1e-6)
  seen = resize_linear(made.cuts[0].of(mask)[None], SIDE // 4)[0]
  np.testing.assert_array_equal(prompts.logits[0, 2] > 0, seen > 0.5)


def test_a_box_that_is_told_lies_where_the_mask_did(scan):
  """The first stage is prompted with the generator's mask, whose voxels are known."""
  array, odds = scan
  model = model_of(1.5, CONFIG.stages[:1])
  found = segmented(model, array, odds)
  geometry = SimpleNamespace(
    flipped=(False,) * 3, axes=(0, 1, 2), canonical_shape=SHAPE, voxel_ml=1.0)
  labels = np.zeros(SHAPE, np.uint8)
  last = SimpleNamespace(labels=labels, winning=labels.astype(np.float32))
  details = structure_details([found], [labels, labels], last, geometry)
  for organ, name in enumerate("ab"):
    cut = found.generated.cuts[organ]
    pixel = max(cut.shape) / SIDE * 4  # of the mask grid, in voxels
    margin = CONFIG.box_margin * max(cut.shape) / SIDE
    for told in details[name].boxes:
      rows, columns = np.nonzero(odds[organ, told.slice] > 0)
      expected = [rows.min() - margin, columns.min() - margin,
                  rows.max() + margin, columns.max() + margin]
      last_voxel = np.array([*SHAPE[1:], *SHAPE[1:]]) - 1
      np.testing.assert_allclose(told.box, np.clip(expected, 0, last_voxel), atol=pixel + 1)
    assert len(details[name].boxes) == (odds[organ] > 0).any(axis=(1, 2)).sum()


def test_structures_that_are_not_held_at_once_are_refined_alike(scan, monkeypatch):
  array, odds = scan
  together = segmented(model_of(1.5), array, odds)
  groups, refined = [], refine_lib._refined
  monkeypatch.setattr(refine_lib, "_HELD", 7)
  monkeypatch.setattr(refine_lib, "_refined",
                      lambda *args: groups.append(args[-1]) or refined(*args))
  apart = segmented(model_of(1.5), array, odds)
  assert [group.tolist() for group in groups] == [[0], [1]]
  for one, other in zip(together.results, apart.results, strict=True):
    order = [np.lexsort(x.cells.T[::-1]) for x in (one, other)]
    np.testing.assert_array_equal(one.cells[order[0]], other.cells[order[1]])
    np.testing.assert_allclose(one.logits[order[0]], other.logits[order[1]], rtol=5e-3, atol=5e-3)


def test_a_cut_is_turned_about_its_own_centre_with_what_lies_around_it():
  """Witness: a larger piece with the same centre, turned as a whole."""
  slices = np.random.default_rng(1).standard_normal((2, 60, 50))
  angle = np.radians(25)
  turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * 1.1
  matrix = np.eye(3)
  matrix[1:, 1:] = turn
  found = transform_slices(slices, matrix, order=1, fill=9.0, cut=Cut(20, 14, 16, 20))
  around = transform_slices(slices[:, 6:50, 0:48], matrix, order=1, fill=9.0)
  np.testing.assert_allclose(found, around[:, 14:30, 14:34], atol=1e-12)
  mirrored = np.diag([1.0, -1.0, 1.0])
  np.testing.assert_array_equal(
    transform_slices(slices, mirrored, order=0, fill=9.0, cut=Cut(-2, 14, 16, 20))[:, -2:], 9.0)


def test_a_zoom_that_cannot_be_is_refused(tmp_path):
  config = tmp_path / "config.yaml"
  config.write_text("refinement: {zoom: 0.5}\n")
  with pytest.raises(UserError, match="zoom is 0.5, less than the structure"):
    load_config(config)
  config.write_text("refinement: {zoom: 2}\nrefiner: {structures: 2}\n")
  with pytest.raises(UserError, match="a cut shows one structure; set it to 1"):
    load_config(config)
