"""A box that a person gives in voxels: on SAM's square, and read again in CASE.json."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from tests_data import reoriented

from rfmedsam2_jax.cli.prompt_options import parse_box
from rfmedsam2_jax.data.cuts import Cut, whole
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.preprocessing import Restore
from rfmedsam2_jax.data.prompt_entries import PromptEntry
from rfmedsam2_jax.data.sam_slices import resize_linear
from rfmedsam2_jax.data.volumes import load_image
from rfmedsam2_jax.prompted.slice_frame import SliceFrame, read_prompts
from rfmedsam2_jax.refinement import Fused, StageResult
from rfmedsam2_jax.refinement.first_prompts import generated, with_given
from rfmedsam2_jax.segmentation.given_prompts import prompts_by_hand
from rfmedsam2_jax.segmentation.structures import structure_details

SHAPE = (35, 20, 5)  # x, y, z
AFFINE = np.array([[1.7, 0, 0, -20], [0, 2.5, 0, 15], [0, 0, 4.0, 7], [0, 0, 0, 1]])
ORDERS = [((0, 1, 2), (1, 1, 1)), ((2, 0, 1), (-1, 1, -1)), ((1, 2, 0), (1, -1, 1))]
# First and last voxel along x and y: in the middle, all of the slice, one voxel at its far end.
BOXES = [(19, 4, 28, 13), (0, 0, 34, 19), (34, 19, 34, 19)]


@pytest.fixture
def volume_of(tmp_path):
  def volume(orientation):
    image = nib.Nifti1Image(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), AFFINE)
    nib.save(reoriented(image, orientation), tmp_path / "scan.nii.gz")
    return load_image(tmp_path / "scan.nii.gz")

  return volume


def in_the_file(geometry, x, y, z):
  """Voxel of the file at a voxel of the scan before it was turned."""
  return np.rint(np.linalg.inv(geometry.affine) @ AFFINE @ [x, y, z, 1])[:3].astype(int)


@pytest.mark.parametrize("side", [192, 5])  # more and less than a pixel per voxel
@pytest.mark.parametrize("orientation", ORDERS)
def test_tracking_sees_all_voxels_of_a_box_however_it_is_said(
  volume_of, tmp_path, side, orientation
):
  volume = volume_of(orientation)
  geometry, frame = volume.geometry, SliceFrame(volume, "axial", side)
  for x0, y0, x1, y1 in BOXES:
    corners = [in_the_file(geometry, x, y, 2) for x, y in ((x0, y0), (x1, y1))]
    named = [dict(zip("zyx", row[list(geometry.axes)].tolist(), strict=True)) for row in corners]
    first, last = ([row[name] for name in "xy"] for row in named)
    by_voxel = parse_box(f"1:{named[0]['z']},{first[0]},{first[1]},{last[0]},{last[1]}", geometry)
    # Millimetres anywhere in a voxel are that voxel.
    (wx0, wy0, wz), (wx1, wy1, _) = ((AFFINE @ [x + 0.3, y - 0.4, 2, 1])[:3]
                                     for x, y in ((x0, y0), (x1, y1)))
    by_world = parse_box(f"1:{wz},{wx0},{wy0},{wx1},{wy1}", geometry, world=True)
    path = tmp_path / "prompts.json"
    path.write_text(f'[{{"label": 1, "box": [{corners[0].tolist()}, {corners[1].tolist()}]}}]')
    (by_json,) = read_prompts(path, geometry)
    # LPS: the scan's x and y run the other way.
    width, height, _ = SHAPE
    low, high = np.array([width - 1 - x1, height - 1 - y1]), np.array([width - x0, height - y0])
    scale = side / np.array([width, height])
    expected = [*low * scale, *np.maximum(low * scale, high * scale - 1)]
    for prompt in (by_voxel, by_world, by_json):
      _, ((placed,),) = frame.rounds([prompt])
      np.testing.assert_allclose(placed.box, expected, rtol=1e-6)


@pytest.mark.parametrize("orientation", ORDERS)
@pytest.mark.parametrize("prepared_shape, side", [((5, 20, 35), 192), ((3, 31, 18), 192),
                                                  ((7, 11, 52), 64)])
@pytest.mark.parametrize("cut", [None, Cut(-3, 1, 40, 60)])
def test_a_given_box_is_the_same_box_in_the_details(
  volume_of, orientation, prepared_shape, side, cut
):
  """From voxels of the file to the plan's grid, to SAM's square or that of a cut, and back."""
  volume = volume_of(orientation)
  geometry, native = volume.geometry, volume.array.shape[1:]
  restore = Restore(native, volume.spacing, (0, 0, 0), native, (0, 1, 2), prepared_shape)
  labels = Labels((Structure("liver", (1,)),), False, (1,))
  segmenter = SimpleNamespace(
    plan=SimpleNamespace(labels=labels, slice_axis=0),
    sam2=SimpleNamespace(config=SimpleNamespace(image_size=side)))
  prepared = SimpleNamespace(restore=restore)
  cuts = [cut or whole(prepared_shape[1:])]
  nothing = generated(np.full((1, prepared_shape[0], 4, 4), -8, np.float16), side, 0.0)
  for x0, y0, x1, y1 in BOXES:
    corners = np.array([in_the_file(geometry, x, y, 2) for x, y in ((x0, y0), (x1, y1))], float)
    entry = PromptEntry("liver", corners, np.zeros((0, 3)), (), 0, "given.json")
    (given,) = prompts_by_hand(labels, geometry, [entry], None)(prepared)
    # The same edges as shares of the image, whatever grid lies between.
    width, height, _ = SHAPE
    scale = side / np.array([width, height])
    low, high = np.array([width - 1 - x1, height - 1 - y1]), np.array([width - x0, height - y0])
    prompts = with_given(nothing, [given], cuts, side, 4, resize_linear)
    if cut is None:
      placed = prompts.boxes[0, given.slice]
      np.testing.assert_allclose(placed, [*low * scale, *high * scale - 1], rtol=1e-6)
    ones = np.ones(1, np.float32)
    result = StageResult(
      np.array([[0, given.slice]]), np.ones((1, 4, 4), np.float16), ones, ones,
      prompts.boxes[:, given.slice], np.ones(1, bool), np.ones(1, np.int32))
    found = SimpleNamespace(segmenter=segmenter, prepared=prepared, results=[result],
                            generated=SimpleNamespace(cuts=cuts))
    empty = np.zeros(native, np.uint8)
    details = structure_details([found], [empty, empty], Fused(empty, empty), geometry)
    along = geometry.axes[0]
    low, high = corners.min(axis=0), corners.max(axis=0)
    (box,) = (b.box for b in details["liver"].boxes if b.slice == low[along])
    assert box == (*np.delete(low, along), *np.delete(high, along))
