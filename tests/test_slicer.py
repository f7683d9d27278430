"""The module of 3D Slicer with a stand-in for Slicer, a real server, and SimpleITK for places."""

import ast
import shutil
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="pip install 'rfmedsam2-jax[serve]'")
sitk = pytest.importorskip("SimpleITK")

from api_server import KEY, make_pages, served  # noqa: E402
from slicer_stand_in import ROI, Markups, ScalarVolume, loaded  # noqa: E402

ROOT = Path(__file__).parents[1]
MODULE = ROOT / "integrations" / "slicer" / "RFMedSAM2.py"
TO_RAS = np.diag([-1.0, -1.0, 1.0])  # of LPS, SimpleITK's
COS, SIN = np.cos(0.3), np.sin(0.3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return tmp_path_factory.mktemp("slicer")


@pytest.fixture(scope="module")
def pages(place):
  return make_pages(place)


@pytest.fixture(scope="module")
def address(pages):
  with served(pages) as address:
    yield address


@pytest.fixture
def module(monkeypatch):
  return loaded(MODULE, monkeypatch)


@pytest.fixture
def image():
  """An oblique CT whose brighter box is its only structure."""
  array = np.random.default_rng(0).normal(0, 30, (11, 26, 30)).astype(np.int16)
  array[2:9, 6:14, 4:12] += 200
  image = sitk.GetImageFromArray(array)
  image.SetSpacing((2.0, 2.5, 4.0))
  image.SetOrigin((-30.0, 12.0, 55.0))
  image.SetDirection((COS, -SIN, 0, SIN, COS, 0, 0, 0, 1))
  return image


def ras_of(image, ijk):
  """Where SimpleITK says that voxels lie, [n, 3], in RAS+."""
  return np.array([image.TransformContinuousIndexToPhysicalPoint([float(x) for x in voxel])
                   for voxel in ijk]) @ TO_RAS


def volume_of(image):
  """The node that Slicer makes of an image: its matrix is in RAS+."""
  corner, *ends = ras_of(image, [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
  matrix = np.eye(4)
  matrix[:3, :3] = (np.array(ends) - corner).T
  matrix[:3, 3] = corner
  return ScalarVolume(sitk.GetArrayFromImage(image), matrix)


@pytest.fixture
def logic(module, address):
  logic = module.RFMedSAM2Logic()
  logic.connect(address, KEY)
  return logic


def test_a_volume_arrives_where_it_lies_and_is_sent_once(logic, pages, image, tmp_path):
  volume = volume_of(image)
  middle = Markups(ras_of(image, [(8, 10, 5)]))
  node = logic.track(volume, 1, inside=middle)
  (opened,) = list(pages.studio._volumes.values())[-1:]
  np.testing.assert_array_equal(opened.volume.geometry.shape, (30, 26, 11))
  voxels = np.array([(0, 0, 0), (29, 0, 0), (3, 25, 10)])
  here = nib.affines.apply_affine(opened.volume.geometry.affine_mm, voxels)
  np.testing.assert_allclose(here, ras_of(image, voxels), atol=1e-3)
  # The same voxels, as SimpleITK reads the file that was sent.
  (tmp_path / "sent.nii.gz").write_bytes(logic._client.nifti_bytes(
    sitk.GetArrayFromImage(image).transpose(2, 1, 0), volume.matrix))
  sent = sitk.ReadImage(str(tmp_path / "sent.nii.gz"))
  np.testing.assert_array_equal(sitk.GetArrayFromImage(sent), sitk.GetArrayFromImage(image))
  np.testing.assert_allclose(ras_of(sent, voxels), ras_of(image, voxels), atol=1e-3)

  logic.track(volume, 1, inside=middle, segmentation=node)
  assert list(pages.studio._volumes.values())[-1] is opened
  volume.changed += 1
  logic.track(volume, 1, inside=middle, segmentation=node)
  assert list(pages.studio._volumes.values())[-1] is not opened


def test_a_box_of_an_roi_is_that_of_its_voxels_and_the_result_lies_there(
  module, logic, pages, image
):
  volume = volume_of(image)
  centre = ras_of(image, [(7.5, 9.5, 5.2)])[0]
  # Sides of an ROI turned like the volume: 8 x 8 x 7 voxels.
  turn = volume.matrix[:3, :3] / np.linalg.norm(volume.matrix[:3, :3], axis=0)
  roi = ROI(centre, (8 * 2.0, 8 * 2.5, 7 * 4.0), turn)
  asked = []
  with mock.patch.object(module.RFMedSAM2Logic, "_opened", lambda *a: mock.MagicMock(
      track=lambda prompts, progress: asked.extend(prompts), labels=lambda: mock.DEFAULT)):
    with mock.patch.object(module.RFMedSAM2Logic, "_put"):
      logic.track(volume, 3, boxes=[roi])
  assert asked == [{"label": 3, "round": 0, "box": [[4, 6, 5], [11, 13, 5]]}]

  stroke = Markups(ras_of(image, [(6, 8, 5), (10, 12, 5)]))
  outside = Markups(ras_of(image, [(20, 20, 5)]))
  node = logic.track(volume, 3, boxes=[roi], outside=outside, lines=[stroke], name="spleen")
  opened = list(pages.studio._volumes.values())[-1]
  found = opened.volume.geometry.to_native(opened.labels) == 3
  assert found.any()
  ours = node.ras_of("RFMedSAM2_3")
  theirs = ras_of(image, np.argwhere(found))
  np.testing.assert_allclose(sorted(map(tuple, ours.round(3))), sorted(map(tuple, theirs.round(3))),
                             atol=2e-3)
  assert node.reference is volume and node.segmentation.GetSegment("RFMedSAM2_3").name == "spleen"


def test_structures_of_a_model_become_segments_by_name(module, logic, image):
  volume = volume_of(image)
  array = np.zeros((30, 26, 11), np.uint8)
  array[4:12, 6:14, 2:9], array[20:22, 3:5, 7] = 1, 5
  labels = logic._client.Labels(array, volume.matrix, (2.0, 2.5, 4.0), {1: "liver", 5: "spleen"})
  opened = mock.MagicMock(labels=lambda: labels)
  with mock.patch.object(module.RFMedSAM2Logic, "_opened", lambda *arguments: opened):
    node = logic.segment(volume, "abdomen")
  assert opened.segment.call_args.args == ("abdomen",)
  for label, name in labels.names.items():
    assert node.segmentation.GetSegment(f"RFMedSAM2_{label}").name == name
    theirs = ras_of(image, np.argwhere(array == label))
    np.testing.assert_allclose(np.sort(node.ras_of(f"RFMedSAM2_{label}"), 0), np.sort(theirs, 0),
                               atol=1e-3)


def test_what_cannot_be_placed_is_said(logic, image):
  volume = volume_of(image)
  with pytest.raises(ValueError, match="no prompt"):
    logic.track(volume, 1)
  volume.transform = object()
  with pytest.raises(ValueError, match="harden"):
    logic.track(volume, 1, inside=Markups(ras_of(image, [(8, 10, 5)])))


@pytest.mark.parametrize("plane, axis", [("axial", 2), ("coronal", 1), ("sagittal", 0)])
def test_slices_of_a_plane_follow_the_axis_that_the_server_takes(module, image, plane, axis):
  order = [2, 0, 1]
  matrix = volume_of(image).matrix[:, [*order, 3]]
  assert order[module.slice_axis(matrix, module.PLANES[plane])] == axis


def test_the_window_connects_tracks_and_says_what_is_wrong(module, address, image, monkeypatch):
  monkeypatch.setenv("RFMEDSAM2_KEY", KEY)
  widget = module.RFMedSAM2Widget()
  widget.setup()
  widget._address.text = address
  widget.onConnect()
  assert widget._status.text == "connected: small"
  volume = volume_of(image)
  widget._volume.currentNode.return_value = None
  widget.onTrack()
  module.slicer.util.errorDisplay.assert_called_once_with("no volume; choose one")
  for selector in (widget._roi, widget._outside, widget._curve, widget._segmentation):
    selector.currentNode.return_value = None
  widget._volume.currentNode.return_value = volume
  widget._inside.currentNode.return_value = Markups(ras_of(image, [(8, 10, 5)]))
  widget._label.value, widget._name.text = 2, "liver"
  widget._plane.currentText, widget._window.currentText = "axial", "percentiles"
  module.slicer.app.processEvents.side_effect = widget.onCancel
  widget.onTrack()
  assert widget._status.text == "cancelled"
  module.slicer.app.processEvents.side_effect = None
  widget.onTrack()
  assert widget._status.text == "tracked"
  (node,), _ = widget._segmentation.setCurrentNode.call_args
  assert node.segmentation.GetSegment("RFMedSAM2_2").name == "liver"


def test_the_client_is_found_in_a_clone_and_beside_the_module(module, tmp_path, monkeypatch):
  assert Path(module.load_client().__file__) == ROOT / "rfmedsam2_jax" / "client.py"
  alone = tmp_path / "modules" / "RFMedSAM2.py"
  (alone.parent / "RFMedSAM2Lib").mkdir(parents=True)
  shutil.copy(MODULE, alone)
  elsewhere = loaded(alone, monkeypatch)
  with pytest.raises(ImportError, match="copy rfmedsam2_jax/client.py"):
    elsewhere.load_client()
  shutil.copy(ROOT / "rfmedsam2_jax" / "client.py", alone.parent / "RFMedSAM2Lib")
  assert Path(elsewhere.load_client().__file__).parent.name == "RFMedSAM2Lib"


def test_slicers_python_can_read_both_files():
  for path in (MODULE, ROOT / "rfmedsam2_jax" / "client.py"):
    ast.parse(path.read_text("utf-8"), feature_version=(3, 9))
