"""Structure sets of DICOM (RTSTRUCT): outlines of structures on slices, read and written.

rt-utils, which writes them, was last released in 2023 and draws through the centres of pixels, half
a pixel within the mask's edge; so they are made here, by contourpy and pydicom. PS3.3, A.19.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.colours import colour
from rfmedsam2_jax.data.contours import filled, outlines
from rfmedsam2_jax.data.derived import (
  SOFTWARE,
  Making,
  check_sources,
  label_text,
  making,
  new_object,
  save,
  say_again,
  series_number,
  software_version,
  source_headers,
)
from rfmedsam2_jax.data.geometry import Geometry
from rfmedsam2_jax.data.grids import GRID_TOLERANCE
from rfmedsam2_jax.data.segmentation_objects import Part, Spread
from rfmedsam2_jax.data.slices import Slice
from rfmedsam2_jax.data.terms import ALGORITHM, Term, code_item, term_of

STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
_STUDY = "1.2.840.10008.3.1.2.3.1"  # retired, and asked for by the standard to this day
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


def write_structure_set(
  path: Path, labels: np.ndarray, geometry: Geometry, names: Mapping[int, str],
  how: Making,
) -> None:
  """Writes a label map, canonical [D, H, W], as outlines on the slices of the series it is of.

  `names` are of values, in the order of their colours. A value is the number of its ROI. UserError:
  see `derived.check_sources`; the disk.
  """
  check_sources(geometry)
  with making(geometry):
    headers = source_headers(geometry)
    first = headers[0]
    dataset = new_object(str(path), STRUCTURE_SET)
    say_again(dataset, first)
    dataset.Modality, dataset.SeriesNumber = "RTSTRUCT", series_number(first)
    dataset.SeriesDescription = dataset.StructureSetName = f"Structures by {SOFTWARE}"
    dataset.StructureSetLabel, dataset.OperatorsName = SOFTWARE, ""
    dataset.StructureSetDate = dataset.InstanceCreationDate
    dataset.StructureSetTime = dataset.InstanceCreationTime
    dataset.ApprovalStatus = "UNAPPROVED"
    dataset.FrameOfReferenceUID = first.FrameOfReferenceUID
    dataset.PositionReferenceIndicator = first.get("PositionReferenceIndicator", "")
    dataset.ReferencedFrameOfReferenceSequence = [_references(headers)]
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    dataset.RTROIObservationsSequence = []
    native = geometry.to_native(labels)
    for number, (value, name) in enumerate(names.items()):
      term = term_of(name, how.codes)
      dataset.StructureSetROISequence.append(_roi(value, name, first, how))
      dataset.ROIContourSequence.append(_drawn(value, colour(number), native, geometry.series))
      dataset.RTROIObservationsSequence.append(_observation(value, term))
    save(path, dataset)


def _references(headers: list[Any]) -> Any:
  frame, study, series = _items(3)
  series.SeriesInstanceUID = headers[0].SeriesInstanceUID
  series.ContourImageSequence = [_image(header) for header in headers]
  study.ReferencedSOPClassUID = _STUDY
  study.ReferencedSOPInstanceUID = headers[0].StudyInstanceUID
  study.RTReferencedSeriesSequence = [series]
  frame.FrameOfReferenceUID = headers[0].FrameOfReferenceUID
  frame.RTReferencedStudySequence = [study]
  return frame


def _items(count: int) -> list[Any]:
  from pydicom import Dataset

  return [Dataset() for _ in range(count)]


def _image(header: Any) -> Any:
  (item,) = _items(1)
  item.ReferencedSOPClassUID = header.SOPClassUID
  item.ReferencedSOPInstanceUID = header.SOPInstanceUID
  return item


def _roi(value: int, name: str, header: Any, how: Making) -> Any:
  roi, algorithm = _items(2)
  roi.ROINumber, roi.ROIName = value, label_text(name)
  roi.ReferencedFrameOfReferenceUID = header.FrameOfReferenceUID
  roi.ROIGenerationAlgorithm = how.algorithm_type
  algorithm.AlgorithmFamilyCodeSequence = [code_item(ALGORITHM)]
  algorithm.AlgorithmName, algorithm.AlgorithmVersion = SOFTWARE, software_version()
  if how.details:
    algorithm.AlgorithmParameters = how.details_text
  roi.ROIDerivationAlgorithmIdentificationSequence = [algorithm]
  return roi


def _drawn(value: int, shade: tuple[int, int, int], native: np.ndarray, series: tuple[Slice, ...]
           ) -> Any:
  """The outlines of a value on all slices, each where its slice lies."""
  (roi,) = _items(1)
  roi.ReferencedROINumber, roi.ROIDisplayColor = value, list(shade)
  found: list[Any] = []
  for k, one in enumerate(series):
    for ring in outlines(native[:, :, k].T == value):
      contour, = _items(1)
      places = one.origin + ring @ one.steps.T
      contour.ContourImageSequence = [_image(one.header)]
      contour.ContourGeometricType = "CLOSED_PLANAR"
      contour.NumberOfContourPoints = len(places)
      contour.ContourData = [f"{place:.4f}" for place in places.ravel()]
      contour.ContourNumber = len(found) + 1
      found.append(contour)
  if found:
    roi.ContourSequence = found
  return roi


def _observation(value: int, term: Term) -> Any:
  (item,) = _items(1)
  item.ObservationNumber = item.ReferencedROINumber = value
  code = code_item(term.type)
  if term.side:
    code.SegmentedPropertyTypeModifierCodeSequence = [code_item(term.side)]
  item.RTROIIdentificationCodeSequence = [code]
  item.RTROIInterpretedType = "ORGAN" if term.anatomical else ""
  item.ROIInterpreter = ""
  return item


def rois_of(dataset: Any) -> list[Part]:
  """The structures with closed outlines, or without any; marked points are none."""
  types = {int(roi.ReferencedROINumber): {c.get("ContourGeometricType") for c in
                                          roi.get("ContourSequence") or ()}
           for roi in dataset.get("ROIContourSequence") or ()}
  items = dataset.get("StructureSetROISequence") or ()
  unused = max((int(item.ROINumber) for item in items), default=0) + 1
  found = []
  for item in items:
    number = int(item.ROINumber)
    drawn = types.get(number, set())
    if not drawn or drawn & set(_CLOSED):
      value = number if number > 0 else unused  # 0 is a number of a ROI, but no value of one
      found.append(Part(number, str(item.get("ROIName") or ""), value))
  return found


def planes_of(dataset: Any) -> list[np.ndarray]:
  """A point of every closed outline, LPS+ in mm."""
  return [points[0] for roi in dataset.get("ROIContourSequence") or () for points in _points(roi)]


def _points(roi: Any) -> Iterator[np.ndarray]:
  """The outlines of a ROI, float64 [n, 3] each."""
  for contour in roi.get("ContourSequence") or ():
    if contour.get("ContourGeometricType") in _CLOSED:
      points = np.array(contour.ContourData, np.float64).reshape(-1, 3)
      if len(points) and np.isfinite(points).all():
        yield points


def spread_contours(dataset: Any, parts: Sequence[Part], onto: Spread
                    ) -> Iterator[tuple[Part, np.ndarray]]:
  """The mask of some structures, bool [i, j, k] of the image.

  Outlines of one slice that lie in each other are holes and what is in them. UserError for outlines
  that are on no slice of the image.
  """
  drawn = {int(roi.ReferencedROINumber): roi for roi in dataset.get("ROIContourSequence") or ()}
  for part in parts:
    mask = np.zeros(onto.like.shape, bool)
    on_slices: dict[tuple[int, int], list[np.ndarray]] = {}
    for points in _points(drawn.get(part.number, {})):
      axis, number, flat = _on_slice(part, points, onto)
      on_slices.setdefault((axis, number), []).append(flat)
    for (axis, number), rings in on_slices.items():
      plane = np.moveaxis(mask, axis, 0)[number]
      plane |= filled(rings, plane.shape)
    yield part, mask


def _on_slice(part: Part, points: np.ndarray, onto: Spread) -> tuple[int, int, np.ndarray]:
  """The axis and the number of the slice of an outline, and its points there as (column, row).

  Rows and columns of that plane of voxels are the two other axes, in their order.
  """
  index = onto.index(points)
  # Of an outline that is thin along two axes, the last one, which is that of a series' slices.
  axis = 2 - int(np.argmin(np.round(np.ptp(index, axis=0), 2)[::-1]))
  number = round(float(index[:, axis].mean()))
  miss = float(np.abs(index[:, axis] - number).max())
  if miss > GRID_TOLERANCE:
    raise UserError(f"{onto.path}: '{part.name}' has an outline that lies on no slice of "
                    f"{onto.like.path} (by {miss:.3g} slices); give the structure set of this "
                    "image")
  if not 0 <= number < onto.like.shape[axis]:
    raise UserError(f"{onto.path}: '{part.name}' has an outline outside of {onto.like.path}; give "
                    "the structure set of this image")
  one, other = (n for n in range(3) if n != axis)
  return axis, number, index[:, [other, one]]
