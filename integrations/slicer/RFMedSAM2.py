"""A module of 3D Slicer: segments a volume on a server of `rfmedsam2 serve`, by prompts or a model.

Boxes are ROIs, points and lines are markups. It needs the server and nothing in Slicer's Python but
the one file of the client, rfmedsam2_jax/client.py, which it finds in a clone of the project or in
RFMedSAM2Lib/ beside this file. To add it: Edit, Application Settings, Modules, Additional module
paths, the folder of this file. docs/slicer.md has more.

Places in Slicer's nodes are millimetres in RAS+, as matrices of its volumes and of NIfTI give them.
"""

import importlib.util
import os
import sys
from pathlib import Path

import ctk
import numpy as np
import qt
import slicer
import vtk
from slicer.ScriptedLoadableModule import (
  ScriptedLoadableModule,
  ScriptedLoadableModuleLogic,
  ScriptedLoadableModuleWidget,
)

# The row of a volume's matrix along which the slices of a plane follow each other.
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}
WINDOWS = ("percentiles", "soft-tissue", "liver", "lung", "bone", "brain")


def load_client():
  """The client's module, by its file: the package around it need not be installed."""
  here = Path(__file__).resolve().parent
  places = (here / "RFMedSAM2Lib" / "client.py",
            here.parent.parent / "rfmedsam2_jax" / "client.py")
  for place in places:
    if place.is_file():
      spec = importlib.util.spec_from_file_location("rfmedsam2_client", place)
      module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(module)
      return module
  raise ImportError(f"no client.py in {places[0].parent}; copy rfmedsam2_jax/client.py there")


class RFMedSAM2(ScriptedLoadableModule):
  def __init__(self, parent):
    ScriptedLoadableModule.__init__(self, parent)
    parent.title = "RFMedSAM2"
    parent.categories = ["Segmentation"]
    parent.dependencies = ["Segmentations", "Markups"]
    parent.contributors = ["The authors of rfmedsam2-jax"]
    parent.helpText = ("Draw an ROI around a structure, or set points and lines; press Track. For "
                       "research. No medical device.")


class RFMedSAM2Logic(ScriptedLoadableModuleLogic):
  """What the module does, without its window.

  Args:
    progress: called with a text while the server computes; what it raises cancels the job.
  """

  def __init__(self, progress=lambda text: None):
    ScriptedLoadableModuleLogic.__init__(self)
    self._client = load_client()
    self._progress = progress
    self._open = None  # the volume on the server, and what it was opened with

  def connect(self, address, key):
    """The server's description; ServerError if there is none."""
    self._server = self._client.Client(address, key or None)
    self._open = None
    return self._server.server()

  def track(self, volume, label, boxes=(), inside=None, outside=None, lines=(), plane="axial",
            window="percentiles", segmentation=None, name=""):
    """Follows one structure and puts it into a segmentation node, which is returned.

    Args:
      volume: a scalar volume node.
      label: of the structure, from 1 to 255.
      boxes: ROI nodes; each is a box on the slice in its middle.
      inside, outside: nodes of control points. lines: curve nodes, inside of the structure.
      name: of the segment.
    """
    affine = matrix_of(volume)
    prompts = [self._box(label, roi, affine, PLANES[plane]) for roi in boxes]
    for node, here in ((inside, True), (outside, False)):
      for place in [] if node is None else voxels_of(control_points(node), affine):
        given = {"inside" if here else "outside": [place]}
        prompts.append(self._client.points(label, **given))
    prompts += [self._client.line(label, voxels_of(control_points(curve), affine))
                for curve in lines]
    if not prompts:
      raise ValueError("no prompt; draw an ROI or set a point first")
    opened = self._opened(volume, affine, plane, window)
    opened.track(prompts, progress=self._told)
    return self._put(opened.labels(), {label: name or f"label {label}"}, volume, affine,
                     segmentation)

  def segment(self, volume, model=None, segmentation=None):
    """Lets a model of the server segment a volume; all its structures become segments."""
    affine = matrix_of(volume)
    opened = self._opened(volume, affine, "axial", "percentiles")
    opened.segment(model, progress=self._told)
    labels = opened.labels()
    return self._put(labels, labels.names, volume, affine, segmentation)

  def _opened(self, volume, affine, plane, window):
    """The volume on the server; sent again only if something about it has changed."""
    known = (volume.GetID(), volume.GetImageData().GetMTime(), affine.tobytes(), plane, window)
    if self._open is None or self._open[0] != known:
      if self._open is not None:
        self._close()
      self._progress("sending the volume")
      voxels = slicer.util.arrayFromVolume(volume)  # [k, j, i]
      if voxels.ndim != 3:
        raise ValueError(f"{volume.GetName()}: is no volume of one channel; choose another")
      sent = self._server.upload_array(voxels.transpose(2, 1, 0), affine, "slicer", plane, window)
      self._open = known, sent
    return self._open[1]

  def _close(self):
    opened, self._open = self._open[1], None
    try:
      opened.close()
    except self._client.ServerError:
      pass  # it has forgotten the volume by itself

  def _box(self, label, roi, affine, row):
    """The box of an ROI on the slice through its middle: voxels whose middles lie in it."""
    size, turn = np.array(roi.GetSize()), elements_of(roi.GetObjectToWorldMatrix())
    signs = np.array(np.meshgrid(*[(-0.5, 0.5)] * 3)).reshape(3, -1).T
    corners = signs * size @ turn[:3, :3].T + turn[:3, 3]
    ends = voxels_of(corners, affine)
    low, high = np.ceil(ends.min(0) - 1e-6), np.floor(ends.max(0) + 1e-6)
    middle = np.rint(voxels_of(turn[None, :3, 3], affine)[0])
    low, high = np.where(low > high, middle, low), np.where(low > high, middle, high)
    across = slice_axis(affine, row)
    low[across] = high[across] = middle[across]
    return self._client.box(label, low, high)

  def _told(self, job):
    done = f"slice {job['done']} of {job['total']}" if job["total"] else job["state"]
    self._progress(job["message"] or done)

  def _put(self, labels, names, volume, affine, node):
    """Segments of a label map on the grid of the volume, in a new node or the given one."""
    if not np.allclose(labels.affine, affine, atol=1e-3):
      raise ValueError("the label map lies elsewhere than the volume; send the volume again")
    if node is None:
      node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "RFMedSAM2")
      node.CreateDefaultDisplayNodes()
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    segments = node.GetSegmentation()
    for label, name in names.items():
      place = f"RFMedSAM2_{label}"
      if segments.GetSegment(place) is None:
        segments.AddEmptySegment(place, name)
      else:
        segments.GetSegment(place).SetName(name)
      mask = np.ascontiguousarray((labels.array == label).transpose(2, 1, 0)).astype(np.uint8)
      slicer.util.updateSegmentBinaryLabelmapFromArray(mask, node, place, volume)
    return node


def elements_of(matrix):
  """A vtkMatrix4x4 as an array [4, 4]."""
  return np.array([[matrix.GetElement(r, c) for c in range(4)] for r in range(4)])


def matrix_of(volume):
  """From (i, j, k, 1) of a volume to RAS+, [4, 4]; ValueError for a volume under a transform."""
  if volume.GetParentTransformNode() is not None:
    raise ValueError(f"{volume.GetName()}: is moved by a transform; harden it first")
  matrix = vtk.vtkMatrix4x4()
  volume.GetIJKToRASMatrix(matrix)
  return elements_of(matrix)


def control_points(markups):
  """RAS+ of a node's points, [n, 3]."""
  return np.array(slicer.util.arrayFromMarkupsControlPoints(markups, world=True)).reshape(-1, 3)


def voxels_of(places, affine):
  """RAS+ [n, 3] as voxels (i, j, k) of a volume."""
  inverse = np.linalg.inv(affine)
  return places @ inverse[:3, :3].T + inverse[:3, 3]


def slice_axis(affine, row):
  """Which of i, j, k runs most along a row of RAS+."""
  return int(np.abs(affine[row, :3] / np.linalg.norm(affine[:3, :3], axis=0)).argmax())


class RFMedSAM2Widget(ScriptedLoadableModuleWidget):
  def setup(self):
    ScriptedLoadableModuleWidget.setup(self)
    self._stopped = False
    self.logic = RFMedSAM2Logic(self._show)
    self._address = qt.QLineEdit("http://127.0.0.1:8765")
    self._key = qt.QLineEdit(os.environ.get("RFMEDSAM2_KEY", ""))
    self._key.echoMode = qt.QLineEdit.Password
    form = self._section("Server")
    form.addRow("Address", self._address)
    form.addRow("Key", self._key)
    form.addRow(self._button("Connect", self.onConnect))

    form = self._section("Prompts")
    self._volume = self._selector("vtkMRMLScalarVolumeNode", False)
    self._roi = self._selector("vtkMRMLMarkupsROINode", True)
    self._inside = self._selector("vtkMRMLMarkupsFiducialNode", True)
    self._outside = self._selector("vtkMRMLMarkupsFiducialNode", True)
    self._curve = self._selector("vtkMRMLMarkupsCurveNode", True)
    self._segmentation = self._selector("vtkMRMLSegmentationNode", True)
    self._label, self._name = qt.QSpinBox(), qt.QLineEdit()
    self._label.minimum, self._label.maximum = 1, 255
    self._plane, self._window = qt.QComboBox(), qt.QComboBox()
    self._plane.addItems(list(PLANES))
    self._window.addItems(list(WINDOWS))
    for what, widget in (
      ("Volume", self._volume), ("Box", self._roi), ("Points inside", self._inside),
      ("Points outside", self._outside), ("Line inside", self._curve), ("Label", self._label),
      ("Name", self._name), ("Plane", self._plane), ("Window", self._window),
      ("Segmentation", self._segmentation),
    ):
      form.addRow(what, widget)
    form.addRow(self._button("Track", self.onTrack))

    form = self._section("Without prompts")
    self._model = qt.QComboBox()
    form.addRow("Model", self._model)
    form.addRow(self._button("Segment", self.onSegment))
    self._status = qt.QLabel("")
    self.layout.addWidget(self._status)
    self.layout.addWidget(self._button("Cancel", self.onCancel))
    self.layout.addStretch(1)

  def onConnect(self):
    self._attempt(self._connect)

  def onTrack(self):
    self._attempt(self._track)

  def onSegment(self):
    self._attempt(self._segment)

  def onCancel(self):
    self._stopped = True

  def _connect(self):
    told = self.logic.connect(self._address.text, self._key.text)
    self._model.clear()
    self._model.addItems([model["name"] for model in told["models"]])
    return f"connected: {told['checkpoint']}"

  def _track(self):
    roi, curve = self._roi.currentNode(), self._curve.currentNode()
    node = self.logic.track(
      self._chosen(), self._label.value, [roi] if roi else [], self._inside.currentNode(),
      self._outside.currentNode(), [curve] if curve else [], self._plane.currentText,
      self._window.currentText, self._segmentation.currentNode(), self._name.text)
    self._segmentation.setCurrentNode(node)
    return "tracked"

  def _segment(self):
    node = self.logic.segment(self._chosen(), self._model.currentText or None,
                              self._segmentation.currentNode())
    self._segmentation.setCurrentNode(node)
    return "segmented"

  def _chosen(self):
    if self._volume.currentNode() is None:
      raise ValueError("no volume; choose one")
    return self._volume.currentNode()

  def _attempt(self, action):
    """Does what a button says; what goes wrong is said in a window."""
    self._stopped = False
    try:
      self._status.text = action()
    except InterruptedError:
      self._status.text = "cancelled"
    except Exception as error:
      self._status.text = ""
      slicer.util.errorDisplay(str(error))

  def _show(self, text):
    self._status.text = text
    slicer.app.processEvents()  # so that Cancel can be pressed
    if self._stopped:
      raise InterruptedError

  def _section(self, title):
    button = ctk.ctkCollapsibleButton()
    button.text = title
    self.layout.addWidget(button)
    return qt.QFormLayout(button)

  def _button(self, text, action):
    button = qt.QPushButton(text)
    button.connect("clicked(bool)", lambda checked: action())
    return button

  def _selector(self, kind, none):
    selector = slicer.qMRMLNodeComboBox()
    selector.nodeTypes = [kind]
    selector.noneEnabled, selector.addEnabled = none, False
    selector.selectNodeUponCreation = False
    selector.setMRMLScene(slicer.mrmlScene)
    return selector
