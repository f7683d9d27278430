"""Digests of what a run's cases hold, against the files' own bytes and times."""

import hashlib
import os
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from test_datasets import write_nnunet

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data import contents
from rfmedsam2_jax.data.datasets import read_dataset
from rfmedsam2_jax.data.layouts import Case


@pytest.fixture
def dataset(tmp_path):
  folder = write_nnunet(tmp_path / "data", {"background": 0, "a": 1, "b": 2, "c": 3})
  for file in folder.rglob("*.gz"):
    os.utime(file, ns=(10**18, 10**18))
  return folder


def test_the_digest_is_that_of_the_files_bytes_wherever_they_lie(dataset, tmp_path):
  case = read_dataset(dataset).cases[0]
  now = contents.case_content(case)
  whole = b"".join(hashlib.blake2b(file.read_bytes(), digest_size=16).digest()
                   for file in (*case.images, case.label))
  assert now.digest == hashlib.blake2b(whole, digest_size=16).hexdigest()
  shutil.copytree(dataset, tmp_path / "copy")
  moved = read_dataset(tmp_path / "copy").cases[0]
  contents.check_case(moved, contents.case_content(moved, now), now)
  other = read_dataset(dataset).cases[1]
  with pytest.raises(UserError, match="case b holds something else than when the run was made"):
    contents.check_case(other, contents.case_content(other), now)


def test_files_are_read_again_only_where_something_of_them_has_changed(dataset, monkeypatch):
  case = read_dataset(dataset).cases[0]
  monkeypatch.setattr(contents, "_SETTLED", -(10**12))  # whatever was written a moment ago, too
  now = contents.case_content(case)
  read = contents._digest
  monkeypatch.setattr(contents, "_digest", lambda file: pytest.fail("read again"))
  assert contents.case_content(case, now) is now
  monkeypatch.setattr(contents, "_digest", read)
  # The same size and the same time of writing: the time of the change itself tells.
  raw = bytearray(case.label.read_bytes())
  raw[-1] ^= 1
  case.label.write_bytes(raw)
  os.utime(case.label, ns=(10**18, 10**18))
  changed = contents.case_content(case, now)
  assert changed.files[-1].modified == now.files[-1].modified and changed.digest != now.digest
  with pytest.raises(UserError, match="case a holds something else"):
    contents.check_case(case, changed, now)


def test_what_was_written_a_moment_ago_is_read_again(dataset):
  case = read_dataset(dataset).cases[0]
  assert all(state.changed == 0 for state in contents.case_content(case).files)


@pytest.mark.parametrize("ending", [".nhdr", ".mhd"])
def test_voxels_beside_a_header_belong_to_what_a_case_holds(tmp_path, ending):
  image = sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5))
  sitk.WriteImage(image, str(tmp_path / f"a{ending}"))
  case = Case("a", (tmp_path / f"a{ending}",))
  before = contents.case_content(case)
  sitk.WriteImage(image + 1, str(tmp_path / f"a{ending}"))
  assert contents.case_content(case, before).digest != before.digest


@pytest.mark.parametrize(("old", "new", "says"), [
  ('"b": 2', '"b": 7', "has label b: 7, the run was made with 2"),
  ('"c": 3', '"d": 3', "has label d: 3, the run was made with none"),
  ('"a": 1, "b": 2', '"b": 2, "a": 1', "in the order b, a, c, the run was made with a, b, c"),
  ('"c": 3', '"c": 3, "ignore": 4', "has ignore label 4, the run was made with none"),
  ('"0": "T1", "1": "T2"', '"0": "T2", "1": "T1"', "has the channels T2, T1, the run was made"),
])
def test_another_description_is_refused_with_what_differs(dataset, old, new, says):
  before = read_dataset(dataset)
  path = dataset / "dataset.json"
  contents.check_description(before, before.channels, before.labels, path)
  text = path.read_text("utf-8")
  assert old in text
  path.write_text(text.replace(old, new))
  with pytest.raises(UserError, match=says) as error:
    contents.check_description(read_dataset(dataset), before.channels, before.labels, path)
  assert str(error.value).startswith(f"{path}: ")
