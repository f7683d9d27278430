"""Lines that a person draws become few points, the same ones every time."""

import json

import nibabel as nib
import numpy as np
import pytest

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.prompt_entries import read_entries
from rfmedsam2_jax.data.scribbles import MOST_POINTS, points_of_line
from rfmedsam2_jax.data.volumes import load_image
from rfmedsam2_jax.prompted.slice_frame import read_prompts


def test_points_lie_in_the_middle_of_equal_parts():
  # A circle, of which every arc is known.
  turn = np.linspace(0, 2 * np.pi, 721)
  circle = np.stack([20 * np.cos(turn), 20 * np.sin(turn), np.full_like(turn, 7)], axis=1)
  expected = np.pi * (np.arange(MOST_POINTS) + 0.5) * 2 / MOST_POINTS
  found = points_of_line(circle)
  np.testing.assert_allclose(
    found, np.stack([20 * np.cos(expected), 20 * np.sin(expected), 0 * expected + 7], 1), atol=0.01)
  # A hand that rests, or is looked at more often, changes nothing.
  np.testing.assert_allclose(points_of_line(np.repeat(circle, 3, axis=0)), found)
  np.testing.assert_allclose(points_of_line(circle[::-1]), found[::-1], atol=1e-9)


@pytest.mark.parametrize("length, count", [(0, 1), (0.5, 1), (1, 1), (2, 2), (3.5, 3), (90, 4)])
def test_a_short_line_is_fewer_points(length, count):
  found = points_of_line([[1, 2, 3], [1, 2 + length, 3]])
  assert found.shape == (count, 3) and np.isfinite(found).all()
  assert found[:, 1].mean() == pytest.approx(2 + length / 2)


def test_a_file_of_prompts_may_have_lines_beside_the_rest(tmp_path):
  nib.save(nib.Nifti1Image(np.ones((30, 26, 11), np.int16), np.diag([2, 2.5, 4, 1])),
           tmp_path / "scan.nii")  # R, A, S: canonical (z, y, x) is (k, 25 - j, 29 - i)
  lines = [{"path": [[4, 6, 5], [12, 6, 5]]}, {"path": [[20, 3, 5]], "inside": False}]
  (tmp_path / "p.json").write_text(json.dumps(
    [{"label": 1, "box": [[2, 2, 5], [14, 9, 5]], "points": [[9, 9, 5, 1]], "lines": lines},
     {"label": 2, "round": 1, "lines": lines[:1]}]))
  geometry = load_image(tmp_path / "scan.nii").geometry
  first, second = read_prompts(tmp_path / "p.json", geometry)
  drawn = [(5, 19, 29 - i, True) for i in (5, 7, 9, 11)]
  assert first.points == ((5, 16, 20, True), *drawn, (5, 22, 9, False))
  assert first.box == ((5, 23, 27), (5, 16, 15))
  assert second.points == tuple(drawn) and second.round == 1


@pytest.mark.parametrize("lines", [
  [[1, 2, 3]], [{"path": []}], [{"path": [[1, 2]]}], [{"path": [[1, 2, 3]], "inside": "yes"}],
  [{"path": [[1, 2, 3]], "width": 3}], [{"path": [[1, 2, 1e12]]}], {"path": [[1, 2, 3]]}, 5,
])
def test_what_is_no_line_is_one_line(tmp_path, lines):
  (tmp_path / "p.json").write_text(json.dumps([{"label": 1, "lines": lines}]))
  with pytest.raises(UserError, match="prompt 0: .*lines are"):
    read_entries(tmp_path / "p.json")
