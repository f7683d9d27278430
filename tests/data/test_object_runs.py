"""Runs of slices with objects, of prepared cases and of a stream: what a tracker is trained on."""

import itertools

import numpy as np
from scipy import ndimage
from test_pipeline import CASES, LABELS, NO_AUGMENTATION, store, store_case  # noqa: F401

from rfmedsam2_jax.data import synthetic
from rfmedsam2_jax.data.augmentation import AugmentationConfig
from rfmedsam2_jax.data.object_runs import CaseRuns, SyntheticRuns, object_batches
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


def test_a_synthetic_run_is_seen_three_times_around_another_object(monkeypatch):
  """Three squares of their own brightness; what is seen of them is where their masks are."""
  made = []

  def run(config, seed, index, side, length, tracks):
    made.append(index)
    objects, kinds = np.zeros((tracks, length, side, side), bool), ("a", "b", "c", "", "", "")
    for number, (row, column) in enumerate([(4, 4), (4, 30), (30, 4)]):
      objects[number, :, row : row + 10, column : column + 8] = True
    return synthetic.SyntheticRun((objects * np.array([0.4, 0.6, 0.8] + [0] * 3)[
      :, None, None, None]).sum(axis=0).astype(np.float32), objects, kinds)

  monkeypatch.setattr(synthetic, "synthetic_run", run)
  runs, first, sizes = SyntheticRuns(11, RUN), set(), []
  samples = [runs(index) for index in range(192)]
  assert made == list(range(64))
  for views in zip(samples[:64], samples[64:128], samples[128:], strict=True):
    shades = []
    for sample in views:
      image, objects = sample["images"][..., 0], sample["objects"][sample["has"]]
      for mask in objects:
        inside = ndimage.binary_erosion(mask, np.ones((1, 3, 3)), border_value=1)
        assert np.ptp(image[inside]) < 0.1
      shades.append(round(float(np.median(image[objects[0]])), 1))
      sizes.append(objects[0, 0].sum() / 48**2)
    first.add(tuple(shades))
  assert first == {(0.4, 0.6, 0.8)}
  whole = 80 / 48**2
  assert min(sizes) == whole and np.median(sizes) > 1.5 * whole
