"""Studies with several series, in folders and archives: which one is read, and what is refused."""

import re
import zipfile

import numpy as np
import pytest
from test_dicom import HU, save, slices
from test_structure_sets import box, drawn

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.inputs import find_inputs
from rfmedsam2_jax.data.segmentations import write_segmentation
from rfmedsam2_jax.data.studies import claimed_bytes, modality_of
from rfmedsam2_jax.data.volumes import load_image

# UID, number, description, modality, and what is added to the intensities.
SERIES = (("1.2.31", 2, "Abdomen 5.0", "CT", 0), ("1.2.32", 3, "Abdomen 5.0 lung", "CT", 7),
          ("1.2.33", 12, "T2 haste", "MR", 9))


def study(folder, one_folder=False, chosen=SERIES):
  for uid, number, description, modality, more in chosen:
    datasets = slices(HU + more, uid)
    for one in datasets:
      one.SeriesNumber, one.SeriesDescription, one.Modality = number, description, modality
    save(datasets, folder if one_folder else folder / f"{number}", f"{number}_{{:02d}}.dcm")
  return folder


def packed(path, folder, top="study/"):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for file in sorted(folder.rglob("*")):
      if file.is_file():
        archive.write(file, top + file.relative_to(folder).as_posix())
  return path


@pytest.fixture(params=["flat", "folders", "zip"])
def place(request, tmp_path):
  folder = study(tmp_path / "study", request.param == "flat")
  write = drawn({"liver": [box((1, 1), (3, 3), 2)]})
  write.SeriesInstanceUID = "1.2.40"
  write.save_as(next(folder.rglob("*.dcm")).with_name("rs.dcm"), enforce_file_format=True)
  return packed(tmp_path / "study.zip", folder) if request.param == "zip" else folder


@pytest.mark.parametrize(("asked", "more"), [
  ("1.2.32", 7), ("3", 7), (" 12 ", 9), ("abdomen 5.0", 0), ("Abdomen 5.0 LUNG", 7),
  ("haste", 9), ("mr", 9),
])
def test_a_series_is_chosen_by_uid_number_description_or_modality(place, asked, more):
  volume = load_image(place, series=asked)
  np.testing.assert_array_equal(volume.array[0], HU + more)
  assert volume.geometry.path == place and len(volume.geometry.series) == len(HU)


@pytest.mark.parametrize(("asked", "says"), [
  (None, "has 3 series, 2 ('Abdomen 5.0', CT, 6 files, 1.2.31), 3 ("),
  ("abdomen", "has 2 series that 'abdomen' names; it has 2 ('Abdomen"),
  ("CT", "has 2 series that 'CT' names"), ("4", "has no series that '4' names"),
  ("", "has no series that '' names"),
])
def test_the_refusal_lists_the_series(place, asked, says):
  with pytest.raises(UserError) as error:
    load_image(place, series=asked)
  assert str(error.value).startswith(f"{place}: {says}") and "\n" not in str(error.value)
  for uid, *_ in SERIES:
    assert uid in str(error.value)


def test_the_modality_chooses_where_one_series_alone_has_it(place):
  volume = load_image(place, modality="MR")
  np.testing.assert_array_equal(volume.array[0], HU + 9)
  assert any(said.startswith("of 3 series the one of MR is taken, 12 ('T2 haste', MR")
             for said in volume.geometry.remarks)
  with pytest.raises(UserError, match="has 3 series"):
    load_image(place, modality="CT")
  assert [modality_of(names) for names in (["CT"], ["mri "], ["T1", "T2"], ["noise"])] == [
    "CT", "MR", None, None]


def test_an_archive_is_its_series(tmp_path):
  folder = study(tmp_path / "study", True, SERIES[:1])
  path = packed(tmp_path / "scan.ZIP", folder, "")
  with zipfile.ZipFile(path, "a") as archive:
    archive.writestr("__MACOSX/._2_01.dcm", b"rubbish")
    archive.writestr(".DS_Store", b"rubbish")
    archive.writestr("../../escaped.txt", "outside")
    archive.writestr("/notes.txt", "outside")
  (case,) = find_inputs([path])
  assert case.identifier == "scan"
  found, other = load_image(path), load_image(folder)
  np.testing.assert_array_equal(found.array, other.array)
  np.testing.assert_array_equal(found.geometry.affine, other.geometry.affine)
  assert found.geometry.remarks == ("left out notes.txt (no DICOM)",)
  assert claimed_bytes(path) > HU.size * 2
  labels = (found.array[0] > 0).astype(np.uint8)  # the files are gone, what they said is not
  write_segmentation(tmp_path / "a.seg.dcm", labels, found.geometry, {1: "liver"})


def test_folders_of_archives_and_studies_are_cases(tmp_path):
  folder = study(tmp_path / "study")
  (tmp_path / "in").mkdir()
  packed(tmp_path / "in" / "a.zip", folder)
  study(tmp_path / "in" / "b", True, SERIES[:1])
  assert [case.identifier for case in find_inputs([tmp_path / "in"])] == ["a", "b"]
  assert [case.identifier for case in find_inputs([folder])] == ["12", "2", "3"]
  (case,) = find_inputs([folder], studies=True)
  assert case.identifier == "study" and case.images == (folder,)


def _missing(path, tmp_path):
  folder = study(tmp_path / "one", True, SERIES[:1])
  sorted(folder.iterdir())[2].unlink()
  packed(path, folder)


def _damaged(path, tmp_path):
  packed(path, study(tmp_path / "one", True, SERIES[:1]))
  content = bytearray(path.read_bytes())
  content[600:700] = bytes(100)
  path.write_bytes(bytes(content))


def _empty(path, tmp_path):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("notes.txt", "none")


def _lie(path, tmp_path):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("a.dcm", bytes(100))
  content = path.read_bytes()
  for kind, at in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
    where = content.rindex(kind) + at
    content = content[:where] + (2**32 - 2).to_bytes(4, "little") + content[where + 4:]
  path.write_bytes(content)


def _unknown(path, tmp_path):
  _empty(path, tmp_path)
  path.write_bytes(re.sub(rb"(?s)(PK\x01\x02..).", rb"\1c", path.read_bytes()))
  assert claimed_bytes(path) == 0  # of a version of the format that is not known


@pytest.mark.parametrize(("make", "says"), [
  (_missing, "scan.zip: 2_.* mm apart, others 5 mm"),
  (_damaged, "scan.zip: cannot be read as a .zip"),
  (lambda path, _: path.write_bytes(b"PK rubbish"), "scan.zip: cannot be read as a .zip"),
  (_empty, "scan.zip: has no DICOM"), (_lie, "scan.zip: "),
  (_unknown, "as a .zip .zip file version 9.9"),
])
def test_archives_without_a_volume_are_one_line(tmp_path, make, says):
  make(tmp_path / "scan.zip", tmp_path)
  with pytest.raises(UserError, match=says) as error:
    load_image(tmp_path / "scan.zip")
  assert "\n" not in str(error.value) and "rfmedsam2-" not in str(error.value)


def test_an_archive_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
  packed(tmp_path / "scan.zip", study(tmp_path / "one", True, SERIES[:1]))
  monkeypatch.setattr("rfmedsam2_jax.data.studies._LARGEST", 1000)
  with pytest.raises(UserError, match="scan.zip: holds .* bytes, more than 1000; unpack it"):
    load_image(tmp_path / "scan.zip")


def test_segmentations_beside_the_slices_are_left_out(tmp_path):
  folder = study(tmp_path / "study", True, SERIES[:1])
  volume = load_image(folder)
  for name in ("a.seg.dcm", "b.labelmap.dcm"):
    write_segmentation(folder / name, (volume.array[0] > 0).astype(np.uint8), volume.geometry,
                       {1: "liver"})
  (folder / "a.seg.dcm").rename(folder / "renamed.dcm")
  again = load_image(folder)
  np.testing.assert_array_equal(again.array, volume.array)
  assert again.geometry.remarks == (
    "left out b.labelmap.dcm (a segmentation), renamed.dcm (a segmentation)",)
