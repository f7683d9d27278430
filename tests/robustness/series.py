"""DICOM series whose files differ in what they say, and DICOM that does not look like it."""

from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from frame import kind
from pydicom import uid
from tests_data import save_series
from volumes import predict


def series(folder: Path, stage) -> Path:
  return save_series(folder / "series", sitk.ReadImage(str(stage.scan)))


def _store(one, values, bits=16, signed=False):
  one.BitsStored, one.HighBit, one.PixelRepresentation = bits, bits - 1, int(signed)
  one.PixelData = (values & (2**bits - 1)).astype("<u2").tobytes()


def _signed(one, values):
  one.RescaleIntercept = 0
  _store(one, values, signed=True)


def _intercept(one, values):
  one.RescaleIntercept = 0
  _store(one, values.clip(0))


def _upside_down(one, values):
  row, column = np.reshape(np.array(one.ImageOrientationPatient, float), (2, 3))
  last = np.array(one.ImagePositionPatient, float) + (
    column * (one.Rows - 1) * float(one.PixelSpacing[0]))
  one.ImagePositionPatient = last.tolist()
  one.ImageOrientationPatient = [*row, *-column]
  _store(one, values[::-1] + 1024)


def _exchanged(one, values):
  one.Rows, one.Columns = one.Columns, one.Rows
  one.PixelSpacing = one.PixelSpacing[::-1]
  one.ImageOrientationPatient = [*one.ImageOrientationPatient[3:], *one.ImageOrientationPatient[:3]]
  _store(one, values.T + 1024)


def _moved(one, values):
  one.ImagePositionPatient[0] += 40


def _small(one, values):
  one.Rows, one.PixelData = 9, one.PixelData[:9 * one.Columns * 2]


def _set(**attributes):
  def change(one, values):
    for name, value in attributes.items():
      setattr(one, name, value)
  return change


def _without(name):
  return lambda one, values: delattr(one, name)


READ = {
  "an intercept of its own": _intercept, "signed": _signed,
  "a slope of its own": _set(RescaleSlope=1.25),
  "MONOCHROME1": _set(PhotometricInterpretation="MONOCHROME1"),
  "12 bits": lambda one, values: _store(one, values + 1024, bits=12),
  "RLE": lambda one, values: one.compress(uid.RLELossless),
  "rows and columns exchanged": _exchanged, "upside down": _upside_down,
}
REFUSED = {
  "other pixel sizes": _set(PixelSpacing=[3, 3]), "moved": _moved, "fewer rows": _small,
  "turned": _set(ImageOrientationPatient=[0.8, 0.6, 0, -0.6, 0.8, 0]),
  "a scout": _set(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]),
  "more rows than pixels": _set(Rows=30), "two frames": _set(NumberOfFrames=2),
  "another frame of reference": _set(FrameOfReferenceUID="1.9"),
  "another series": _set(SeriesInstanceUID="1.9"), "slope 0": _set(RescaleSlope=0),
  "axes that coincide": _set(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]),
  "a spacing of 0": _set(PixelSpacing=[0, 3]), "no rescale slope": _without("RescaleSlope"),
  "no position": _without("ImagePositionPatient"), "no spacing": _without("PixelSpacing"),
  "no orientation": _without("ImageOrientationPatient"), "no pixels": _without("PixelData"),
}


@kind("DICOM slices with attributes of their own")
def attributes():
  for name, change in {**READ, **REFUSED}.items():
    def make(folder, rng, stage, name=name, change=change):
      path = series(folder, stage)
      for number, file in enumerate(sorted(path.iterdir())):
        one = pydicom.dcmread(file)
        one.FrameOfReferenceUID = "1.8"
        if number in (4, 5, 9):
          change(one, one.pixel_array.astype(int) - 1024)
        one.save_as(file)
      return predict(stage, path, folder, names=("series",), judge=name in READ,
                     must_read=name in READ)
    yield name, make


@kind("DICOM that does not look like it")
def looks():
  def bare(folder, rng, stage):
    path = series(folder, stage)
    for number, file in enumerate(sorted(path.iterdir())):
      one = pydicom.dcmread(file)
      pydicom.dcmwrite(path / f"I{number}", pydicom.Dataset({e.tag: e for e in one}),
                       implicit_vr=True, little_endian=True, enforce_file_format=False)
      file.unlink()
    return predict(stage, path, folder, must_read=True)
  yield "no preamble, no ending", bare

  def medium(folder, rng, stage):
    (folder / "cd").mkdir()
    series(folder / "cd", stage).rename(folder / "cd" / "SE0")
    (folder / "cd" / "below").mkdir()
    (folder / "cd" / "SE0").rename(folder / "cd" / "below" / "SE0")
    (folder / "cd" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    return folder / "cd"
  yield "a DICOMDIR", lambda folder, rng, stage: predict(
    stage, medium(folder, rng, stage) / "DICOMDIR", folder, judge=False)
  yield "the folder of a DICOMDIR", lambda folder, rng, stage: predict(
    stage, medium(folder, rng, stage), folder, judge=False)

  def one_file(folder, rng, stage):
    return predict(stage, sorted(series(folder, stage).iterdir())[3], folder, judge=False)
  yield "one file of a series", one_file

  def beside(folder, rng, stage):
    path = series(folder, stage)
    (path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    return predict(stage, path, folder, must_read=True)
  yield "a DICOMDIR beside slices", beside
