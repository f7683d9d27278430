"""Volumes stored in every axis order and flip, and as a DICOM series."""

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk

ORIENTATIONS = [
  (order, flips)
  for order in itertools.permutations(range(3))
  for flips in itertools.product((1, -1), repeat=3)
]


def reoriented(image: nib.Nifti1Image, orientation) -> nib.Nifti1Image:
  """The same volume in the same place, its axes permuted and flipped in the file."""
  order, flips = orientation
  return image.as_reoriented(np.array(list(zip(order, flips, strict=True)), float))


def save_series(folder: Path, image: sitk.Image, skip=(), shift=0.0, series="1.2.3") -> Path:
  """An axial CT series by pydicom; `shift` moves each slice sideways (a tilted gantry)."""
  folder.mkdir(exist_ok=True)
  array = sitk.GetArrayFromImage(image)
  turn = np.asarray(image.GetDirection()).reshape(3, 3)
  for z in range(len(array)):
    if z in skip:
      continue
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{series}.9.{z + 1}"
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = series, "1.2"
    dataset.Modality, dataset.InstanceNumber, dataset.FrameOfReferenceUID = "CT", z + 1, "1.2.8"
    dataset.Rows, dataset.Columns = array.shape[1:]
    x, y, _ = image.GetSpacing()
    dataset.PixelSpacing = [f"{y:.10g}", f"{x:.10g}"]
    position = np.array(image.TransformIndexToPhysicalPoint((0, 0, z))) + turn[:, 1] * shift * z
    dataset.ImagePositionPatient = [f"{p:.9f}"[:16] for p in position]
    dataset.ImageOrientationPatient = [f"{v:.12f}"[:16] for v in turn[:, :2].T.ravel()]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation, dataset.RescaleSlope, dataset.RescaleIntercept = 0, 1, -1024
    dataset.PixelData = (array[z] + 1024).astype(np.uint16).tobytes()
    # Names in the opposite order: the positions must decide.
    dataset.save_as(folder / f"{series}_{99 - z}.dcm", enforce_file_format=True)
  return folder
