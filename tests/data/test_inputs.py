"""Inputs as people have them: capitals, links, channels, mixed folders. None vanishes unsaid."""

import os
import shutil
import signal

import numpy as np
import pytest
import SimpleITK as sitk
from tests_data import save_series

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data import itk, names
from rfmedsam2_jax.data.inputs import find_inputs, with_labels
from rfmedsam2_jax.data.names import ENDINGS
from rfmedsam2_jax.data.volumes import load_image


def touch(folder, *names):
  folder.mkdir(exist_ok=True)
  for name in names:
    (folder / name).write_bytes(b"")
  return folder


def test_inputs_are_grouped_by_nnunets_channel_numbers(tmp_path):
  one = touch(tmp_path / "one", "a_0000.nii.gz", "scan_2019.nii.gz", "b.nii", ".b.nii", "x.txt")
  cases = find_inputs([one])
  assert {case.identifier: case.images[0].name for case in cases} == {
    "a": "a_0000.nii.gz", "scan_2019": "scan_2019.nii.gz", "b": "b.nii"}
  two = touch(tmp_path / "two", "a_0000.nii.gz", "a_0001.nii.gz", "whole.nii.gz")
  cases = find_inputs([two, two / "a_0001.nii.gz"], 2)
  assert [(case.identifier, len(case.images)) for case in cases] == [("a", 2), ("whole", 1)]
  labels = touch(tmp_path / "labels", "a.nii.gz", "whole.nii")
  assert [case.label.name for case in with_labels(cases, labels)] == ["a.nii.gz", "whole.nii"]


@pytest.mark.parametrize(("names", "channels", "says"), [
  ((), 1, "has no volumes"),
  (("readme.txt",), 1, "has no volumes"),
  (("a_0000.nii.gz",), 2, "a_0001.nii.gz: does not exist"),
  (("a.nii.gz", "a.nii"), 1, "second case named a"),
])
def test_folders_without_usable_inputs_are_refused(tmp_path, names, channels, says):
  with pytest.raises(UserError, match=says):
    find_inputs([touch(tmp_path / "in", *names)], channels)
  with pytest.raises(UserError, match="no such file or folder"):
    find_inputs([tmp_path / "elsewhere"])
  with pytest.raises(UserError, match="is not a volume"):
    find_inputs([touch(tmp_path, "image.png") / "image.png"])


def test_a_pipe_is_no_volume_and_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "scan.nii.gz")
  signal.alarm(60)  # ends the process, which would wait for ever
  try:
    with pytest.raises(UserError, match="scan.nii.gz: is not a volume"):
      load_image(tmp_path / "scan.nii.gz")
  finally:
    signal.alarm(0)


def test_two_cases_of_one_name_are_refused(tmp_path):
  folders = [touch(tmp_path / name, "case.nii.gz") for name in ("x", "y")]
  with pytest.raises(UserError, match="second case named case"):
    find_inputs(folders)


def found(*paths, channels=1):
  """Cases by name, and the lines about what is left out."""
  lines = []
  cases = find_inputs(paths, channels, lambda what: lines.append(str(what)))
  return {case.identifier: [image.name for image in case.images] for case in cases}, lines


@pytest.mark.parametrize("ending", [".NII.GZ", ".Nii", ".nii.Gz", ".NRRD", ".Nhdr", ".MHA", ".MHD"])
def test_endings_in_capitals_are_read_as_simpleitk_reads_them_in_small_letters(tmp_path, ending):
  image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 99, (3, 4, 5), np.int16))
  small = tmp_path / f"a{ending.lower()}"
  sitk.WriteImage(image, str(small), useCompression=True)
  (tmp_path / "in").mkdir()
  shutil.copy(small, tmp_path / "in" / f"A{ending}")
  for raw in tmp_path.glob("a*raw*"):  # voxels beside a header, which names them
    shutil.copy(raw, tmp_path / "in")
  cases, _ = found(tmp_path / "in")
  assert cases == {"A": [f"A{ending}"]}
  expected = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(small)), "LPS"))
  np.testing.assert_array_equal(load_image(tmp_path / "in" / f"A{ending}").array[0], expected)


def test_a_link_is_a_case_of_its_own_name(tmp_path):
  store = touch(tmp_path / "store", "77ab02ce.nii.gz", "no_ending")
  (tmp_path / "in").mkdir()
  for name, target in (("visit_1.nii.gz", "77ab02ce.nii.gz"), ("visit_2.nii.gz", "77ab02ce.nii.gz"),
                       ("visit_3.nii", "no_ending")):
    (tmp_path / "in" / name).symlink_to(store / target)
  expected = {"visit_1": ["visit_1.nii.gz"], "visit_2": ["visit_2.nii.gz"],
              "visit_3": ["visit_3.nii"]}
  assert found(tmp_path / "in") == (expected, [])
  # One case that is named twice is one; also through a link to its folder.
  (tmp_path / "again").symlink_to(tmp_path / "in")
  assert found(tmp_path / "in", tmp_path / "again" / "visit_1.nii.gz") == (expected, [])
  (tmp_path / "in" / "gone.nii.gz").symlink_to(store / "gone")
  with pytest.raises(UserError, match="gone.nii.gz: is a link to what does not exist"):
    found(tmp_path / "in")


def test_a_linked_series_and_the_folder_one_is_in_have_their_own_names(tmp_path, monkeypatch):
  image = sitk.GetImageFromArray(np.zeros((3, 4, 5), np.int16))
  series = save_series(tmp_path / "series", image)
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "visit_1").symlink_to(series)
  assert found(tmp_path / "in")[0] == found(tmp_path / "in" / "visit_1")[0] == {
    "visit_1": ["visit_1"]}
  monkeypatch.chdir(series)
  assert found(".")[0] == {"series": ["series"]}


@pytest.mark.parametrize(("files", "channels", "says"), [
  # One rule: a number behind CASE_0000 is a channel, and no other number is.
  (("p1_0000.nii.gz", "p1_0001.nii.gz"), 1, "p1_0001.nii.gz: is channel 1 of case p1"),
  (("p_0000.nii", "p_0001.MHA", "p_0002.nii"), 2, "p_0002.nii: is channel 2 of case p"),
  (("p_0000.nii", "p_0002.nii"), 1, "p_0002.nii: is channel 2 of case p"),
  (("p_0001.nii",), 2, "p_0000.nii: does not exist, but p_0001.nii is one of 2 channels"),
  (("p_0000.nii", "p_0001.nii.gz", "p_0001.mha"), 2, "and so is"),
  (("a.nii.gz", "a.NII.GZ"), 1, "a.nii.gz: is a second case named a beside .*a.NII.GZ"),
  (("a.nii", "a.mha"), 1, "a.nii: is a second case named a beside .*a.mha"),
])
def test_what_a_run_cannot_take_is_refused_by_name(tmp_path, files, channels, says):
  with pytest.raises(UserError, match=says):
    found(touch(tmp_path / "in", *files), channels=channels)


def test_numbers_are_channels_only_where_channel_0_is(tmp_path):
  folder = touch(tmp_path / "in", "amos_0001.nii.gz", "amos_0004.nii.gz", "b_0000.NII.GZ")
  assert found(folder)[0] == {"amos_0001": ["amos_0001.nii.gz"], "amos_0004": ["amos_0004.nii.gz"],
                              "b": ["b_0000.NII.GZ"]}
  mixed = touch(tmp_path / "two", "p_0000.nii.gz", "p_0001.NII.GZ")
  assert found(mixed, channels=2)[0] == {"p": ["p_0000.nii.gz", "p_0001.NII.GZ"]}
  # A file that is named by itself is that channel, whatever lies beside it.
  surplus = touch(tmp_path / "three", "p_0000.nii", "p_0001.nii")
  assert found(surplus / "p_0000.nii")[0] == {"p": ["p_0000.nii"]}


def test_what_is_no_case_is_one_line_with_a_count(tmp_path):
  folder = touch(tmp_path / "in", "a.nii.gz", "._a.nii.gz", ".DS_Store", "readme.txt", "a.img",
                 *(f"slice{n}.png" for n in range(5)))
  (folder / "notes").mkdir()
  cases, (line,) = found(folder)
  assert cases == {"a": ["a.nii.gz"]}
  assert line == (f"{folder}: left out 10: .DS_Store, ._a.nii.gz (hidden); a.img, readme.txt, "
                  "slice0.png and 4 more (no volume by its name); notes (a folder, but not of one "
                  "DICOM series)")
  with pytest.raises(UserError, match="has no volumes .*left out 1: x.txt"):
    found(touch(tmp_path / "other", "x.txt"))


def test_one_dicom_file_makes_no_series_of_a_folder_of_volumes(tmp_path):
  folder = touch(tmp_path / "in", "a.nii.gz")
  series = save_series(tmp_path / "s", sitk.GetImageFromArray(np.zeros((3, 4, 5), np.int16)))
  shutil.copy(next(series.iterdir()), folder / "scout.dcm")
  for place in (folder, folder.parent / "in"):
    cases, (line,) = found(place)
    assert cases == {"a": ["a.nii.gz"]} and "scout.dcm" in line and "DICOM series needs" in line
  assert found(series) == ({"s": ["s"]}, [])
  # As a folder among others it is neither.
  cases, (line,) = found(tmp_path)
  assert cases == {"s": ["s"]} and "in (a folder, but not of one DICOM series)" in line


def test_a_folder_that_cannot_be_read_is_left_out_and_the_rest_goes_on(tmp_path, monkeypatch):
  folder = touch(tmp_path / "in", "a.nii.gz")
  (folder / "locked").mkdir()
  scan = os.scandir

  def as_a_user(path):  # who runs the tests may be root
    if str(path).endswith("locked"):
      raise PermissionError(13, "Permission denied", str(path))
    return scan(path)

  monkeypatch.setattr(os, "scandir", as_a_user)
  cases, (line,) = found(folder)
  assert cases == {"a": ["a.nii.gz"]}
  assert line.endswith("left out 1: locked (a folder that cannot be read: Permission denied)")
  with pytest.raises(UserError, match="locked: cannot be read .Permission denied"):
    found(folder / "locked")


def test_label_maps_are_found_in_every_spelling_and_never_guessed(tmp_path):
  cases = find_inputs([touch(tmp_path / "in", "a.nii.gz")])
  labels = touch(tmp_path / "labels", "a.SEG.NRRD", "._a.nii.gz")
  assert [case.label.name for case in with_labels(cases, labels)] == ["a.SEG.NRRD"]
  with pytest.raises(UserError, match="a.nii: is a, and so is a.SEG.NRRD"):
    with_labels(cases, touch(labels, "a.nii"))


def test_all_endings_are_known_however_they_are_spelled():
  for ending in ENDINGS:
    for spelled in (ending, ending.upper(), ending.title()):
      assert names.ending_of(f"x.1{spelled}") == spelled
      assert names.stem_of(f"x.1{spelled}") == "x.1"
  assert names.ending_of("nii.gz") == names.ending_of("x.gz") == "" == names.ending_of("x.nii.bz2")
  assert itk.ENDINGS[0] == ".seg.nrrd"  # before .nrrd, which it ends in
