"""A part of the campaign of damaged inputs, every kind at least once; and that it sees mistakes."""

import campaign
import cases
import frame
import pytest
import stage as staging
import volumes


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny_run, phantoms):
  return staging.build(tmp_path_factory.mktemp("stage"), tiny_run, phantoms)


def test_the_campaign_has_what_is_promised():
  found = cases.all_cases()
  assert len(found) >= 500
  assert {found[n].kind for n in campaign.quick(10**6)} == set(cases.KINDS)


@pytest.mark.slow
def test_every_share_of_damaged_inputs_is_refused_or_read(stage):
  ends = list(campaign.run_cases(stage.place, 0, campaign.quick(SHARE)))
  wrong = [f"{end.case.kind}/{end.case.name}: {end.reason}" for end in ends if end.end == "wrong"]
  assert not wrong, "\n".join(wrong)
  assert {end.end for end in ends} == {"refused", "read"}


SHARE = 40  # every 40th case of a kind


def test_a_label_map_of_other_voxels_is_a_wrong_success(stage, tmp_path):
  """The witness is no formality: the prediction of another scan is seen, and one flipped voxel."""
  import nibabel as nib
  import numpy as np

  attempt = volumes.predict(stage, stage.scan, tmp_path)
  assert attempt.call() == 0 and attempt.judge is not None and attempt.judge() == ""
  path = tmp_path / "out" / "scan.nii.gz"
  image = nib.load(path)
  array = np.asarray(image.dataobj).copy()
  array[3, 4, 5] = (array[3, 4, 5] + 1) % 3
  nib.save(nib.Nifti1Image(array, image.affine, image.header), path)
  assert "1 of " in attempt.judge()


@pytest.mark.parametrize(("status", "error", "says"), [
  (1, "", "exit status 1"),
  (2, "", "0 lines"),
  (2, "rfmedsam2: scan.nii: bad, mend it\nrfmedsam2: scan.nii: again, mend it\n", "2 lines"),
  (2, "rfmedsam2: something is bad, mend it\n", "names none"),
  (2, "rfmedsam2: scan.nii: <X object at 0x7f>, mend it\n", "no clear line"),
  (0, "zlib: bad\nrfmedsam2: warning: x\n", "another line"),
  (0, "", "nothing can be right"),
])
def test_what_is_neither_refused_nor_read_is_a_mistake(status, error, says):
  attempt = frame.Attempt(lambda: 0, ("scan.nii",))
  with pytest.raises(frame.Wrong, match=says):
    frame.judge(attempt, status, error, {})


def test_a_half_written_result_is_a_mistake(tmp_path):
  (tmp_path / ".1.scan.nii.gz").write_bytes(b"")
  attempt = frame.Attempt(lambda: 0, ("scan.nii",), tmp_path, lambda: "")
  with pytest.raises(frame.Wrong, match="temporary"):
    frame.judge(attempt, 0, "", {})
  with pytest.raises(frame.Wrong, match="something was left"):
    frame.judge(attempt, 2, "rfmedsam2: scan.nii: bad, mend it\n", {})
