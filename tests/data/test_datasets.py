import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import IGNORED, read_case, read_dataset
from rfmedsam2_jax.data.splits import (
  SplitConfig,
  divide,
  grouped,
  load_split,
  make_split,
  save_split,
)

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def write_nnunet(folder, labels, cases=("a", "b"), channels=("T1", "T2"), **more):
  content = {"channel_names": {str(i): name for i, name in enumerate(channels)}, "labels": labels,
             "numTraining": len(cases), "file_ending": ".nii.gz", **more}
  for name in ("imagesTr", "labelsTr"):
    (folder / name).mkdir(parents=True, exist_ok=True)
  (folder / "dataset.json").write_text(json.dumps(content))
  rng = np.random.default_rng(0)
  for case in cases:
    for channel in range(len(channels)):
      nib.save(nib.Nifti1Image(rng.random((4, 5, 6), np.float32), np.eye(4)),
               folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
    nib.save(nib.Nifti1Image(rng.integers(0, 4, (4, 5, 6), np.uint8), np.eye(4)),
             folder / "labelsTr" / f"{case}.nii.gz")
  return folder


def rewrite(folder, old, new):
  path = folder / "dataset.json"
  text = path.read_text("utf-8")
  assert old in text
  path.write_text(text.replace(old, new))


def test_nnunet_layout_with_several_channels(tmp_path):
  data = read_dataset(write_nnunet(tmp_path, {"background": 0, "b": 3, "a": 1, "c": 2}))
  assert data.channels == ("T1", "T2")
  assert [case.identifier for case in data.cases] == ["a", "b"]
  assert data.cases[1].images[1].name == "b_0001.nii.gz"
  # Outputs follow dataset.json's order, and so do the atoms.
  assert data.labels.names == ("b", "a", "c") and data.labels.output_values == (3, 1, 2)
  volume, atoms = read_case(data.cases[0], 2, data.labels)
  assert volume.array.shape == (2, 6, 5, 4)
  stored = np.asarray(nib.load(data.cases[0].label).dataobj)[::-1, ::-1].T
  np.testing.assert_array_equal(np.array(data.labels.atom_values)[atoms], stored)
  assert data.labels.membership.tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_regions_and_ignore_label_keep_nnunets_meaning(tmp_path):
  data = read_dataset(write_nnunet(
    tmp_path, {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "active": 3, "ignore": 4},
    regions_class_order=[1, 2, 3]))
  labels = data.labels
  assert labels.regions and labels.output_values == (1, 2, 3) and labels.ignore == 4
  values = np.array([[0, 1, 2, 3, 4]])
  atoms = labels.to_atoms(values)
  assert atoms.dtype == np.uint8 and atoms[0, 4] == IGNORED
  inside = labels.membership[atoms[0, :4]]
  for k, members in enumerate(({1, 2, 3}, {2, 3}, {3})):
    assert [value in members for value in range(4)] == inside[:, k].tolist()


def test_structures_that_are_not_selected_become_background(tmp_path):
  folder = write_nnunet(tmp_path, {"background": 0, "a": 1, "b": 2, "c": 3})
  labels = read_dataset(folder, ("c", "a")).labels
  assert labels.names == ("c", "a") and labels.output_values == (3, 1)
  assert labels.to_atoms(np.arange(4)).tolist() == [0, 2, 0, 1]
  with pytest.raises(UserError, match="has no label liver; choose from a, b, c"):
    read_dataset(folder, ("a", "liver"))


def test_labels_outside_dataset_json_are_named(tmp_path):
  data = read_dataset(write_nnunet(tmp_path, {"background": 0, "a": 1, "b": 2}))
  with pytest.raises(UserError) as error:
    data.labels.to_atoms(np.array([0, 1, 7, 3]), "labelsTr/case_012.nii.gz")
  assert str(error.value) == ("labelsTr/case_012.nii.gz: labels 3, 7 are not in dataset.json "
                              "(which has 0 to 2); correct the label map or dataset.json")
  with pytest.raises(UserError, match="labels -1 are not"):
    data.labels.to_atoms(np.array([-1, 1]))


def test_large_label_values_become_small_atoms(tmp_path):
  labels = read_dataset(write_nnunet(tmp_path, {"background": 0, "a": 2_000_000, "b": 300})).labels
  assert labels.to_atoms(np.array([[300, 0, 2_000_000]], np.int32)).tolist() == [[2, 0, 1]]


@pytest.mark.parametrize(("change", "says"), [
  (lambda f: (f / "dataset.json").unlink(), "dataset.json: does not exist"),
  (lambda f: (f / "dataset.json").write_text("{"), "is not readable JSON"),
  (lambda f: (f / "dataset.json").write_text("{}"), "neither 'modality'"),
  (lambda f: (f / "dataset.json").write_text("[1]"), "neither 'modality'"),
  (lambda f: write_nnunet(f, {"background": 0}), "no labels besides background"),
  (lambda f: write_nnunet(f, {"background": 0, "a": "x"}), "label 'a' is 'x'; give a whole"),
  (lambda f: write_nnunet(f, {"background": 0, "a": None}), "label 'a' is None"),
  (lambda f: write_nnunet(f, {"background": 0, "a": 2.5}), "label 'a' is 2.5; give a whole number"),
  (lambda f: write_nnunet(f, {"background": 0, "a": True}), "label 'a' is True"),
  (lambda f: write_nnunet(f, {"background": 0, "a": -1}), "label 'a' has the values [-1]"),
  (lambda f: write_nnunet(f, {"background": 0, "a": 0}), "'background' and 'a' both have"),
  (lambda f: write_nnunet(f, {"background": 1, "a": 2}), "label 'background' has the values [1]"),
  (lambda f: write_nnunet(f, {"background": 0, "a": [1, 2.5]}, regions_class_order=[1]), "is 2.5"),
  (lambda f: write_nnunet(f, {"background": 0, "a": [1, 1]}, regions_class_order=[1]),
   "label 'a' has a value twice"),
  (lambda f: write_nnunet(f, {"background": 0, "a": [1, 2], "b": [1]},
                          regions_class_order=[1, 1]), "regions_class_order has a value twice"),
  (lambda f: write_nnunet(f, {"background": 0, "a": [1, 2], "b": [1]},
                          regions_class_order=[1.5, 1]), "regions_class_order is 1.5"),
  (lambda f: write_nnunet(f, {"background": 0, "a": 1, "ignore": 2.5}), "'ignore' is 2.5"),
  (lambda f: rewrite(f, '"a": 1', '"a": 1, "a": 2'), "'a' is there twice"),
  (lambda f: rewrite(f, '"1": "T2"', '"3": "T2"'), "has channels 0, 3; number them from 0 on"),
  (lambda f: rewrite(f, '"numTraining": 2', '"numTraining": 3'),
   "numTraining is 3, but there are 2 training cases"),
  (lambda f: rewrite(f, '"numTraining": 2', '"numTraining": "two"'), "numTraining is 'two'"),
  (lambda f: shutil.copy(f / "imagesTr" / "a_0000.nii.gz", f / "imagesTr" / "a_0002.nii.gz"),
   "a_0002.nii.gz: is channel 2 of case a, and dataset.json has channels 0 to 1"),
  (lambda f: shutil.copy(f / "imagesTr" / "a_0000.nii.gz", f / "imagesTr" / "a_0000.NII.GZ"),
   "and so is a_0000.NII.GZ"),
  (lambda f: shutil.copy(f / "labelsTr" / "a.nii.gz", f / "labelsTr" / "c.nii.gz"),
   "c.nii.gz: has no image in imagesTr"),
  (lambda f: write_nnunet(f, {"background": 0, "a": 1, "b": 1}), "same value"),
  (lambda f: write_nnunet(f, {"background": 0, "a": [1, 2]}), "regions_class_order"),
  (lambda f: write_nnunet(f, {"background": 0, "a": 1, "ignore": 1}), "ignore label 1"),
  (lambda f: write_nnunet(f, {"background": 0, "a": 1}, file_ending=".png"), "file_ending"),
  (lambda f: (f / "labelsTr" / "b.nii.gz").unlink(), "b.nii.gz: does not exist but case b"),
  (lambda f: (f / "imagesTr" / "b_0001.nii.gz").unlink(), "b_0001.nii.gz: does not exist"),
  (lambda f: [file.unlink() for file in (f / "imagesTr").iterdir()], "has no training cases"),
])
def test_a_data_set_that_is_wrong_says_where(tmp_path, change, says):
  folder = write_nnunet(tmp_path, {"background": 0, "a": 1, "b": 2, "c": 3})
  change(folder)
  with pytest.raises(UserError) as error:
    read_dataset(folder)
  assert says in str(error.value) and str(error.value).startswith(str(folder))


def test_whole_numbers_are_labels_however_they_are_written(tmp_path):
  labels = read_dataset(write_nnunet(tmp_path, {"background": 0, "a": 2.0, "b": "1"})).labels
  assert labels.output_values == (2, 1)


def test_what_is_no_case_of_a_data_set_is_said(tmp_path):
  folder = write_nnunet(tmp_path, {"background": 0, "a": 1, "b": 2, "c": 3})
  images = folder / "imagesTr"
  (images / "a_0001.nii.gz").rename(images / "a_0001.NII.GZ")  # counts as it is
  for name in ("c.nii.gz", "a_0000.mha", "._a_0000.nii.gz", "notes.txt"):
    (images / name).write_bytes(b"")
  data = read_dataset(folder)
  assert [image.name for image in data.cases[0].images] == ["a_0000.nii.gz", "a_0001.NII.GZ"]
  (line,) = map(str, data.left_out)
  assert line == (f"{images}: left out 4: ._a_0000.nii.gz (hidden); notes.txt (no volume by its "
                  "name); a_0000.mha (not .nii.gz, the file_ending); c.nii.gz (no channel's number "
                  "such as _0000)")


def test_what_the_decathlons_list_leaves_out_is_said(tmp_path):
  folder = write_nnunet(tmp_path, {}, channels=("CT",))
  entries = [{"image": f"./imagesTr/{name}_0000.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
             for name in ("a", "b")]
  content = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "x", "2": "y", "3": "z"},
             "training": entries[:1], "numTraining": 1}
  (folder / "dataset.json").write_text(json.dumps(content))
  assert [str(line).removeprefix(str(folder)) for line in read_dataset(folder).left_out] == [
    "/imagesTr: left out 1: b_0000.nii.gz (not in dataset.json)",
    "/labelsTr: left out 1: b.nii.gz (not in dataset.json)"]
  for wrong, says in (({"numTraining": 2}, "numTraining is 2, but there are 1"),
                      ({"labels": {"0": "background", "1": "x", "2": "x"}}, "has a label twice"),
                      ({"labels": {"0": "background", "2.5": "x"}}, "label 'x' is '2.5'")):
    (folder / "dataset.json").write_text(json.dumps(content | wrong))
    with pytest.raises(UserError, match=says):
      read_dataset(folder)


def test_fewer_training_cases_are_nested_and_leave_the_validation_alone():
  names = [f"case_{i:03d}" for i in range(40)]
  whole, some, few = (make_split(names, SplitConfig(train_cases=n)) for n in (None, 20, 5))
  assert set(few.train) < set(some.train) < set(whole.train)
  assert len(some.train) == 20 and few.validation == some.validation == whole.validation
  with pytest.raises(UserError, match="train_cases"):
    make_split(names, SplitConfig(train_cases=33))
  # Of patients with several scans, so many patients.
  names = [f"patient{i:02d}_scan{j}" for i in range(10) for j in range(3)]
  found = make_split(names, SplitConfig(group=r"patient\d+", train_cases=2)).train
  assert len(found) == 6 and len({name[:9] for name in found}) == 2


def test_cases_held_back_from_the_generator_are_the_refiners_alone():
  names = [f"case_{i:03d}" for i in range(40)]
  generator, refiner = divide(names, 0.25, seed=3)
  assert len(refiner) == 10 and sorted(generator + refiner) == names
  assert divide(names, 0.25, seed=4)[1] != refiner
  assert divide(names, 0.0, seed=3) == (names, names)
  for share, none in ((0.01, "the refiner"), (0.99, "the generator")):
    with pytest.raises(UserError, match=f"refiner.held_back: .* leaves {none} none"):
      divide(names, share, seed=3)


def test_split_is_by_case_seeded_and_kept(tmp_path):
  names = [f"case_{i:03d}" for i in range(200)]
  split = make_split(names, SplitConfig())
  assert len(split.train) == 160 and len(split.validation) == 40
  assert set(split.train) | set(split.validation) == set(names)
  assert make_split(names[::-1], SplitConfig()) == split
  assert make_split(names, SplitConfig(seed=1)).validation != split.validation
  save_split(tmp_path / "splits.json", split)
  assert load_split(tmp_path / "splits.json") == split
  assert make_split(["only"], SplitConfig(fraction=0)).train == ("only",)
  with pytest.raises(UserError, match="no training case is left"):
    make_split(["only"], SplitConfig())


def test_folds_are_nnunets():
  # From scikit-learn 1.x: KFold(5, shuffle=True, random_state=12345) over 12 cases.
  expected = [[0, 3, 8], [7, 10, 11], [6, 9], [1, 4], [2, 5]]
  names = [f"{i:02d}" for i in range(12)]
  for fold, members in enumerate(expected):
    split = make_split(names, SplitConfig(fold=fold))
    assert split.validation == tuple(f"{i:02d}" for i in members)
    assert not set(split.train) & set(split.validation) and len(split.train) == 12 - len(members)
  with pytest.raises(UserError, match="fold: is 5"):
    make_split(names, SplitConfig(fold=5))


PATIENTS = [f"patient{i:02d}_{frame}" for i in range(20) for frame in ("a", "b", "c")[: 1 + i % 3]]


@pytest.mark.parametrize("settings", [{}, {"fraction": 0.5, "seed": 3}, {"fold": 4}], ids=str)
def test_cases_of_one_group_stay_on_one_side(settings):
  split = make_split(PATIENTS, SplitConfig(group=r"patient\d+", **settings))
  train, validation = ({name[:9] for name in side} for side in (split.train, split.validation))
  assert not train & validation and sorted(split.train + split.validation) == PATIENTS
  # A share of the groups, the same as without their scans.
  alone = make_split(sorted(train | validation), SplitConfig(**settings))
  assert validation == set(alone.validation)
  assert split.train != make_split(PATIENTS, SplitConfig(**settings)).train


def test_the_group_is_what_the_pattern_finds_first_or_its_brackets():
  names = ["a1_b2", "a1_b3", "a2_b2", "x_a2"]
  assert list(grouped(names, r"[ab]\d")) == ["a1", "a2"]
  assert grouped(names[:3], r"_(b\d)") == {"b2": ["a1_b2", "a2_b2"], "b3": ["a1_b3"]}
  assert list(grouped(names, None)) == names
  for pattern in (r"b\d", r"x?", r"(x)?_a"):
    with pytest.raises(UserError, match="data.split.group: .* finds nothing in .* (x_a2|a1_b2)"):
      make_split(names, SplitConfig(group=pattern))


def test_groups_are_held_back_from_the_generator_whole():
  generator, refiner = divide(PATIENTS, 0.25, 3, r"patient\d+")
  groups = [{name[:9] for name in side} for side in (generator, refiner)]
  assert not groups[0] & groups[1] and [len(side) for side in groups] == [15, 5]
  assert sorted(generator + refiner) == PATIENTS
  with pytest.raises(UserError, match="0.01 of 20 groups .* leaves the refiner none"):
    divide(PATIENTS, 0.01, 3, r"patient\d+")


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is absent")
def test_a_fifth_of_acdcs_patients_validate_with_both_frames():
  names = [case.identifier for case in read_dataset(REAL / "ACDC").cases]
  split = make_split(names, SplitConfig(group=r"patient\d+"))
  assert len(split.train) == 2 * 56 and len(split.validation) == 2 * 14
  train, validation = ({name[:10] for name in side} for side in (split.train, split.validation))
  assert (len(train), len(validation)) == (56, 14)


def write_folds(path, *folds):
  """As nnU-Net v2 writes splits_final.json."""
  path.write_text(json.dumps([{"train": t, "val": v} for t, v in folds], indent=4))
  return str(path)


def test_a_split_is_taken_from_nnunets_file(tmp_path):
  names = [f"case_{i}" for i in range(6)]
  folds = (names[:1:-1], names[:2]), (names[:3], names[4:])
  path = write_folds(tmp_path / "splits_final.json", *folds)
  for fold, (train, validation) in enumerate(folds):
    split = make_split(names, SplitConfig(file=path, fold=fold))
    assert (split.train, split.validation) == (tuple(sorted(train)), tuple(validation))
  assert len(make_split(names, SplitConfig(file=path, fold=0, train_cases=2)).train) == 2
  one = write_folds(tmp_path / "one.json", folds[1])
  assert make_split(names, SplitConfig(file=one)).validation == tuple(names[4:])


@pytest.mark.parametrize(("folds", "settings", "says"), [
  ([(["a1"], ["b1"]), (["b1"], ["a1"])], {}, "has 2 folds; give one as data.split.fold, 0 to 1"),
  ([(["a1"], ["b1"])], {"fold": 1}, "split.fold: is 1, but .* has 1; give 0 to 0"),
  ([(["a1", "c1"], ["b1"])], {}, "fold 0 has the case c1, which the data set has not"),
  ([(["a1", "b1"], ["b1"])], {}, "fold 0 has the case b1 on both sides"),
  ([(["a1", "b1"], ["a2"])], {"group": "[ab]"}, r"has cases of a \(data.split.group\) on both"),
  ([([], ["a1"])], {}, "fold 0 has no case to train on"),
  ([("a1", ["b1"])], {}, "is no list of"), ([([1], [])], {}, "is no list of"),
  ([], {}, "is no list of"),
])
def test_a_file_of_splits_that_does_not_fit_is_refused(tmp_path, folds, settings, says):
  path = write_folds(tmp_path / "splits_final.json", *folds)
  with pytest.raises(UserError, match=says) as error:
    make_split(["a1", "a2", "b1"], SplitConfig(file=path, **settings))
  assert "splits_final.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is absent")
def test_the_decathlons_layout_is_read():
  data = read_dataset(REAL / "Task04_Hippocampus")
  assert data.name == "Hippocampus" and data.channels == ("MRI",) and len(data.cases) == 200
  assert data.labels.names == ("Anterior", "Posterior")
  volume, atoms = read_case(data.cases[0], 1, data.labels)
  assert atoms.shape == volume.array.shape[1:] and set(np.unique(atoms)) == {0, 1, 2}
