"""Label maps, damaged or with names: evaluate, prompts from masks, true boxes."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import witnesses
from damage import WAYS
from frame import Attempt, kind, main
from stage import affine
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
