"""DICOM series, slice by slice, against pydicom: attributes that every file has for itself."""

import os

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom import uid
from pydicom.fileset import FileSet
from pydicom.pixels import apply_rescale

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.inputs import find_inputs
from rfmedsam2_jax.data.itk import is_series
from rfmedsam2_jax.data.volumes import load_image

SHAPE = (6, 8, 12)  # slices, rows, columns
SPACING = (5.0, 2.0, 3.0)
HU = np.random.default_rng(0).integers(-1000, 1000, SHAPE)


def slices(values=HU, series="1.2.3"):
  """CT slices from feet to head, unsigned 16 bits, not saved."""
  result = []
  for z, plane in enumerate(values):
    one = pydicom.Dataset()
    one.file_meta = pydicom.dataset.FileMetaDataset()
    one.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = uid.CTImageStorage
    one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"{series}.9.{z + 1}"
    one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID = series, "1.2", "1.2.8"
    one.PatientID, one.PatientName, one.StudyDate, one.StudyTime = "P", "P", "20200101", "0900"
    one.StudyID = one.AccessionNumber = "1"
    one.Modality, one.SeriesNumber, one.InstanceNumber = "CT", 1, z + 1
    one.Rows, one.Columns = plane.shape
    one.PixelSpacing = list(SPACING[1:])
    one.ImagePositionPatient = [-7, 11, 40 + z * SPACING[0]]
    one.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.RescaleSlope, one.RescaleIntercept = 1, -1024
    store(one, plane + 1024)
    result.append(one)
  return result


def store(one, values, bits=16, signed=False, kind="<i2"):
  one.BitsAllocated, one.BitsStored, one.HighBit = np.dtype(kind).itemsize * 8, bits, bits - 1
  one.PixelRepresentation = int(signed)
  one.PixelData = (values & (2**bits - 1)).astype(kind.replace("i", "u")).tobytes()


def save(datasets, folder, name="{:02d}.dcm"):
  """In an order of names that is not that of places."""
  folder.mkdir(parents=True, exist_ok=True)
  for number, one in zip(np.random.default_rng(1).permutation(len(datasets)), datasets,
                         strict=True):
    one.save_as(folder / name.format(number), enforce_file_format=True)
  return folder


def witness(folder):
  """World places, LPS [n, 3], and values [n], of every pixel of every file, as pydicom has them."""
  places, values = [], []
  for file in folder.iterdir():
    one = pydicom.dcmread(file, force=True)
    row, column = np.reshape(np.array(one.ImageOrientationPatient, float), (2, 3))
    down, along = map(float, one.PixelSpacing)
    j, i = np.indices((one.Rows, one.Columns)).reshape(2, -1, 1)
    places.append(np.array(one.ImagePositionPatient, float) + i * row * along + j * column * down)
    values.append(apply_rescale(one.pixel_array, one).ravel())
  return np.concatenate(places), np.concatenate(values)


def check(folder):
  """That every voxel has the value and the place that pydicom gives."""
  volume = load_image(folder)
  index = np.indices(volume.array.shape[1:]).reshape(3, -1)
  affine = volume.geometry.canonical_affine
  ours = (affine[:3, :3] @ index).T + affine[:3, 3]
  ours, theirs = ours * (-1, -1, 1), witness(folder)
  order, other = (np.lexsort(np.round(places, 3).T) for places in (ours, theirs[0]))
  np.testing.assert_allclose(ours[order], theirs[0][other], atol=1e-4)
  np.testing.assert_array_equal(volume.array.ravel()[order], theirs[1][other].astype(np.float32))
  return volume


def _intercept(z, one):
  if z < 3:
    one.RescaleIntercept = 0
    store(one, HU[z].clip(0))


def _slopes(z, one):  # as PET has them
  one.SOPClassUID, one.Modality = uid.PositronEmissionTomographyImageStorage, "PT"
  one.RescaleSlope, one.RescaleIntercept = 0.00137 * (z + 1), 0


def _one_fraction(z, one):
  one.RescaleSlope = 1.25 if z == 4 else 1


def _signed(z, one):
  if z % 2:
    one.RescaleIntercept = 0
    store(one, HU[z], signed=True)


def _without_rescale(z, one):
  if z > 2:
    store(one, HU[z], signed=True)
    del one.RescaleSlope, one.RescaleIntercept


def _twelve_bits(z, one):
  if z > 3:
    store(one, HU[z] + 1024, bits=12)


def _bytes(z, one):
  if z < 2:
    one.RescaleIntercept, one.RescaleSlope = -1000, 7
    store(one, HU[z] // 8 + 125, bits=8, kind="<i1")


def _inverted(z, one):
  if z in (1, 4):
    one.PhotometricInterpretation = "MONOCHROME1"
    store(one, HU[z], bits=12, signed=z == 4)


def _syntaxes(z, one):
  one.file_meta.TransferSyntaxUID = (
    uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian,
  )[z % 3]
  if z % 3 == 1:
    one.PixelData = (HU[z] + 1024).astype(">u2").tobytes()


def _packed(z, one):
  if z != 2:
    one.compress(uid.RLELossless)


VALUES = (_intercept, _slopes, _one_fraction, _signed, _without_rescale, _twelve_bits, _bytes,
          _inverted, _syntaxes, _packed)


@pytest.mark.parametrize("change", VALUES)
def test_every_slice_has_the_values_of_its_own_file(tmp_path, change):
  datasets = slices()
  for z, one in enumerate(datasets):
    change(z, one)
  check(save(datasets, tmp_path / "series"))


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_compressed_slices_are_read(tmp_path, compressor):
  folder = save(slices(), tmp_path / "series")
  plain = load_image(folder)
  for file in folder.iterdir():
    before = pydicom.dcmread(file)
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "packed.dcm"))
    writer.SetImageIO("GDCMImageIO")
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.Execute(sitk.GetImageFromArray(before.pixel_array))
    packed = pydicom.dcmread(tmp_path / "packed.dcm")
    before.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
    before.PixelData = packed.PixelData
    before["PixelData"].is_undefined_length = True
    before.save_as(file)
  np.testing.assert_array_equal(load_image(folder).array, plain.array)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("flips", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_a_slice_that_is_stored_otherwise_is_put_onto_the_grid(tmp_path, transposed, flips):
  """Rows upwards, columns to the right, both exchanged: every file of one volume may differ."""
  datasets = slices()
  for z, one in enumerate(datasets):
    if z in (1, 2, 5):
      _store_otherwise(one, HU[z] + 1024, transposed, flips)
  volume = check(save(datasets, tmp_path / "series"))
  np.testing.assert_array_equal(volume.array[0], HU)
  assert volume.spacing == SPACING


def _store_otherwise(one, plane, transposed, flips):
  axes = np.array([[1.0, 0, 0], [0, 1, 0]]) * np.reshape(flips, (2, 1))
  corner = np.array(one.ImagePositionPatient, float)
  for axis, flip in enumerate(flips):  # columns, rows
    if flip < 0:
      corner[axis] += (plane.shape[1 - axis] - 1) * SPACING[2 - axis]
  plane = plane[::flips[1], ::flips[0]]
  if transposed:
    plane, axes = plane.T, axes[::-1]
    one.Rows, one.Columns = plane.shape
    one.PixelSpacing = list(SPACING[:0:-1])
  one.ImageOrientationPatient = axes.ravel().tolist()
  one.ImagePositionPatient = corner.tolist()
  store(one, plane)


def test_files_without_endings_and_without_a_preamble_are_a_series(tmp_path):
  folder = tmp_path / "series"
  folder.mkdir()
  for z, one in enumerate(slices()):
    one.PhotometricInterpretation = f"MONOCHROME{1 + z % 2}"
    bare = pydicom.Dataset({element.tag: element for element in one})
    with open(folder / f"I{9 - z}", "wb") as file:
      pydicom.dcmwrite(file, bare, implicit_vr=True, little_endian=True,
                       enforce_file_format=False)
  assert is_series(folder) and [case.identifier for case in find_inputs([folder])] == ["series"]
  np.testing.assert_array_equal(load_image(folder).array[0], HU)


def test_what_only_looks_a_little_like_dicom_is_none(tmp_path):
  for name, content in (("zeros", bytes(400)), ("text", b"DICOM " * 99), ("group", b"\x08\0" * 99),
                        ("empty", b"")):
    (tmp_path / name).write_bytes(content)
  assert not is_series(tmp_path)


def _set(**attributes):
  def change(z, one):
    for name, value in attributes.items() if z >= 3 else ():
      setattr(one, name, value)
  return change


def _without(name):
  def change(z, one):
    if z == 3:
      delattr(one, name)
  return change


def _moved(z, one):
  if z in (3, 4):
    one.ImagePositionPatient[0] += 40


def _other_matrix(z, one):
  if z >= 3:
    one.Rows, one.PixelData = 6, one.PixelData[:6 * 12 * 2]


def _turned(degrees):
  def change(z, one):
    if z >= 3:
      c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
      one.ImageOrientationPatient = [f"{v:.9f}" for v in (c, s, 0, -s, c, 0)]
  return change


def _twice(z, one):
  if z == 3:
    one.ImagePositionPatient[2] = 50


def _gap(z, one):
  if z >= 3:
    one.ImagePositionPatient[2] += 5


def _gantry(z, one):
  one.ImagePositionPatient[1] += z * 2.0


def _table(z, one):
  if z == 3:
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [1, 0, 16], "HU", [1]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    one.ModalityLUTSequence = [table]


def _colour(z, one):
  if z == 3:
    one.SamplesPerPixel, one.PhotometricInterpretation, one.PlanarConfiguration = 3, "RGB", 0
    one.BitsAllocated = one.BitsStored = 8
    one.HighBit, one.PixelData = 7, bytes(8 * 12 * 3)


def _frames(z, one):
  if z == 3:
    one.NumberOfFrames, one.PixelData = 2, one.PixelData * 2


def _cut(z, one):
  if z == 3:
    del one.PixelData


@pytest.mark.parametrize(("change", "says"), [
  (_set(PixelSpacing=[1.4, 2.1]), "its pixels are 2.1 x 1.4 mm, those of s0 3 x 2 mm"),
  (_moved, "lies 40 mm beside s0"),
  (_other_matrix, "has 12 x 6 pixels, s0 has 12 x 8"),
  (_turned(12), "is turned by 12 degrees against s0"),
  (_set(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "is turned by 90 degrees against s0"),
  (_twice, "has the same position as s2"),
  (_gap, "s2 and s3 are 10 mm apart, others 5 mm"),
  (_gantry, "tilted by 21.8 degrees"),
  (_without("PixelSpacing"), "has no PixelSpacing"),
  (_without("ImagePositionPatient"), "has no ImagePositionPatient"),
  (_without("ImageOrientationPatient"), "has no ImageOrientationPatient"),
  (_set(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "not two directions at right angles"),
  (_set(PixelSpacing=[0, 3]), "pixels without a size"),
  (_set(FrameOfReferenceUID="1.2.9"), "has another frame of reference than s0"),
  (_set(SeriesInstanceUID="1.2.4"), "has 2 series, 1 (CT, 3 files, 1.2.3), 1 (CT, "),
  (_set(RescaleSlope=0), "its RescaleSlope is 0"),
  (_set(Rows=9), "has 192 bytes of pixels where its header says 216"),
  (_without("RescaleIntercept"), "has RescaleSlope alone"),
  (_set(PhotometricInterpretation="PALETTE COLOR"), "has PALETTE COLOR pixels"),
  (_table, "by a table (Modality LUT)"), (_colour, "has RGB pixels of 3 samples"),
  (_frames, "has 2 frames"), (_cut, "is a DICOM file without an image"),
])
def test_what_is_not_on_one_grid_is_refused_with_the_first_file_that_differs(
    tmp_path, change, says):
  datasets, folder = slices(), tmp_path / "series"
  folder.mkdir()
  for z, one in enumerate(datasets):
    change(z, one)
    one.save_as(folder / f"s{z}", enforce_file_format=True)
  with pytest.raises(UserError) as error:
    load_image(folder)
  of_all = change in (_gap, _gantry) or "series" in says
  assert str(error.value).startswith(f"{folder if of_all else folder / 's3'}: ")
  assert says in str(error.value) and "\n" not in str(error.value)


def test_the_few_that_differ_are_named_although_they_come_first(tmp_path):
  datasets = slices()
  datasets[0].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]  # a scout in the series
  folder = tmp_path / "series"
  folder.mkdir()
  for z, one in enumerate(datasets):
    one.save_as(folder / f"s{z}", enforce_file_format=True)
  with pytest.raises(UserError, match="s0: is turned by 90 degrees against s1"):
    load_image(folder)


def test_an_enhanced_file_is_named_as_one_of_several_frames(tmp_path):
  one = slices()[0]
  one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = uid.EnhancedCTImageStorage
  one.NumberOfFrames, one.PixelData = 4, one.PixelData * 4
  for name in ("PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"):
    delattr(one, name)  # each frame has its own, in a functional group
  with pytest.raises(UserError, match="00.dcm: has 4 frames in one file; convert it to NIfTI"):
    load_image(save([one], tmp_path / "series"))


def test_what_lies_beside_the_slices_is_named_as_left_out(tmp_path):
  folder = save(slices(), tmp_path / "series")
  structures = slices()[0]
  structures.SOPClassUID = structures.file_meta.MediaStorageSOPClassUID = uid.RTStructureSetStorage
  del structures.PixelData, structures.Rows, structures.Columns
  structures.save_as(folder / "rs.dcm", enforce_file_format=True)
  (folder / "notes.txt").write_text("CT")
  (said,) = load_image(folder).geometry.remarks
  assert said == "left out notes.txt (no DICOM), rs.dcm (RT Structure Set Storage, no image)"


def test_a_slice_that_is_damaged_beyond_knowing_is_not_left_out(tmp_path):
  folder = save(slices(), tmp_path / "series")
  last = max(folder.iterdir(), key=lambda file: pydicom.dcmread(file).InstanceNumber)
  last.write_bytes(b"damaged " * 60)
  with pytest.raises(UserError, match=f"{last.name}: is named as the slices are but is no DICOM"):
    load_image(folder)


def test_a_dicomdir_is_named_with_the_folders_of_its_series(tmp_path):
  medium = FileSet()
  for one in (*slices(), *slices(series="1.2.4")):
    medium.add(one)
  medium.write(tmp_path / "cd")
  (parent,) = (tmp_path / "cd").glob("PT*/ST*")
  folders = sorted(map(str, parent.iterdir()))
  for given in (tmp_path / "cd", tmp_path / "cd" / "DICOMDIR"):
    for read in (load_image, lambda path: find_inputs([path])):
      with pytest.raises(UserError) as error:
        read(given)
      assert str(error.value).startswith(f"{given}: ")
      assert "DICOMDIR, the index of a medium" in str(error.value)
      assert str(error.value).endswith(", ".join(folders))
  os.rename(tmp_path / "cd" / "DICOMDIR", parent / "SE000000" / "DICOMDIR")
  np.testing.assert_array_equal(load_image(parent / "SE000000").array[0], HU)  # beside slices
  with pytest.raises(UserError, match=f"is one file of DICOM; give its folder, {folders[0]}"):
    find_inputs([parent / "SE000000" / "IM000000"])


def test_places_that_are_rounded_still_make_a_stack(tmp_path):
  datasets = slices()
  rng = np.random.default_rng(2)
  for one in datasets:
    one.ImagePositionPatient = [f"{v + e:.4f}" for v, e in zip(
      map(float, one.ImagePositionPatient), rng.uniform(-0.01, 0.01, 3), strict=True)]
  volume = load_image(save(datasets, tmp_path / "series"))
  np.testing.assert_array_equal(volume.array[0], HU)
  axes = volume.geometry.affine[:3, :3]
  directions = axes / np.linalg.norm(axes, axis=0)
  np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-12)
