"""Data sets, damaged or changed: what describes them, their files, and a run that goes on."""

import json
import shutil

import nibabel as nib
import numpy as np
from damage import WAYS
from frame import Attempt, kind, main
from texts import TEXTS


@kind("data sets")
def datasets():
  def copied(folder, stage):
    shutil.copytree(stage.dataset, folder / "data")
    return folder / "data"

  def of(folder, stage, *names):
    """Training that must be refused before it starts."""
    return Attempt(
      lambda: main(["train", str(stage.config), f"data.dataset={folder / 'data'}", "--out",
                    str(folder / "run")]),
      ("data/", *names))

  def described_as(folder, stage):
    """What evaluate calls the structures, as json reads them."""
    scores = folder / "out" / "scores.json"

    def names_are_the_files() -> str:
      labels = json.loads((folder / "data" / "dataset.json").read_text("utf-8"))["labels"]
      wanted = {name for name, value in labels.items() if value != 0 and name != "ignore"}
      if any(type(value) not in (int, list) for value in labels.values()):
        return "a value is no whole number"
      found = set(json.loads(scores.read_text("utf-8"))["structures"])
      return "" if found == wanted else f"structures {sorted(found)}, the file has {sorted(wanted)}"
    return Attempt(
      lambda: main(["evaluate", str(stage.labels), str(stage.labels), "--labels",
                    str(folder / "data"), "--scores", str(scores)]),
      ("data/",), folder / "out", names_are_the_files)

  for name, text in TEXTS.items():
    def described(folder, rng, stage, text=text):
      (copied(folder, stage) / "dataset.json").write_bytes(text)
      return described_as(folder, stage)
    yield f"dataset.json {name}", described
  for name, change in {
    "no labels": {"labels": None}, "labels empty": {"labels": {}}, "labels is a list":
    {"labels": [1]}, "label text": {"labels": {"background": 0, "a": "x"}},
    "label list": {"labels": {"background": 0, "a": [[1]]}}, "label huge":
    {"labels": {"background": 0, "a": 2**40}}, "label null": {"labels": {"a": None}},
    "label NaN": {"labels": {"a": float("nan")}}, "infinite": {"labels": {"a": float("inf")}},
    "channels empty": {"channel_names": {}}, "channels two": {"channel_names": {"0": "CT", "1":
    "MR"}}, "channels null": {"channel_names": None}, "channels text": {"channel_names": "CT"},
    "channel x": {"channel_names": {"x": "CT"}}, "ending": {"file_ending": ".png"},
    "ending null": {"file_ending": None}, "ending number": {"file_ending": 7},
    "dataset is a list": {"dataset": []}, "dataset is outside": {"dataset": {"a": {
      "images": ["../../gone.nii.gz"], "label": "../gone.nii.gz"}}},
    "name with a slash": {"dataset": {"a/../b": {"images": ["imagesTr/x.nii.gz"], "label": "x"}}},
    "order": {"regions_class_order": "x", "labels": {"background": 0, "a": [1, 2]}},
    "ignore": {"labels": {"background": 0, "a": 1, "ignore": 1}},
    "300 labels": {"labels": {str(n): n for n in range(300)}},
    "two at 0": {"labels": {"background": 0, "a": 0, "b": 1}}, "background 1": {"labels": {
      "background": 1, "a": 2}}, "order twice": {"regions_class_order": [1, 1], "labels": {
        "background": 0, "a": [1, 2], "b": [2]}}, "channel 1": {"channel_names": {"1": "CT"}},
    "numTraining": {"numTraining": 7}, "numTraining text": {"numTraining": "x"},
    **{f"label {value!r}": {"labels": {"background": 0, "a": value}}
       for value in (2.5, True, -1, "two", "", [1, 1], [1.5])},
  }.items():
    def changed(folder, rng, stage, change=change):
      path = copied(folder, stage) / "dataset.json"
      path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **change}))
      return described_as(folder, stage)
    yield f"dataset.json: {name}", changed
  for way, damage in WAYS.items():
    if way == "flip 8":
      continue  # as flip
    def damaged(folder, rng, stage, damage=damage):
      path = copied(folder, stage) / "dataset.json"
      path.write_bytes(damage(path.read_bytes(), rng))
      return described_as(folder, stage)
    yield f"dataset.json {way}", damaged
  for what in ("no labelsTr", "one label gone", "no imagesTr", "no images", "one image gone",
               "folder", "label is a folder", "image is empty", "image is NaN", "label of floats",
               "label unknown", "label of another shape", "image of another shape", "labels empty"):
    def files(folder, rng, stage, what=what):
      data = copied(folder, stage)
      images, labels = sorted((data / "imagesTr").iterdir()), sorted((data / "labelsTr").iterdir())
      image, label = images[1], labels[1]
      if what in ("no labelsTr", "no imagesTr"):
        shutil.rmtree(data / what.split()[1])
      elif what == "folder":
        shutil.rmtree(data)
      elif what == "no images":
        for file in images:
          file.unlink()
      elif what.endswith("gone"):
        (label if "label" in what else image).unlink()
      elif what == "label is a folder":
        label.unlink()
        label.mkdir()
      elif what == "image is empty":
        image.write_bytes(b"")
      elif what == "labels empty":
        for file in labels:
          old = nib.load(file)
          nib.save(nib.Nifti1Image(np.asarray(old.dataobj) * 0, old.affine), file)
      else:
        file = image if what.startswith("image") else label
        old = nib.load(file)
        array = np.asarray(old.dataobj).astype(np.float32)
        if "shape" in what:
          array = array[:-2]
        else:
          array[2, 3, 4] = {"image is NaN": np.nan, "label of floats": 0.5}.get(what, 77)
        nib.save(nib.Nifti1Image(array, old.affine), file)
      return of(folder, stage, "data:", label.name.removesuffix(".nii.gz"), "Phantom:")
    yield what, files


@kind("data sets that change while a run is interrupted")
def changed_data():
  for what in ("moved", "label map", "image", "labels", "channels", "cases exchanged", "case gone"):
    def make(folder, rng, stage, what=what):
      data, run = folder / "data", folder / "run"
      shutil.copytree(stage.dataset, data)
      shutil.copytree(stage.run, run)
      split = json.loads((run / "splits.json").read_text("utf-8"))
      first, second = [*split["train"], *split["validation"]][:2]
      description = data / "dataset.json"
      content = json.loads(description.read_text("utf-8"))
      if what in ("label map", "image"):
        path = (data / "labelsTr" / f"{first}.nii.gz" if what == "label map" else
                data / "imagesTr" / f"{first}_0000.nii.gz")
        old = nib.load(path)
        array = np.asarray(old.dataobj).copy()
        array.flat[int(rng.integers(array.size))] += 1
        nib.save(nib.Nifti1Image(array, old.affine, old.header), path)
      elif what == "labels":
        names = content["labels"]
        names["liver"], names["spleen"] = names["spleen"], names["liver"]
      elif what == "channels":
        content["channel_names"]["0"] = "MRI"
      elif what != "moved":
        for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
          one, other = (data / part / f"{name}{ending}" for name in (first, second))
          kept = one.read_bytes()
          one.write_bytes(other.read_bytes())
          other.write_bytes(kept)
          if what == "case gone":
            one.unlink()
      content["numTraining"] -= what == "case gone"
      description.write_text(json.dumps(content))
      return Attempt(
        lambda: main(["train", str(stage.config), f"data.dataset={data}", "--out", str(run),
                      "--resume"]),
        ("data/", "splits.json"), None, (lambda: "") if what == "moved" else None, what == "moved")
    yield what, make
