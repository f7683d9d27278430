"""Segmentations of DICOM (SEG), written by highdicom: binary frames, or one label map.

In: a label map on the grid of a series that was read. Out: one file, whose frames lie where the
series' slices say that they lie.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rfmedsam2_jax.data.colours import colour
from rfmedsam2_jax.data.derived import (
  SOFTWARE,
  UTF8,
  Making,
  check_sources,
  label_text,
  making,
  save,
  series_number,
  software_version,
  source_headers,
)
from rfmedsam2_jax.data.geometry import Geometry
from rfmedsam2_jax.data.itk import optional
from rfmedsam2_jax.data.segmentation_objects import DESCRIPTION
from rfmedsam2_jax.data.terms import ALGORITHM, code_item, term_of

SegmentationType = Literal["BINARY", "LABELMAP"]


def write_dicom_segmentation(
  path: Path, labels: np.ndarray, geometry: Geometry, names: Mapping[int, str], how: Making,
  kind: SegmentationType,
) -> None:
  """Writes a label map, canonical [D, H, W]; frames without a structure are left out.

  `names` are of values, in the order of their colours; a structure that does not occur is described
  all the same. Segments of binary frames are numbered from 1 in that order, those of a label map
  are the values. UserError: see `derived.check_sources`; the disk.
  """
  hd = optional("highdicom", path)
  check_sources(geometry)
  if unknown := sorted(set(np.unique(labels).tolist()) - {0, *names}):
    raise ValueError(f"labels have {unknown}, which names do not")
  with making(geometry):
    headers = source_headers(geometry)
    numbers = {value: value if kind == "LABELMAP" else place
               for place, value in enumerate(names, start=1)}
    described = [_described(hd, numbers[value], place, value, name, how)
                 for place, (value, name) in enumerate(names.items())]
    written = hd.seg.Segmentation(
      source_images=headers, pixel_array=_frames(labels, geometry, numbers),
      segmentation_type=kind,
      segment_descriptions=sorted(described, key=lambda one: one.SegmentNumber),
      series_instance_uid=hd.UID(), series_number=series_number(headers[0]),
      sop_instance_uid=hd.UID(), instance_number=1, manufacturer=SOFTWARE,
      manufacturer_model_name=SOFTWARE, software_versions=software_version(),
      device_serial_number="0", content_label="SEGMENTATION",
      content_description=f"Structures by {SOFTWARE}", content_creator_name=SOFTWARE,
      series_description=f"Structures by {SOFTWARE}", specific_character_set=UTF8)
    _say_what_was_turned(written, geometry)
    save(path, written)


def _frames(labels: np.ndarray, geometry: Geometry, numbers: Mapping[int, int]) -> np.ndarray:
  """Numbers of segments, [k, rows, columns], of the smallest type."""
  native = geometry.to_native(labels)
  values = np.unique(native)
  chosen = np.array([numbers.get(int(value), 0) for value in values],
                    np.min_scalar_type(max(numbers.values(), default=1)))
  return np.ascontiguousarray(chosen[np.searchsorted(values, native)].transpose(2, 1, 0))


def _described(hd: Any, number: int, place: int, value: int, name: str, how: Making) -> Any:
  from pydicom.sr.coding import Code

  term = term_of(name, how.codes)
  category, shown, family = (
    Code(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)
    for code in (term.category, term.type, ALGORITHM))
  algorithm = hd.AlgorithmIdentificationSequence(
    SOFTWARE, family, software_version(), parameters=dict(how.details) or None)
  item = hd.seg.SegmentDescription(
    number, label_text(name), category, shown, how.algorithm_type, algorithm,
    display_color=hd.color.CIELabColor.from_rgb(*colour(place)))
  item.SegmentDescription = DESCRIPTION.format(value)
  if term.side:
    item.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
      code_item(term.side)]
  return item


def _say_what_was_turned(written: Any, geometry: Geometry) -> None:
  """Frames of slices that are stored otherwise than the grid has them are reoriented images."""
  turned = {one.header.SOPInstanceUID for one in geometry.series
            if one.transposed or any(one.flipped)}
  for frame in written.PerFrameFunctionalGroupsSequence if turned else ():
    for derivation in frame.get("DerivationImageSequence") or ():
      for source in derivation.SourceImageSequence:
        if source.ReferencedSOPInstanceUID in turned:
          source.SpatialLocationsPreserved = "REORIENTED_ONLY"
