"""Whole and unusual volumes: shapes, intensities, types of voxels; for predict and track."""

import json
import struct

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import witnesses
from frame import Attempt, kind, main
from stage import affine
from volumes import predict, save, save_as


@kind("shapes")
def shapes():
  cases = {
    "one voxel": (1, 1, 1), "one slice": (20, 18, 1), "one row": (20, 1, 12), "one column":
    (1, 18, 12), "line": (1, 1, 40), "2D": (20, 18), "1D": (20,), "4D of 1": (20, 18, 12, 1),
    "4D of 2": (20, 18, 12, 2), "5D": (20, 18, 12, 1, 3), "5D of 1": (20, 18, 12, 1, 1),
    "thin and long": (2, 2, 300), "7D": (4, 4, 4, 1, 1, 1, 2),
  }
  for name, shape in cases.items():
    for ending in (".nii.gz", ".nrrd", ".mha"):
      if ending != ".nii.gz" and name in ("1D", "7D", "5D", "5D of 1"):
        continue
      def make(folder, rng, stage, shape=shape, ending=ending):
        path = folder / f"scan{ending}"
        array = rng.normal(0, 50, shape).astype(np.float32)
        if ending == ".nii.gz":
          save(path, array)
        else:
          image = sitk.GetImageFromArray(array.T)
          image.SetSpacing([6.0, 6.0, 9.5, 1.0][:len(shape)])
          sitk.WriteImage(image, str(path))
        read = len(shape) == 3 or (set(shape[3:]) == {1} and ending == ".nii.gz")
        return predict(stage, path, folder, judge=read, must_read=read and ending == ".nii.gz")
      yield f"{name}{ending}", make


@kind("intensities")
def intensities():
  cases = {
    "zero": lambda a, r: a * 0, "constant": lambda a, r: a * 0 + 7, "negative zero":
    lambda a, r: a * -0.0, "one NaN": lambda a, r: placed(a, r, np.nan),
    "one infinite": lambda a, r: placed(a, r, np.inf), "all NaN": lambda a, r: a * np.nan,
    "float32's largest": lambda a, r: placed(a, r, 3.4e38),
    "both ends": lambda a, r: placed(placed(a, r, 3.4e38), r, -3.4e38),
    "all huge": lambda a, r: a * 1e36, "denormal": lambda a, r: a * 1e-42,
    "beyond float32": lambda a, r: a.astype(np.float64) * 1e300,
    "one voxel not 0": lambda a, r: placed(a * 0, r, 5), "two values": lambda a, r: np.sign(a),
  }
  for name, change in cases.items():
    for ending in (".nii.gz", ".mha"):
      def make(folder, rng, stage, change=change, ending=ending):
        array = change(stage.voxels().astype(np.float32), rng)
        path = folder / f"scan{ending}"
        if ending == ".nii.gz":
          save(path, array)
        else:
          sitk.WriteImage(sitk.GetImageFromArray(array.T), str(path))
        return predict(stage, path, folder)
      yield f"{name}{ending}", make
  for slope, inter in ((0, 0), (np.nan, 0), (1, np.nan), (np.inf, 0), (1e38, 0), (1e-45, 0),
                       (-1, 5), (1, 1e38)):
    def scaled(folder, rng, stage, slope=slope, inter=inter):
      path = save_as(stage, folder, "scan.nii")
      content = bytearray(path.read_bytes())
      struct.pack_into("<2f", content, 112, slope, inter)
      path.write_bytes(content)
      return predict(stage, path, folder)
    yield f"slope {slope:g} intercept {inter:g}", scaled


def placed(array, rng, value):
  array = array.copy()
  array.flat[int(rng.integers(array.size))] = value
  return array


@kind("types of voxels")
def types():
  for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32",
               "float64", "complex64", "complex128"):
    def make(folder, rng, stage, name=name):
      array = np.abs(stage.voxels()) % 100
      path = folder / "scan.nii.gz"
      image = nib.Nifti1Image(array.astype(name), affine(), dtype=np.dtype(name))
      nib.save(image, path)
      return predict(stage, path, folder, judge=not name.startswith("complex"))
    yield name, make
  for fields in (("R", "G", "B"), ("R", "G", "B", "A")):
    def colour(folder, rng, stage, fields=fields):
      array = np.zeros((20, 18, 12), [(f, "u1") for f in fields])
      return predict(stage, save(folder / "scan.nii.gz", array), folder, judge=False)
    yield "".join(fields), colour
  for code in (0, 1, 3, 255, 1792, -1, 32767):
    def coded(folder, rng, stage, code=code):
      path = save_as(stage, folder, "scan.nii")
      content = bytearray(path.read_bytes())
      struct.pack_into("<h", content, 70, code)
      path.write_bytes(content)
      return predict(stage, path, folder)
    yield f"NIfTI code {code}", coded
  for what in ("sitkVectorFloat32", "sitkVectorUInt8", "sitkComplexFloat32", "sitkComplexFloat64"):
    for ending in (".nrrd", ".mha"):
      def itk(folder, rng, stage, what=what, ending=ending):
        image = sitk.Image([20, 18, 12], getattr(sitk, what), 3 if "Vector" in what else 0)
        sitk.WriteImage(image, str(folder / f"scan{ending}"))
        return predict(stage, folder / f"scan{ending}", folder, judge=False)
      yield f"{what}{ending}", itk


@kind("unusual volumes of track")
def tracked():
  volumes = {
    "one voxel": lambda a, r: (a[:1, :1, :1], None), "one slice": lambda a, r: (a[..., :1], None),
    "line": lambda a, r: (a[:1, :1], None), "constant": lambda a, r: (a * 0 + 7, None),
    "zero": lambda a, r: (a * 0, None), "NaN": lambda a, r: (placed(a, r, np.nan), None),
    "huge": lambda a, r: (a * 1e30, None), "both ends": lambda a, r:
    (placed(placed(a, r, 9e14), r, -9e14), None), "denormal": lambda a, r: (a * 1e-42, None),
    "4D of 2": lambda a, r: (np.stack([a, a], axis=-1), None),
  } | {
    f"voxels {x:g} {y:g} {z:g} mm": lambda a, r, sizes=(x, y, z): (a, np.diag([*sizes, 1.0]))
    for x, y, z in ((1e-9,) * 3, (1e6,) * 3, (1, 1, 1e5), (1e5, 1, 1), (1, 1e-5, 1), (1e30,) * 3)
  }
  for name, change in volumes.items():
    for plane in ("axial", "sagittal"):
      def make(folder, rng, stage, change=change, plane=plane):
        array, matrix = change(stage.voxels().astype(np.float32), rng)
        path, out = save(folder / "scan.nii", array, matrix), folder / "out"

        def on_its_grid() -> str:
          seen, found = witnesses.read(path), witnesses.read(out / "scan.nii.gz")
          values = {0, *map(int, json.loads((out / "scan.json").read_text("utf-8"))["structures"])}
          if found.shape != seen.shape or not np.array_equal(found.affine, seen.affine):
            return "the label map is not on the file's grid"
          return "" if set(np.unique(found.array)) <= values else "values nobody prompted"
        return Attempt(
          lambda: main(["track", str(path), "--checkpoint", str(stage.checkpoint), "--out",
                        str(out), "--plane", plane, "--point", "1:0,0,0,+"]),
          ("scan.nii",), out, on_its_grid)
      yield f"{name}, {plane}", make
