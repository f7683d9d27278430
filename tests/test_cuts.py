"""Cuts around prompts: their geometry, and that a cut is tracked as if the volume ended there."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_sam2 import SMALL, drawn

from rfmedsam2_jax import VoxelPrompt
from rfmedsam2_jax.data.cuts import Cut, around, around_points, whole
from rfmedsam2_jax.data.sam_slices import resize_linear
from rfmedsam2_jax.data.volumes import Volume
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.prompted.first_cut import first_cut
from rfmedsam2_jax.prompted.slice_frame import SliceFrame
from rfmedsam2_jax.prompted.tracked import PromptedVolume

SHAPE = (6, 40, 30)


def volume(array, spacing=(4.0, 1.0, 1.0)):
  geometry = SimpleNamespace(path=Path("scan.nii.gz"))
  return Volume(np.asarray(array, np.float32)[None], spacing, geometry)


@pytest.fixture(scope="module")
def scan():
  array = np.random.default_rng(0).normal(0, 20, SHAPE).astype(np.float32)
  array[1:5, 12:20, 8:15] += 200
  return volume(array)


@pytest.mark.parametrize("cut", [Cut(3, 5, 7, 6), Cut(-2, -3, 9, 8), Cut(35, 26, 10, 10),
                                 Cut(-5, -5, 60, 60)])
def test_what_is_cut_out_is_put_back_where_it_was(cut):
  slices = np.random.default_rng(1).normal(size=SHAPE)
  seen = cut.of(slices, fill=7.0)
  assert seen.shape == (6, cut.height, cut.width)
  rows, columns = np.mgrid[: cut.height, : cut.width]
  rows, columns = rows + cut.top, columns + cut.left
  inside = (rows >= 0) & (rows < 40) & (columns >= 0) & (columns < 30)
  np.testing.assert_array_equal(seen[:, inside], slices[:, rows[inside], columns[inside]])
  assert (seen[:, ~inside] == 7).all()
  back = np.zeros(SHAPE)
  cut.put(back, seen)
  expected = np.zeros(SHAPE)
  expected[:, rows[inside], columns[inside]] = slices[:, rows[inside], columns[inside]]
  np.testing.assert_array_equal(back, expected)


def test_a_cut_is_a_square_of_millimetres_around_what_is_prompted():
  low, high = np.array([10, 20]), np.array([13, 27])  # 4 x 8 voxels, 12 x 8 mm
  cut = around(low, high, 2.0, np.array([3.0, 1.0]), (64, 64))
  assert cut.shape == (8, 24) and cut.holds(low, high)
  assert (cut.top + cut.height / 2, cut.left + cut.width / 2) == (12, 24)
  assert not cut.holds(low, np.array([13, cut.left + cut.width]))
  larger = cut.grown(np.array([3.0, 1.0]), (64, 64))
  assert larger.shape == (12, 36) and abs(larger.left + larger.width / 2 - 24) <= 0.5
  # Never more than the slice, nor a few pixels of it.
  assert around(low, high, 9.0, np.array([1.0, 1.0]), (64, 64)) == whole((64, 64))
  assert min(around(low, low, 1.0, np.array([1.0, 1.0]), (64, 64)).shape) == 8
  assert around_points(0.5, low, low, np.array([1.0, 2.0]), (64, 50)).shape == (32, 16)


def test_only_borders_beyond_which_the_slice_goes_on_are_touched():
  for border, cut in (((0, 2), Cut(5, 5, 8, 8)), ((7, 2), Cut(5, 5, 8, 8)),
                      ((2, 0), Cut(5, 5, 8, 8)), ((2, 7), Cut(5, 5, 8, 8))):
    mask = np.zeros((2, 8, 8), bool)
    mask[1][border] = True
    assert cut.touched_by(mask, (40, 30))
    edges = {(0, 2): Cut(0, 5, 8, 8), (7, 2): Cut(32, 5, 8, 8), (2, 0): Cut(5, 0, 8, 8),
             (2, 7): Cut(5, 22, 8, 8)}
    assert not edges[border].touched_by(mask, (40, 30))
  inside = np.zeros((8, 8), bool)
  inside[1:7, 1:7] = True
  assert not Cut(5, 5, 8, 8).touched_by(inside, (40, 30))


def test_a_voxel_lies_where_the_network_sees_it():
  """Points, box and mask of one voxel, against the place of its light in the square."""
  side, cut = 64, Cut(8, 4, 16, 20)
  array = np.zeros(SHAPE)
  array[2, 15, 10] = 1
  frame = SliceFrame(volume(array), "axial", side, cut)
  seen = resize_linear(cut.of(array), side)[2]
  y, x = (np.average(np.arange(side), weights=seen.sum(axis=a)) for a in (1, 0))
  mask = np.zeros(SHAPE, bool)
  mask[2, 15, 10] = True
  given = [VoxelPrompt(1, points=((2, 15, 10, True),)), VoxelPrompt(2, ((2, 15, 10), (2, 15, 10))),
           VoxelPrompt(3, mask=mask)]
  point, box, drawn_mask = frame.rounds(given)[1][0]
  # A point is scaled alone: the first pixel of its voxel, as in SAM 2.
  middle = point.points[0] + (np.array([64 / 20, 64 / 16]) - 1) / 2
  np.testing.assert_allclose(middle, [x, y], atol=0.05)
  centre = (box.box[0] + box.box[2]) / 2, (box.box[1] + box.box[3]) / 2
  np.testing.assert_allclose(centre, [x, y], atol=0.05)
  for prompt in given:
    np.testing.assert_array_equal(frame.bounds([prompt]), [[15, 10], [15, 10]])
  rows, columns = np.nonzero(drawn_mask.mask)
  np.testing.assert_allclose([columns.mean(), rows.mean()], [x, y], atol=0.5)


def prompted(scan, **options):
  return PromptedVolume(SAM2(SMALL), drawn(), scan, window=(100, 400), **options)


def test_a_cut_is_tracked_as_if_the_volume_ended_there(scan, monkeypatch):
  monkeypatch.setattr(PromptedVolume, "_touched", lambda *_: False)
  first = VoxelPrompt(3, box=((2, 12, 8), (2, 19, 14)))
  later = VoxelPrompt(3, points=((4, 14, 10, True), (4, 10, 7, False)), round=1)
  found = prompted(scan, zoom=2.0).track([first, later])
  (part,) = found.parts
  cut = part.cut
  assert cut == Cut(8, 4, 16, 16) and part.members == (0,)
  end = volume(scan.array[0][:, 8:24, 4:20])
  move = lambda p: (p[0], p[1] - 8, p[2] - 4, *p[3:])  # noqa: E731
  there = [dataclasses.replace(first, box=tuple(map(move, first.box))),
           dataclasses.replace(later, points=tuple(map(move, later.points)))]
  alone = prompted(end, zoom=0).track(there)
  np.testing.assert_array_equal(cut.of(found.labels), alone.labels)
  assert (found.labels > 0).sum() == (alone.labels > 0).sum() > 0
  np.testing.assert_array_equal(found.presence, alone.presence)
  assert found.prompted == alone.prompted == {(0, 2), (0, 4)}


def test_structures_in_cuts_of_their_own_share_the_voxels(scan, monkeypatch):
  """Each is followed as if it were alone, and the larger logit decides."""
  monkeypatch.setattr(PromptedVolume, "_touched", lambda *_: False)
  boxes = [VoxelPrompt(3, box=((2, 12, 8), (2, 19, 14))),
           VoxelPrompt(9, box=((3, 14, 10), (3, 24, 18)))]
  arrived, ours = {}, prompted(scan, zoom=2.0)
  found = ours.track(boxes, lambda z, labels: arrived.update({z: labels.copy()}))
  assert [part.members for part in found.parts] == [(0,), (1,)]
  np.testing.assert_array_equal(np.stack([arrived[z] for z in range(6)]), found.labels)
  alone = [prompted(scan, zoom=2.0).track([box]) for box in boxes]
  for k, one in enumerate(alone):
    np.testing.assert_array_equal(found.presence[k], one.presence[0])
  covered = [one.labels > 0 for one in alone]
  assert ((found.labels > 0) == (covered[0] | covered[1])).all()
  for value, mine, other in ((3, *covered), (9, *covered[::-1])):
    assert (found.labels[mine & ~other] == value).all()


def test_a_mask_that_touches_the_border_has_its_cut_taken_larger_once(scan, monkeypatch):
  looked = []
  monkeypatch.setattr(
    PromptedVolume, "_touched", lambda self, cut, tracks: not looked.append(cut))
  box = VoxelPrompt(3, box=((2, 12, 8), (2, 19, 14)))
  found = prompted(scan, zoom=2.0).track([box])
  assert looked == [Cut(8, 4, 16, 16)] and found.parts[0].cut == Cut(4, 0, 24, 24)


def test_a_correction_beyond_the_cut_begins_anew_around_all_prompts(scan, monkeypatch):
  monkeypatch.setattr(PromptedVolume, "_touched", lambda *_: False)
  box = VoxelPrompt(3, box=((2, 12, 8), (2, 19, 14)))
  far = VoxelPrompt(3, points=((4, 30, 25, False),), round=1)
  ours = prompted(scan, zoom=2.0)
  after = ours.correct(ours.track([box]), [far])
  whole_way = prompted(scan, zoom=2.0).track([box, far])
  np.testing.assert_array_equal(after.labels, whole_way.labels)
  assert after.parts[0].cut.holds(np.array([12, 8]), np.array([30, 25]))


def test_points_alone_look_for_the_size_of_what_they_mean():
  """In four first cuts, twice in each; what most of them find alike is the structure."""
  frame = SliceFrame(volume(np.zeros((3, 80, 60))), "axial", 64)
  inside = VoxelPrompt(3, points=((2, 15, 11, True),))
  looked = []

  def look(cut):
    """The largest cuts show a body, all others the structure that is in it, or a part of it."""
    looked.append(cut)
    found = np.zeros((1, *frame.shape), bool)
    found[:, 13:18, 9:14] = True
    if len(looked) == 1:
      found[:, 5:30, 3:20] = True
    elif len(looked) == 2:
      found[:, 2:50, 2:50] = True
    return cut.of(found)

  cut = first_cut([inside], frame, 2.0, look)
  assert cut == around(np.array([13, 9]), np.array([17, 13]), 2.0, frame.spacing, frame.shape)
  assert len(looked) == 8 and len({cut.width for cut in looked[::2]}) == 4
  # Nothing to be seen: around the points.
  nothing = first_cut([inside], frame, 2.0, lambda cut: np.zeros((1, *cut.shape), bool))
  assert nothing.holds(np.array([15, 11]), np.array([15, 11])) and nothing == looked[0]


def test_networks_that_were_trained_on_cuts_zoom_unless_told_otherwise(scan):
  other = dataclasses.replace(SMALL, drawn_prompts=True)
  box = VoxelPrompt(3, box=((2, 12, 8), (2, 19, 14)))
  assert PromptedVolume(SAM2(SMALL), drawn(), scan)._zoom == 0
  assert PromptedVolume(SAM2(other), drawn(), scan)._zoom == 2
  found = PromptedVolume(SAM2(other), drawn(other), scan, zoom=0).track([box])
  assert found.parts[0].cut == whole((40, 30))
