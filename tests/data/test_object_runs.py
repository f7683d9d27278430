"""Runs of slices with objects, of prepared cases and of a stream: what a tracker is trained on."""

import itertools

import numpy as np
from scipy import ndimage
from test_pipeline import CASES, LABELS, NO_AUGMENTATION, store, store_case  # noqa: F401

from rfmedsam2_jax.data.augmentation import AugmentationConfig
from rfmedsam2_jax.data.object_runs import CaseRuns, object_batches
from rfmedsam2_jax.data.pipeline import BatchConfig, Cases, RunConfig

RUN = RunConfig(image_size=48, slices=4, structures=3)


def of_cases(folder, augmentation=NO_AUGMENTATION, run=RUN, cases=CASES):
  return CaseRuns(Cases(folder, cases, 7), run, LABELS.membership, augmentation)


def test_objects_are_structures_or_their_parts_seen_as_the_image_shows_them(store):  # noqa: F811
  """The image is the label: 1 in the core, 0.5 in the rest of the whole, 0 outside."""
  runs, parts, large = of_cases(store), 0, []
  for index in range(40):
    sample = runs(index)
    image, objects = sample["images"][..., 0], sample["objects"]
    assert image.shape == (4, 48, 48) and objects.shape == (3, 4, 48, 48)
    np.testing.assert_array_equal(sample["has"], objects.any((1, 2, 3)))
    assert sample["has"][0] and (objects[0, 0].any() or objects[0, -1].any())
    for mask in objects[sample["has"]]:
      # Edges lie between pixels where a cut was enlarged.
      inside = ndimage.binary_erosion(mask, np.ones((1, 3, 3)))
      assert image[inside].min(initial=1) > 0.2
      parts += ndimage.label(mask, np.ones((3, 3, 3)))[1] == 1
    large.append(objects[0].any(0).sum() ** 0.5 / 48)
  assert parts > 20
  assert max(large) > 0.4 and min(large) < 0.3


def test_runs_are_a_function_of_the_seed_and_their_number_whatever_the_source(store):  # noqa: F811
  def stream(index):
    return of_cases(store)(0) | {"case": np.array(0, np.int32), "has": np.zeros(3, bool)}

  sources = [(of_cases(store, AugmentationConfig()), 3.0, len(CASES)), (stream, 1.0, 1)]
  whole = list(itertools.islice(object_batches(sources, 5, BatchConfig(4)), 6))
  later = next(object_batches(sources, 5, BatchConfig(4, rows=[2, 3], start=3)))
  for name, x in later.items():
    np.testing.assert_array_equal(x, whole[3][name][2:])
  cases = np.concatenate([batch["case"] for batch in whole])
  assert set(cases) == {0, 1, 2, 3} and 1 <= (cases == 3).sum() <= 12
  assert not np.concatenate([batch["has"] for batch in whole])[cases == 3].any()


def test_a_run_with_voxels_that_nobody_labelled_has_no_objects(tmp_path):
  atoms = np.zeros((6, 32, 32), np.uint8)
  atoms[:, 8:20, 8:20] = 1
  store_case(tmp_path, "case0", atoms[None], atoms)
  assert of_cases(tmp_path, cases=("case0",))(0)["has"].any()
  atoms[:, 0, 0] = 255
  store_case(tmp_path, "case1", atoms[None], atoms)
  assert not of_cases(tmp_path, cases=("case1",))(0)["has"].any()
