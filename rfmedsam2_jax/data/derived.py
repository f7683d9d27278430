"""What segmentations and structure sets of DICOM say again of the images that they are made from.

Only what was read from DICOM has patient, study, frame of reference and slices to refer to.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.data.files import replacing
from rfmedsam2_jax.data.geometry import Geometry
from rfmedsam2_jax.data.itk import optional

SOFTWARE = "rfmedsam2_jax"
UTF8 = "ISO_IR 192"
# Of type 2 in their modules: empty where the images do not have them.
PATIENT_AND_STUDY = (
  "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate",
  "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName")
_IF_THERE = ("PatientAge", "PatientSize", "PatientWeight", "PatientIdentityRemoved",
             "DeidentificationMethod", "StudyDescription")
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID",
           "FrameOfReferenceUID")


@dataclasses.dataclass(frozen=True)
class Making:
  """How structures were found, for formats that say so.

  Attributes:
    automatic: no person prompted.
    codes: terms of a config by the structure's name, see `terms.term_of`.
    details: what else was used, by name, such as the run.
  """

  automatic: bool = False
  codes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  details: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def algorithm_type(self) -> str:
    return "AUTOMATIC" if self.automatic else "SEMIAUTOMATIC"

  @property
  def details_text(self) -> str:
    return ",".join(f"{key}={value}" for key, value in self.details.items())


def software_version() -> str:
  return version("rfmedsam2-jax")


def check_sources(geometry: Geometry) -> None:
  """UserError unless a volume was read from DICOM that says what has to be said again."""
  if not geometry.series:
    raise UserError(f"{geometry.path}: was not read from DICOM, so it has no patient, study and "
                    "slices to write DICOM for; choose the format nifti or nrrd")
  for one in geometry.series:
    for name in _NEEDED:
      if not one.header.get(name):
        raise UserError(f"{one.path}: has no {name}, so DICOM cannot refer to it; choose the "
                        "format nifti or nrrd")


def label_text(name: str) -> str:
  """A name as DICOM's long strings hold it."""
  return " ".join(name.replace("\\", "/").split())[:64]


def series_number(header: Any) -> int:
  """For a series made from another: far from those of scanners, and the same for the same one."""
  number = header.get("SeriesNumber")
  return 1000 + (int(number) if number and 0 < int(number) < 10**8 else 0)


@contextmanager
def making(geometry: Geometry) -> Iterator[None]:
  """Makes a UserError of what pydicom or highdicom say of headers that cannot be said again."""
  import warnings

  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of values that the images have
      yield
  except UserError:
    raise
  except (ValueError, TypeError, AttributeError, KeyError, OverflowError, NotImplementedError
          ) as error:
    raise UserError(f"{geometry.path}: cannot be written as DICOM ({first_line(error, 160)}); "
                    "correct its headers, or choose the format nifti or nrrd") from None


def source_headers(geometry: Geometry) -> list[Any]:
  """A header for every slice, in order, that lies as the grid has it and has what is needed.

  Text is Unicode. Positions are the slices' own; where a file is turned onto the grid, or its
  directions are rounded otherwise than those of most, the grid's count.
  """
  from pydicom import Dataset

  result = []
  usual: Any = None
  for one in geometry.series:
    header = Dataset()
    for element in one.header:
      if element.VR != "UI" or element.value:
        header.add(element)
    header.PatientName, header.ReferringPhysicianName = (
      str(one.header.get(name) or "") for name in ("PatientName", "ReferringPhysicianName"))
    header.SpecificCharacterSet = UTF8
    for name in PATIENT_AND_STUDY:
      if name not in header:
        setattr(header, name, "")
    if one.transposed or any(one.flipped):
      header.ImagePositionPatient = [_decimal(v) for v in one.origin]
    else:
      usual = usual or header
    result.append(header)
  columns, rows = geometry.series[0].shape
  steps = geometry.series[0].steps
  between = float(np.linalg.norm(geometry.affine_mm[:3, 2]))
  for header in result:
    header.Rows, header.Columns = rows, columns
    header.SpacingBetweenSlices = _decimal(between)
    header.SliceThickness = header.get("SliceThickness") or _decimal(between)
    if usual is not None:
      header.ImageOrientationPatient = usual.ImageOrientationPatient
      header.PixelSpacing = usual.PixelSpacing
    else:
      lengths = (steps**2).sum(axis=0) ** 0.5
      header.ImageOrientationPatient = [_decimal(v) for v in (steps / lengths).T.ravel()]
      header.PixelSpacing = [_decimal(v) for v in lengths[::-1]]
  return result


def _decimal(value: float) -> str:
  """A number in the 16 characters that DICOM gives it."""
  return f"{value:.10f}"[:16].rstrip("0").rstrip(".") or "0"


def say_again(dataset: Any, header: Any) -> None:
  """Puts patient and study of a source's header into a data set."""
  for name in (*PATIENT_AND_STUDY, *_IF_THERE):
    if name in header:
      setattr(dataset, name, header[name].value)


def new_object(path: str, kind: str) -> Any:
  """A data set of a SOP class, to be filled and saved."""
  optional("pydicom", path)
  from pydicom import Dataset
  from pydicom.dataset import FileMetaDataset
  from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

  dataset, now = Dataset(), datetime.now()
  dataset.file_meta = FileMetaDataset()
  dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
  dataset.SpecificCharacterSet = UTF8
  dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID(kind)
  dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(prefix=None)
  dataset.SeriesInstanceUID = generate_uid(prefix=None)
  dataset.InstanceCreationDate, dataset.InstanceCreationTime = f"{now:%Y%m%d}", f"{now:%H%M%S}"
  dataset.Manufacturer = dataset.ManufacturerModelName = SOFTWARE
  dataset.SoftwareVersions = software_version()
  dataset.InstanceNumber = 1
  return dataset


def save(path: Any, dataset: Any) -> None:
  """Writes a data set, whole or not at all; UserError if the disk does not take it."""
  with replacing(path) as temporary:
    try:
      dataset.save_as(temporary, enforce_file_format=True)
    except OSError:
      raise UserError(f"{path}: cannot be written; is the disk full or the folder read-only?"
                      ) from None
