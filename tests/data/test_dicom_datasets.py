"""Data sets whose images and label maps are DICOM, in nnU-Net's layout and listed one by one."""

import json

import numpy as np
import pytest
from test_dicom import HU, save, slices
from test_structure_sets import box, drawn
from test_studies import packed

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.contents import case_content, check_case
from rfmedsam2_jax.data.datasets import read_case, read_dataset
from rfmedsam2_jax.data.inputs import find_inputs, with_labels
from rfmedsam2_jax.data.segmentations import write_segmentation
from rfmedsam2_jax.data.segments import load_masks
from rfmedsam2_jax.data.volumes import load_image

LABELS = {"background": 0, "liver": 1, "spleen": 2}


@pytest.fixture
def dataset(tmp_path):
  """Three cases: a segmentation, a structure set with a body, an archive with a label map."""
  images, labels = tmp_path / "imagesTr", tmp_path / "labelsTr"
  for name in "abc":
    save(slices(HU + ord(name)), images / f"{name}_0000")
  labels.mkdir()
  volume = load_image(images / "a_0000")
  truth = (HU > 500) * 2 + (HU < -500)
  # In an order that is not the data set's: names count.
  swapped = np.where(truth, 3 - truth, 0).astype(np.uint8)
  write_segmentation(labels / "a.seg.dcm", swapped, volume.geometry, {1: "Spleen", 2: "liver"})
  drawn({
    "BODY": [box((0, 0), (12, 8), z) for z in range(6)], "spleen": [box((5, 5), (7, 7), 1)],
    "Liver": [box((1, 1), (4, 4), 2)]}).save_as(labels / "b.dcm", enforce_file_format=True)
  write_segmentation(labels / "c.labelmap.dcm", truth.astype(np.uint8),
                     load_image(images / "c_0000").geometry, {1: "liver", 2: "spleen"})
  packed(images / "c_0000.zip", images / "c_0000", "")
  for file in (images / "c_0000").iterdir():
    file.unlink()
  (images / "c_0000").rmdir()
  (tmp_path / "dataset.json").write_text(json.dumps({
    "channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".dcm", "numTraining": 3}))
  return tmp_path


def test_series_and_their_label_maps_are_cases_with_the_names_of_the_data_set(dataset):
  found = read_dataset(dataset)
  assert [case.identifier for case in found.cases] == ["a", "b", "c"] and not found.left_out
  atoms = {case.identifier: read_case(case, 1, found.labels)[1] for case in found.cases}
  truth = (HU > 500) * 2 + (HU < -500)
  np.testing.assert_array_equal(atoms["a"], truth)
  np.testing.assert_array_equal(atoms["c"], truth)
  expected = np.zeros(HU.shape, int)
  expected[1, 5:7, 5:7], expected[2, 1:4, 1:4] = 2, 1
  np.testing.assert_array_equal(atoms["b"], expected)


def test_cases_of_dicom_may_be_listed_one_by_one(dataset):
  content = json.loads((dataset / "dataset.json").read_text())
  content["dataset"] = {"x": {"images": ["imagesTr/b_0000"], "label": "labelsTr/b.dcm"}}
  (dataset / "dataset.json").write_text(json.dumps(content | {"numTraining": 1}))
  (case,) = read_dataset(dataset).cases
  assert read_case(case, 1, read_dataset(dataset).labels)[1].any()
  decathlon = {"modality": {"0": "CT"}, "labels": {str(v): n for n, v in LABELS.items()},
               "training": [{"image": "imagesTr/a_0000", "label": "labelsTr/a.seg.dcm"}]}
  (dataset / "dataset.json").write_text(json.dumps(decathlon))
  (case,) = read_dataset(dataset).cases
  assert case.identifier == "a_0000" and read_case(case, 1, read_dataset(dataset).labels)[1].any()


def test_a_slice_that_changes_is_another_case(dataset):
  case = read_dataset(dataset).cases[0]
  before = case_content(case)
  check_case(case, case_content(case), before)
  file = sorted(case.images[0].iterdir())[3]
  file.write_bytes(file.read_bytes()[:-2] + b"\1\2")
  with pytest.raises(UserError, match="case a holds something else"):
    check_case(case, case_content(case), before)


def test_a_label_map_of_another_series_is_named(dataset):
  (dataset / "labelsTr" / "b.dcm").unlink()
  with pytest.raises(UserError, match="labelsTr/b.dcm: does not exist but case b of"):
    read_dataset(dataset)
  moved = slices()
  for one in moved:
    one.ImagePositionPatient[0] += 1
  save(moved, dataset / "imagesTr" / "a_0000")
  (case,) = with_labels(find_inputs([dataset / "imagesTr" / "a_0000"]), dataset / "labelsTr")
  with pytest.raises(UserError, match="a.seg.dcm: has a frame that lies on no slice"):
    load_masks(case.label, load_image(case.images).geometry)
