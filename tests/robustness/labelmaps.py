"""Label maps and data sets, damaged: evaluate, prompts from masks, true boxes, and training."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import witnesses
from damage import WAYS
from frame import Attempt, kind, main
from stage import affine
from texts import TEXTS
from volumes import predict, save


def changes():
  """name -> (labels uint8, random numbers) -> array; what each makes of a label map."""
  def at(value, kind=np.float64):
    def change(labels, rng):
      result = labels.astype(kind)
      result.flat[int(rng.integers(result.size))] = value
      return result
    return change

  return {
    "holes": lambda a, r: np.where(r.random(a.shape) < 0.3, 0, a), "floats": lambda a, r:
    a.astype(np.float32), "half": at(0.5), "NaN": at(np.nan), "infinite": at(np.inf),
    "negative": at(-1, np.int16), "huge": at(2**40, np.int64), "beyond 16 bits":
    at(70000, np.int32),
    "unknown": at(77, np.uint8), "empty": lambda a, r: a * 0, "all one": lambda a, r: a * 0 + 1,
    "noise": lambda a, r: r.integers(0, 200, a.shape).astype(np.uint8),
    "4D": lambda a, r: np.stack([a, a], axis=-1), "4D of 1": lambda a, r: a[..., None],
    "2D": lambda a, r: a[..., 0], "other shape": lambda a, r: a[:-1], "one voxel":
    lambda a, r: a[:1, :1, :1], "complex": lambda a, r: a.astype(np.complex64),
    "many values": lambda a, r: np.arange(a.size, dtype=np.int32).reshape(a.shape),
  }


def whole_numbers(path: Path) -> np.ndarray:
  array = witnesses.read(path).array.astype(np.float64)
  assert np.abs(array - np.rint(array)).max() < 0.05  # as near as a stored slope comes
  return np.rint(array).astype(np.int64)


@kind("label maps of evaluate")
def evaluated():
  def of(folder, stage, path, reference, named):
    scores = folder / "out" / "scores.json"

    def dice_is_numpys() -> str:
      ours, truth = whole_numbers(path), whole_numbers(reference)
      found = json.loads(scores.read_text("utf-8"))["cases"]["scan"]
      for value in sorted({*np.unique(ours).tolist(), *np.unique(truth).tolist()} - {0})[:50]:
        a, b = ours == value, truth == value
        dice = 2 * float((a & b).sum()) / float(a.sum() + b.sum())
        if abs(found[str(value)]["dice"] - dice) > 1e-6:
          return f"Dice of {value} is {found[str(value)]['dice']}, numpy says {dice}"
      return ""
    first, second = (path, reference) if named == "prediction" else (reference, path)
    return Attempt(lambda: main(["evaluate", str(first), str(second), "--scores", str(scores)]),
                   ("scan.nii",), folder / "out", dice_is_numpys)

  for side in ("prediction", "reference"):
    for name, change in changes().items():
      if name == "many values":
        continue  # 4320 structures: an hour of surfaces that nobody asks for
      def make(folder, rng, stage, change=change, side=side):
        labels = np.asarray(nib.load(stage.labels).dataobj)
        path = save(folder / "scan.nii.gz", change(labels, rng))
        return of(folder, stage, path, stage.labels, side)
      yield f"{side}: {name}", make
  for way, damage in WAYS.items():
    for number in range(1):
      def damaged(folder, rng, stage, damage=damage):
        path = folder / "scan.nii"
        nib.save(nib.load(stage.labels), path)
        path.write_bytes(damage(path.read_bytes(), rng))
        return of(folder, stage, path, stage.labels, "prediction")
      yield f"{way} {number}", damaged
  for voxel in ("uint8", "int16", "uint16"):
    def scaled(folder, rng, stage, voxel=voxel):
      labels = nib.load(stage.labels)
      image = nib.Nifti1Image(np.asarray(labels.dataobj, np.float64) * 7, labels.affine)
      image.set_data_dtype(voxel)  # nibabel chooses a slope
      nib.save(image, folder / "scan.nii.gz")
      attempt = of(folder, stage, folder / "scan.nii.gz", stage.labels, "prediction")
      return Attempt(attempt.call, attempt.names, attempt.out, attempt.judge, True)
    yield f"scaled {voxel}", scaled
  for name, matrix in (("moved", affine() + np.pad([[30.0]], ((0, 3), (3, 0)))),
                       ("stretched", affine() * [2, 1, 1, 1])):
    def placed(folder, rng, stage, matrix=matrix):
      labels = np.asarray(nib.load(stage.labels).dataobj)
      path = save(folder / "scan.nii.gz", labels, matrix)
      attempt = of(folder, stage, path, stage.labels, "prediction")
      return Attempt(attempt.call, attempt.names, attempt.out)
    yield name, placed


@kind("label maps that name their values")
def named():
  def written(path, stage, names, layers):
    """Its segments by SimpleITK, which writes what 3D Slicer reads; `names`: value -> name."""
    image = sitk.ReadImage(str(stage.labels))
    if layers:
      image = sitk.Compose([sitk.Cast(image == value, sitk.sitkUInt8) for value in names])
    for number, (value, name) in enumerate(names.items()):
      place = (1, number) if layers else (value, 0)
      for key, text in zip(("Name", "LabelValue", "Layer"), (name, *place), strict=True):
        image.SetMetaData(f"Segment{number}_{key}", str(text))
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path

  cases = {
    "as the run": ({1: "liver", 2: "spleen"}, True), "capitals": ({1: "LIVER"}, True),
    "exchanged": ({2: "liver", 1: "spleen"}, True), "numbers": ({1: "Segment_1"}, True),
    "layers": ({1: "liver", 2: "spleen"}, True), "another": ({1: "tumor"}, False),
    "layers exchanged": ({2: "liver", 1: "spleen"}, True),
    "both one": ({1: "liver", 2: "Liver"}, False), "text": ({"one": "liver"}, False),
    "huge": ({10**30: "liver"}, True),
  }
  for name, (names, right) in cases.items():
    def make(folder, rng, stage, name=name, names=names, right=right):
      path = written(folder / "labels" / "scan.seg.nrrd", stage, names, name.startswith("layers"))
      scores = folder / "out" / "scores.json"

      def dice_is_by_name() -> str:
        truth = whole_numbers(stage.labels)
        found = json.loads(scores.read_text("utf-8"))["cases"]["scan"]
        value_of = {text.lower(): value for value, text in names.items() if value in (1, 2)}
        for value, structure in ((1, "liver"), (2, "spleen")):
          theirs, ours = truth == value, truth == value_of.get(structure, value)
          dice = 2 * float((ours & theirs).sum()) / float(ours.sum() + theirs.sum())
          if abs(found[structure]["dice"] - dice) > 1e-6:
            return f"Dice of {structure} is {found[structure]['dice']}, by its name {dice}"
        return ""
      return Attempt(
        lambda: main(["evaluate", str(path), str(stage.labels), "--labels", str(stage.run),
                      "--scores", str(scores)]),
        ("scan.seg.nrrd",), folder / "out", dice_is_by_name if right else None, right)
    yield f"evaluate {name}", make


@kind("label maps as prompts")
def masks():
  for name, change in changes().items():
    def tracked(folder, rng, stage, change=change):
      labels = np.asarray(nib.load(stage.labels).dataobj)
      path = save(folder / "masks.nii.gz", change(labels, rng))
      out = folder / "out"

      def right() -> str:
        wanted = {str(v) for v in np.unique(whole_numbers(path)) if v}
        found = set(json.loads((out / "scan.json").read_text("utf-8"))["structures"])
        return "" if found == wanted else f"structures {sorted(found)}, the map has {wanted}"
      return Attempt(
        lambda: main(["track", str(stage.scan), "--checkpoint", str(stage.checkpoint), "--masks",
                      str(path), "--out", str(out)]),
        ("masks.nii.gz", "label"), out, right)
    if name != "noise":
      yield f"track {name}", tracked
    for how in ("oracle", "given"):
      def guided(folder, rng, stage, change=change, how=how):
        labels = np.asarray(nib.load(stage.labels).dataobj)
        (folder / "labels").mkdir()
        path = save(folder / "labels" / "scan.nii.gz", change(labels, rng))
        attempt = predict(stage, stage.scan, folder, "--prompts", how, "--labels", path.parent)
        return Attempt(attempt.call, ("labels/scan.nii.gz",), attempt.out, lambda: (
          "" if set(np.unique(whole_numbers(path))) <= set(range(6)) else "unknown values"))
      yield f"predict {how} {name}", guided


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
