"""Files that say which value is which structure, as pynrrd and nibabel write those of others."""

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import Labels, Structure, load_labels
from rfmedsam2_jax.data.segmentations import write_segmentation
from rfmedsam2_jax.data.segments import load_by_name, load_masks, segments_of
from rfmedsam2_jax.data.volumes import load_grid, load_label_map
from rfmedsam2_jax.prompted.slice_frame import names_of, read_masks

VALUES = {"liver": 1, "left_kidney": 2, "aorta": 3}
SPACING = (1.5, 2.0, 3.0)


def slicer(path, layers, segments):
  """A .seg.nrrd with `layers` [L, i, j, k], in LPS; `segments` are fields by number."""
  directions = np.diag(SPACING).tolist()
  many = len(layers) > 1
  header = {"space": "left-posterior-superior", "space origin": [0, 0, 0], "encoding": "gzip",
            "kinds": ["list"] * many + ["domain"] * 3,
            "space directions": [[np.nan] * 3] * many + directions}
  for number, fields in segments.items():
    header |= {f"Segment{number}_{key}": str(value) for key, value in fields.items()}
  nrrd.write(str(path), np.asarray(layers if many else layers[0], np.uint8), header)
  return path


def named(*names_and_values):
  return {number: {"ID": f"Segment_{number}", "Name": name, "LabelValue": value, "Layer": layer}
          for number, (name, value, layer) in enumerate(names_and_values)}


@pytest.fixture
def voxels():
  return np.random.default_rng(0).integers(0, 4, (5, 4, 3)).astype(np.uint8)


def renumbered(voxels):
  return np.array([0, 3, 1, 2], np.uint8)[voxels]  # liver is 3, left kidney 1, aorta 2


def in_lps(path):
  return sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS"))


@pytest.mark.parametrize("names", [
  ("liver", "left_kidney", "aorta"), ("Liver", "Left kidney", "AORTA"),
  ("liver", "left  kidney", "label 3"),  # what `track` calls value 3
])
def test_values_of_a_segmentation_are_those_of_its_names(tmp_path, voxels, names):
  path = slicer(tmp_path / "a.SEG.NRRD", [renumbered(voxels)], named(
    *[(name, value, 0) for name, value in zip(names, (3, 1, 2), strict=True)]))
  expected = np.array([0, 2, 3, 1])[in_lps(path)]
  np.testing.assert_array_equal(load_by_name(path, load_grid(path), VALUES), expected)
  np.testing.assert_array_equal(load_label_map(path, load_grid(path)), in_lps(path))


@pytest.mark.parametrize("code", [0, 30])  # TotalSegmentator's, Workbench's
def test_the_table_of_labels_in_a_niftis_header_is_read(tmp_path, voxels, code):
  table = "".join(f'<Label Key="{value}" Red="0.1" Green="0" Blue="1" Alpha="1">{name}</Label>\n'
                  for name, value in (("<![CDATA[liver]]>", 3), ("Left&#32;kidney", 1),
                                      ("<![CDATA[aorta]]>", 2), ("<![CDATA[???]]>", 0)))
  image = nib.Nifti1Image(renumbered(voxels), np.diag([-1.0, -1, 1, 1]))
  image.header.extensions.append(nib.nifti1.Nifti1Extension(code, (
    '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension><VolumeInformation Index="0"> '
    f"<LabelTable>{table}</LabelTable></VolumeInformation></CaretExtension>").encode()))
  nib.save(image, tmp_path / "a.nii.gz")
  found = load_by_name(tmp_path / "a.nii.gz", load_grid(tmp_path / "a.nii.gz"), VALUES)
  np.testing.assert_array_equal(found, voxels.T)


def test_layers_become_one_map_and_older_segmentations_have_one_per_segment(tmp_path, voxels):
  parts = [voxels == value for value in (1, 2, 3)]
  newer = slicer(tmp_path / "new.seg.nrrd", [parts[1], parts[0] * 7 + parts[2] * 1], named(
    ("left_kidney", 1, 0), ("liver", 7, 1), ("aorta", 1, 1)))
  older = slicer(tmp_path / "old.seg.nrrd", parts, {
    0: {"Name": "liver"}, 1: {"Name": "left_kidney"}, 2: {"Name": "aorta"}})
  plain = slicer(tmp_path / "plain.nrrd", [voxels], {})
  for path in (newer, older):
    np.testing.assert_array_equal(load_by_name(path, load_grid(path), VALUES), in_lps(plain))
    with pytest.raises(UserError, match="layers. where a 3D label map is expected"):
      load_label_map(path, load_grid(path))
  with pytest.raises(UserError, match="has 2 layers .*does not name its segments"):
    load_by_name(slicer(tmp_path / "b.seg.nrrd", parts[:2], {}), load_grid(newer), VALUES)


@pytest.mark.parametrize(("segments", "says"), [
  (named(("spleen", 1, 0)), "calls value 1 'spleen', and in the data set it is 'liver'"),
  (named(("liver", 1, 0), ("Liver", 2, 0)), "'liver' and 'Liver' would both be the value 1"),
  # 1 is called left kidney, so that 2, which is called nothing, would be two things.
  (named(("left_kidney", 1, 0)), "would both be the value 2"),
  (named(("liver", 1, 0), ("tumor", 1, 0)), "calls value 1 both 'liver' and 'tumor'"),
  ({0: {"Name": "liver", "LabelValue": "one"}}, "whose value or layer is no number"),
])
def test_names_that_contradict_the_data_set_are_refused(tmp_path, voxels, segments, says):
  path = slicer(tmp_path / "a.seg.nrrd", [voxels], segments)
  with pytest.raises(UserError, match=says) as error:
    load_by_name(path, load_grid(path), VALUES)
  assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_names_that_say_nothing_leave_values_as_they_are(tmp_path, voxels):
  path = slicer(tmp_path / "a.seg.nrrd", [voxels], named(
    ("Segment_1", 1, 0), ("2", 2, 0), ("", 3, 0), ("heart", 9, 0)))  # 9 does not occur
  np.testing.assert_array_equal(load_by_name(path, load_grid(path), VALUES), in_lps(path))


def test_a_data_set_that_only_numbers_a_value_does_not_contradict_its_name(tmp_path, voxels):
  path = slicer(tmp_path / "a.seg.nrrd", [voxels], named(("spleen", 1, 0)))
  found = load_by_name(path, load_grid(path), {"label 1": 1})
  np.testing.assert_array_equal(found == 1, in_lps(path) == 1)


def test_overlaps_are_refused_where_a_voxel_has_one_structure_and_are_regions_else(tmp_path):
  whole, core = np.zeros((2, 5, 4, 3), np.uint8)
  whole[1:4], core[2] = 1, 1
  path = slicer(tmp_path / "a.seg.nrrd", [core, whole], named(("core", 1, 0), ("whole", 1, 1)))
  with pytest.raises(UserError, match="overlaps other segments in 12 voxels"):
    load_by_name(path, load_grid(path), {"whole": 1, "core": 2})
  labels = Labels((Structure("whole", (1, 2)), Structure("core", (2,))), True, (1, 2))
  found = load_labels(path, load_grid(path), labels)
  assert labels.membership[labels.to_atoms(found)].sum(axis=(0, 1, 2)).tolist() == [36, 12]


def test_structures_that_are_not_selected_are_background_by_name_too(tmp_path, voxels):
  labels = Labels((Structure("aorta", (3,)),), False, (3,), (1, 2), None, ("liver", "left_kidney"))
  path = slicer(tmp_path / "a.seg.nrrd", [renumbered(voxels)], named(
    ("liver", 3, 0), ("left kidney", 1, 0), ("aorta", 2, 0)))
  atoms = labels.to_atoms(load_labels(path, load_grid(path), labels))
  np.testing.assert_array_equal(atoms, in_lps(path) == 2)


def test_our_own_segmentations_say_what_they_are(tmp_path, voxels):
  path = slicer(tmp_path / "grid.nrrd", [voxels], {})
  grid, names = load_grid(path), {1: "liver", 2: "left_kidney", 3: "aorta"}
  write_segmentation(tmp_path / "b.seg.nrrd", load_label_map(path, grid), grid, names)
  assert {s.value: s.name for s in segments_of(tmp_path / "b.seg.nrrd")} == names
  other = {"aorta": 1, "liver": 2, "left_kidney": 3}
  found = load_by_name(tmp_path / "b.seg.nrrd", grid, other)
  np.testing.assert_array_equal(found, np.array([0, 2, 3, 1])[in_lps(path)])


def test_masks_as_prompts_keep_values_and_names_of_every_layer(tmp_path, voxels):
  whole, core = (voxels > 0).astype(np.uint8), (voxels == 3) * np.uint8(2)
  path = slicer(tmp_path / "a.seg.nrrd", [whole, core], named(("organ", 1, 0), ("label 5", 2, 1)))
  grid = load_grid(path)
  prompts = read_masks(path, grid)
  assert [(p.label, p.name) for p in prompts] == [(1, "organ"), (5, "")]
  assert [int(p.mask.sum()) for p in prompts] == [int(whole.sum()), int(core.sum()) // 2]
  assert names_of(prompts) == {1: "organ"}
  other = slicer(tmp_path / "b.seg.nrrd", [voxels], named(("spleen", 1, 0)))
  with pytest.raises(UserError, match="b.seg.nrrd: calls label 1 'spleen', but .*a.seg.nrrd calls"):
    names_of([*prompts, *read_masks(other, grid)])
  clash = slicer(tmp_path / "c.seg.nrrd", [whole, core // 2], named(("a", 1, 0), ("b", 1, 1)))
  with pytest.raises(UserError, match="'a' and 'b' would both be the value 1"):
    load_masks(clash, grid)
