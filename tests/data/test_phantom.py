import dataclasses
import json

import numpy as np
import pytest
import SimpleITK as sitk

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.phantom import PhantomConfig, organ_names, phantom_case, write_phantom

SMALL = PhantomConfig(cases=3, test_cases=1, seed=5)


def test_phantom_files_differ_in_orientation_and_agree_in_world_space(tmp_path):
  # SimpleITK, which is not ours, brings every file back to LPS.
  turned = write_phantom(tmp_path / "turned", SMALL)
  upright = write_phantom(tmp_path / "upright", dataclasses.replace(SMALL, reorient=False))
  directions = set()
  for path in sorted(turned.glob("*T*/*.nii.gz")):
    image = sitk.ReadImage(str(path))
    directions.add(image.GetDirection())
    image = sitk.DICOMOrient(image, "LPS")
    other = sitk.DICOMOrient(sitk.ReadImage(str(upright / path.relative_to(turned))), "LPS")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(other))
    np.testing.assert_allclose(image.GetSpacing(), other.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(image.GetOrigin(), other.GetOrigin(), atol=1e-4)
    index = int(path.name.split("_")[1][:3])
    wanted, labels, _ = phantom_case(SMALL, index)
    wanted = wanted if "images" in path.parent.name else labels
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), wanted)
  assert len(directions) > 2


def test_phantom_is_a_complete_dataset_and_is_not_overwritten(tmp_path):
  folder = write_phantom(tmp_path, SMALL)
  description = json.loads((folder / "dataset.json").read_text("utf-8"))
  assert list(description["labels"]) == ["background", *organ_names()]
  count = {k: len(list((folder / k).iterdir())) for k in ("imagesTr", "labelsTr", "imagesTs")}
  assert count == {"imagesTr": 3, "labelsTr": 3, "imagesTs": 1}
  with pytest.raises(UserError, match="holds a dataset already"):
    write_phantom(tmp_path, SMALL)


def test_every_organ_can_be_told_apart_and_one_is_sometimes_missing():
  config = PhantomConfig(seed=0)
  missing = 0
  for index in range(8):
    image, labels, _ = phantom_case(config, index)
    counts = np.bincount(labels.ravel(), minlength=len(organ_names()) + 1)
    missing += counts[5] == 0
    assert (counts[1:5] > 300).all(), counts
    ring = (labels == 0) & (image > 0)
    means = [image[labels == value].mean() for value in (1, 2, 3, 4)]
    assert min(means) > np.median(image[ring]) + 25
  assert 0 < missing < 8
