"""One grammar of prompts in JSON, in the file of a volume and in the file of many cases."""

import json

import pytest

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.prompt_entries import read_entries, read_entries_by_case

LABELS = Labels((Structure("liver", (3,)), Structure("aorta", (5,))), False, (3, 5))
BOX, POINTS = [[1, 2, 3], [4.5, 5, 3]], [[1, 2, 3, 1], [2, 2, 3, 0]]


def test_both_files_say_the_same(tmp_path):
  where = {"box": BOX, "points": POINTS, "round": 2}
  one, many = tmp_path / "one.json", tmp_path / "many.json"
  one.write_text(json.dumps([{"label": 3, **where}]))
  many.write_text(json.dumps({"a": [{"structure": "liver", **where}, {"label": 5, **where}]}))
  (alone,) = read_entries(one)
  named, valued = read_entries_by_case(many, LABELS)["a"]
  assert (alone.structure, named.structure, valued.structure) == (3, "liver", 5)
  assert alone.source == f"{one}: prompt 0" and valued.source == f"{many}: case a: prompt 1"
  for entry in (alone, named, valued):
    assert entry.box.tolist() == BOX and entry.round == 2
    assert entry.points.tolist() == [[1, 2, 3], [2, 2, 3]] and entry.inside == (True, False)


@pytest.mark.parametrize("entry, says", [
  (7, "keys besides"),
  ({"box": BOX, "boxes": BOX}, "keys besides"),
  ({"points": POINTS, "round": -1}, "as round"),
  ({}, "box is two corners"),
  ({"box": BOX[:1]}, "box is two corners"),
  ({"box": POINTS}, "box is two corners"),
  ({"points": [[1, 2, float("nan"), 1]]}, "box is two corners"),
  ({"points": "here"}, "box is two corners"),
])
def test_a_wrong_entry_is_named_alike_in_both(tmp_path, entry, says):
  path = tmp_path / "prompts.json"
  read = {"label": read_entries, "structure": lambda p: read_entries_by_case(p, LABELS)}
  for key, value in (("label", 3), ("structure", "liver")):
    whole = {key: value, **entry} if isinstance(entry, dict) else entry
    path.write_text(json.dumps([whole] if key == "label" else {"a": [whole]}))
    with pytest.raises(UserError, match="prompts.json: .*prompt 0: .*") as error:
      read[key](path)
    assert says in str(error.value)


@pytest.mark.parametrize("names", [
  {}, {"structure": "nose"}, {"structure": ["liver"]}, {"label": 4}, {"label": True},
  {"structure": "liver", "label": 5},
])
def test_a_structure_is_named_once_and_known(tmp_path, names):
  path = tmp_path / "prompts.json"
  path.write_text(json.dumps({"a": [{"box": BOX, **names}]}))
  with pytest.raises(UserError, match="one of liver, aorta, or its label"):
    read_entries_by_case(path, LABELS)
