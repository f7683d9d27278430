"""Volumes in every format, damaged: `predict` says one line, or segments what the bytes say."""

import gzip
import os
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import witnesses
from damage import WAYS, flipped
from frame import Attempt, kind
from stage import affine
from tests_data import save_series

from rfmedsam2_jax.cli import main

FORMATS = ("scan.nii", "scan.nii.gz", "raw.nrrd", "gzip.nrrd", "raw.mha", "zlib.mha")


def predict(stage, path, folder: Path, *extra, names=(), judge=True, must_read=False) -> Attempt:
  """`rfmedsam2 predict` of one input."""
  out = folder / "out"
  return Attempt(
    lambda: main(["predict", str(stage.run), str(path), "--out", str(out), *map(str, extra)]),
    tuple(names) or (Path(path).name,), out,
    (lambda: is_right(stage, Path(path), out)) if judge else None, must_read,
  )


def is_right(stage, path: Path, out: Path) -> str:
  """Why a prediction is not that of the voxels and the grid that a witness reads."""
  import rfmedsam2_jax

  try:
    seen = witnesses.read(path)
  except Exception as error:
    return f"the witness cannot read it ({type(error).__name__}: {error})"
  array = seen.array.astype(np.float32)
  if not np.isfinite(array).all():
    return "the witness sees voxels that are not finite"
  written = [p for p in out.glob("*.nii.gz")]
  if len(written) != 1 or not written[0].with_name(
      written[0].name.removesuffix(".nii.gz") + ".json").is_file():
    return f"files in the output folder: {sorted(p.name for p in out.iterdir())}"
  image = nib.load(written[0])
  if image.shape != tuple(seen.shape):
    return f"the label map has shape {image.shape}, the file {seen.shape}"
  scale = max(1.0, float(np.abs(seen.affine).max()))
  if not np.allclose(image.affine, seen.affine, rtol=0, atol=1e-4 * scale):
    return f"the label map has the affine {image.affine.tolist()}, the file {seen.affine.tolist()}"
  spacing = tuple(float(f"{size:.6g}") for size in seen.spacing)  # as headers carry it
  expected = rfmedsam2_jax.segment(stage.model, array, spacing)
  found = witnesses.read(written[0]).array
  different = int((found != expected).sum())
  return f"{different} of {found.size} voxels differ from the witness's" if different else ""


def save(path: Path, array, matrix=None, **fields) -> Path:
  image = nib.Nifti1Image(array, affine() if matrix is None else matrix, dtype=array.dtype)
  for name, value in fields.items():
    image.header[name] = value
  nib.save(image, path)
  return path


def save_as(stage, folder: Path, name: str) -> Path:
  """The scan in a format."""
  path = folder / name
  if ".nii" in name:
    nib.save(nib.load(stage.scan), path)
  else:
    image = sitk.ReadImage(str(stage.scan))
    sitk.WriteImage(image, str(path), useCompression=name.startswith(("gzip", "zlib")))
  return path


@kind("whole files (all must be read)")
def whole():
  for name in (*FORMATS, "scan.nhdr", "scan.mhd"):
    def make(folder, rng, stage, name=name):
      return predict(stage, save_as(stage, folder, name), folder, must_read=True)
    yield name, make

  def series(folder, rng, stage):
    path = save_series(folder / "series", sitk.ReadImage(str(stage.scan)))
    return predict(stage, path, folder, must_read=True)
  yield "series", series


@kind("bytes flipped, cut, overwritten, left out, appended")
def bytes_damaged():
  for name in FORMATS:
    for way, damage in WAYS.items():
      for number in range(3):
        def make(folder, rng, stage, name=name, damage=damage):
          path = save_as(stage, folder, name)
          path.write_bytes(damage(path.read_bytes(), rng))
          return predict(stage, path, folder)
        yield f"{name} {way} {number}", make


@kind("bits of headers flipped")
def headers_flipped():
  for name, length, count in (
    ("scan.nii", 352, 24), ("scan.nii.gz", 352, 16), ("raw.nrrd", 420, 16), ("gzip.nrrd", 420, 8),
    ("raw.mha", 330, 16), ("zlib.mha", 330, 8),
  ):
    for number in range(count):
      def make(folder, rng, stage, name=name, length=length):
        path = save_as(stage, folder, name)
        content = path.read_bytes()
        packed = name.endswith(".gz")
        content = flipped(gzip.decompress(content) if packed else content, rng, 0, length)
        path.write_bytes(gzip.compress(content) if packed else content)
        return predict(stage, path, folder)
      yield f"{name} {number}", make


@kind("DICOM series, damaged")
def dicom():
  def series(folder, stage):
    return save_series(folder / "series", sitk.ReadImage(str(stage.scan)))

  for way, damage in WAYS.items():
    for number in range(4):
      def make(folder, rng, stage, damage=damage):
        path = series(folder, stage)
        file = sorted(path.iterdir())[int(rng.integers(12))]
        file.write_bytes(damage(file.read_bytes(), rng))
        return predict(stage, path, folder, names=("series", file.name))
      yield f"{way} {number}", make
  for number in range(12):
    def head(folder, rng, stage):
      path = series(folder, stage)
      for file in path.iterdir():  # the same bit of every file
        file.write_bytes(flipped(file.read_bytes(), np.random.default_rng(int(number_of(rng))),
                                 132, 700))
      return predict(stage, path, folder, names=("series", ".dcm"))

    def number_of(rng):
      return rng.bit_generator.seed_seq.entropy[1]
    yield f"the same bit of all headers {number}", head
  for what in ("one missing", "one empty", "first missing", "text beside", "one twice",
               "folder beside", "all empty", "only DICM"):
    def make(folder, rng, stage, what=what):
      path = series(folder, stage)
      files = sorted(path.iterdir())
      must = what in ("first missing", "text beside", "folder beside")
      if what == "one missing":
        files[4].unlink()
      elif what == "first missing":
        files[0].unlink()
      elif what == "one empty":
        files[4].write_bytes(b"")
      elif what == "text beside":
        (path / "readme.txt").write_text("CT")
      elif what == "one twice":
        (path / "again.dcm").write_bytes(files[4].read_bytes())
      elif what == "folder beside":
        (path / "more").mkdir()
      for file in files if what in ("all empty", "only DICM") else ():
        file.write_bytes(b"" if what == "all empty" else bytes(128) + b"DICM")
      return predict(stage, path, folder, names=("series",), must_read=must)
    yield what, make


@kind("headers that claim too much")
def claims():
  def nifti(folder, stage, name, dims):
    path = save_as(stage, folder, name)
    content = path.read_bytes()
    content = gzip.decompress(content) if name.endswith(".gz") else content
    head = content[:40] + struct.pack("<8h", len(dims), *dims, *[1] * (7 - len(dims)))
    content = head + content[56:]
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path

  for name in ("scan.nii", "scan.nii.gz"):
    for dims in ((32767, 32767, 32767), (32767, 32767, 12), (2000, 2000, 200), (20, 18, 13),
                 (20, 18, 12, 32767, 32767), (-20, 18, 12), (0, 18, 12)):
      def make(folder, rng, stage, name=name, dims=dims):
        return predict(stage, nifti(folder, stage, name, dims), folder)
      yield f"{name} {'x'.join(map(str, dims))}", make
  for name in ("raw.nrrd", "gzip.nrrd", "raw.mha", "zlib.mha", "scan.nhdr", "scan.mhd"):
    for claimed in (b"2000000 2000000 2000000", b"2000 2000 200", b"20 18 13", b"-20 18 12",
                    b"99999999999999999999 1 1"):
      def text(folder, rng, stage, name=name, claimed=claimed):
        path = save_as(stage, folder, name)
        path.write_bytes(path.read_bytes().replace(b"20 18 12\n", claimed + b"\n", 1))
        return predict(stage, path, folder)
      yield f"{name} {claimed.decode()}", text


@kind("affines and spacings")
def affines():
  flat = affine()
  flat[:, 1] = 0
  twice = affine()
  twice[:3, 1] = twice[:3, 0]
  sheared = affine()
  sheared[0, 2] = 20
  cases = {
    "zero": np.zeros((4, 4)), "zero column": flat, "coinciding axes": twice, "sheared": sheared,
    "NaN": affine() * np.nan, "infinite": np.diag([np.inf, 1, 1, 1]),
    "NaN origin": affine() + np.pad([[np.nan]], ((0, 3), (3, 0))),
    "infinite origin": affine() + np.pad([[np.inf]], ((0, 3), (3, 0))),
    "huge origin": affine() + np.pad([[1e30]], ((0, 3), (3, 0))),
  }
  for size in (1e-30, 1e-9, 1e-3, 1e3, 1e6, 1e30, 1e38):
    cases[f"spacing {size:g}"] = np.diag([size, size, size, 1])
    cases[f"spacing 6 6 {size:g}"] = np.diag([6, 6, size, 1])
  for name, matrix in cases.items():
    def make(folder, rng, stage, matrix=matrix):
      path = folder / "scan.nii"
      image = nib.Nifti1Image(stage.voxels(), affine())
      for row, field in enumerate(("srow_x", "srow_y", "srow_z")):
        image.header[field] = matrix[row]
      image.header["sform_code"] = 1
      content = bytearray(image.to_bytes())
      content[280:328] = matrix[:3].astype("<f4").tobytes()
      struct.pack_into("<h", content, 254, 1)
      path.write_bytes(content)
      return predict(stage, path, folder)
    yield f"sform {name}", make
  for name, (at, value) in {
    "pixdim 0": (80, 0.0), "pixdim NaN": (80, np.nan), "pixdim negative": (84, -6.0),
    "pixdim infinite": (88, np.inf), "qfac 0": (76, 0.0), "qfac NaN": (76, np.nan),
    "quaternion NaN": (256, np.nan), "quaternion 9": (256, 9.0), "offset NaN": (268, np.nan),
  }.items():
    def qform(folder, rng, stage, at=at, value=value):
      path = save_as(stage, folder, "scan.nii")
      content = bytearray(path.read_bytes())
      struct.pack_into("<2h", content, 252, 1, 0)  # the qform alone counts
      struct.pack_into("<f", content, at, value)
      path.write_bytes(content)
      return predict(stage, path, folder)
    yield f"qform {name}", qform
  for name in ("raw.nrrd", "raw.mha"):
    for value in ("0", "nan", "inf", "-6", "1e300", "1e-300", "x"):
      def other(folder, rng, stage, name=name, value=value):
        path = save_as(stage, folder, name)
        content = path.read_bytes()
        key = next(k for k in (b"(-6,0,0)", b"(6,0,0)", b"ElementSpacing = 6 6 9.5")
                   if k in content)
        new = (f"({value},0,0)" if key[:1] == b"(" else f"ElementSpacing = {value} 6 9.5")
        path.write_bytes(content.replace(key, new.encode(), 1))
        return predict(stage, path, folder)
      yield f"{name} spacing {value}", other


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
        read = len(shape) == 3 or (shape[3:] == (1,) and ending == ".nii.gz")
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


@kind("no volumes at all, and odd names")
def paths():
  for ending in (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm", ".txt", ""):
    for what in ("empty", "text", "zeros", "folder", "missing"):
      def make(folder, rng, stage, ending=ending, what=what):
        path = folder / f"scan{ending}"
        if what == "folder":
          path.mkdir()
        elif what != "missing":
          path.write_bytes({"empty": b"", "text": b"hello\n" * 99, "zeros": bytes(4000)}[what])
        return predict(stage, path, folder, judge=False)
      yield f"{what}{ending}", make
  for what in ("circle", "nowhere", "pipe", "device"):
    def special(folder, rng, stage, what=what):
      path = folder / "scan.nii.gz"
      if what == "circle":
        path.symlink_to(path)
      elif what == "nowhere":
        path.symlink_to(folder / "gone.nii.gz")
      elif what == "pipe":
        os.mkfifo(path)
      else:
        path.symlink_to("/dev/zero")
      return predict(stage, path, folder, judge=False)
    yield what, special
  for name in (" ", "a b", "ü", "日本", "-x", "a'b", 'a"b', "a;b", "$HOME", "a\nb", "%s%d{}",
               "a\\b", "x" * 240, "*", "..nii.gz", "a\x1bb", os.fsdecode(b"\xff\xfe")):
    for form in ("file", "folder"):
      def odd(folder, rng, stage, name=name, form=form):
        path = folder / "in" / f"{name}.nii.gz"
        path.parent.mkdir()
        nib.save(nib.load(stage.scan), folder / "scan.nii.gz")
        os.rename(folder / "scan.nii.gz", path)
        # What no terminal shows must not be shown; then the folder is named.
        shown = (name[:40], repr(name)[1:-1][:40], "in/")
        given = path if form == "file" else path.parent
        attempt = predict(stage, given, folder, names=shown)
        return Attempt(attempt.call, shown, attempt.out,
                       lambda: is_right(stage, path, folder / "out"), len(name) < 200)
      yield f"name {name.encode(errors='replace')[:12]!r} {form}", odd
  for name, content in (("too many", 3), ("hidden only", 0)):
    def hidden(folder, rng, stage, content=content):
      inputs = folder / "in"
      inputs.mkdir()
      for number in range(content):
        (inputs / "a.nii.gz" if number == 0 else inputs / f"a{['.nrrd', '.mha'][number - 1]}"
         ).write_bytes(b"")
      (inputs / ".b.nii.gz").write_bytes(b"")
      return predict(stage, inputs, folder, judge=False, names=("in",))
    yield name, hidden
