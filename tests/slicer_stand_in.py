"""A stand-in for the parts of 3D Slicer's API that integrations/slicer uses. Not Slicer itself.

Nodes hold what Slicer's do: volumes arrays [k, j, i] and a matrix from (i, j, k) to RAS+, markups
places in RAS+, segmentations masks on the grid of a volume. Names and orders of arguments are those
of Slicer 5's headers and of its slicer.util.
"""

import itertools
import sys
import types
from unittest import mock

import numpy as np

_NUMBERS = itertools.count()


class vtkMatrix4x4:
  def __init__(self, elements=None):
    self.elements = np.eye(4) if elements is None else np.array(elements, float)

  def GetElement(self, row, column):
    return float(self.elements[row, column])


class Node:
  def __init__(self, name="node"):
    self.name, self.id, self.transform = name, f"{type(self).__name__}{next(_NUMBERS)}", None

  def GetName(self):
    return self.name

  def GetID(self):
    return self.id

  def GetParentTransformNode(self):
    return self.transform


class ScalarVolume(Node):
  def __init__(self, array_kji, ijk_to_ras, name="volume"):
    super().__init__(name)
    self.array, self.matrix, self.changed = array_kji, ijk_to_ras, 0

  def GetIJKToRASMatrix(self, matrix):
    matrix.elements = np.array(self.matrix, float)

  def GetImageData(self):
    return types.SimpleNamespace(GetMTime=lambda: self.changed)


class Markups(Node):
  def __init__(self, places_ras):
    super().__init__("markups")
    self.places = np.array(places_ras, float)


class ROI(Node):
  """Box around a centre, turned by the columns of `turn`."""

  def __init__(self, centre_ras, size, turn=None):
    super().__init__("roi")
    self.size = tuple(size)
    self.matrix = np.eye(4)
    self.matrix[:3, :3] = np.eye(3) if turn is None else turn
    self.matrix[:3, 3] = centre_ras

  def GetSize(self):
    return self.size

  def GetObjectToWorldMatrix(self):
    return vtkMatrix4x4(self.matrix)


class _Segment:
  def __init__(self, name):
    self.name = name

  def SetName(self, name):
    self.name = name

  def GetName(self):
    return self.name


class _Segmentation:
  def __init__(self):
    self.segments = {}

  def AddEmptySegment(self, segment_id="", name="", colour=None):
    self.segments[segment_id] = _Segment(name)
    return segment_id

  def GetSegment(self, segment_id):
    return self.segments.get(segment_id)


class SegmentationNode(Node):
  def __init__(self, name="segmentation"):
    super().__init__(name)
    self.segmentation, self.reference, self.masks = _Segmentation(), None, {}

  def CreateDefaultDisplayNodes(self):
    pass

  def SetReferenceImageGeometryParameterFromVolumeNode(self, volume):
    self.reference = volume

  def GetSegmentation(self):
    return self.segmentation

  def ras_of(self, segment_id):
    """RAS+ of a segment's voxels, [n, 3], as Slicer places them."""
    mask, volume = self.masks[segment_id]
    kji = np.argwhere(mask)
    return kji[:, ::-1] @ volume.matrix[:3, :3].T + volume.matrix[:3, 3]


class _Scene:
  def AddNewNodeByClass(self, kind, name=""):
    assert kind == "vtkMRMLSegmentationNode"
    return SegmentationNode(name)


def _update_segment(array, node, segment_id, reference=None):
  assert array.shape == reference.array.shape and segment_id in node.segmentation.segments
  node.masks[segment_id] = array.copy(), reference


def _control_points(node, world=False):
  assert world
  return node.places


def modules():
  """What `import slicer` and its like give, for sys.modules."""
  class Module:
    def __init__(self, parent=None):
      self.parent = parent

  class Widget(Module):
    def setup(self):
      self.layout = mock.MagicMock()

  scripted = types.ModuleType("slicer.ScriptedLoadableModule")
  scripted.ScriptedLoadableModule = Module
  scripted.ScriptedLoadableModuleWidget = Widget
  scripted.ScriptedLoadableModuleLogic = Module
  util = types.SimpleNamespace(
    arrayFromVolume=lambda volume: volume.array, arrayFromMarkupsControlPoints=_control_points,
    updateSegmentBinaryLabelmapFromArray=_update_segment, errorDisplay=mock.MagicMock())
  slicer = types.ModuleType("slicer")
  slicer.util, slicer.mrmlScene, slicer.app = util, _Scene(), mock.MagicMock()
  slicer.qMRMLNodeComboBox = mock.MagicMock
  vtk = types.ModuleType("vtk")
  vtk.vtkMatrix4x4 = vtkMatrix4x4
  qt, ctk = mock.MagicMock(), mock.MagicMock()
  for name in ("QLineEdit", "QComboBox", "QSpinBox", "QLabel"):  # a new one for each call
    setattr(qt, name, mock.MagicMock(side_effect=lambda text="": mock.MagicMock(text=text)))
  qt.QPushButton = lambda text: mock.MagicMock(text=text)
  return {"slicer": slicer, "slicer.ScriptedLoadableModule": scripted, "vtk": vtk, "qt": qt,
          "ctk": ctk}


def loaded(path, monkeypatch):
  """A module of Slicer, imported from its file as Slicer does."""
  import importlib.util

  for name, module in modules().items():
    monkeypatch.setitem(sys.modules, name, module)
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
