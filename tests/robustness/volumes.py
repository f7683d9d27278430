"""Volumes in every format, damaged: `predict` says one line, or segments what the bytes say."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import witnesses
from damage import WAYS, flipped
from frame import Attempt, kind, main
from stage import affine
from tests_data import save_series

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
  scale, found = max(1.0, float(np.abs(seen.affine).max())), witnesses.read(written[0])
  if not np.allclose(found.affine, seen.affine, rtol=0, atol=1e-4 * scale):
    return f"the label map has the affine {found.affine.tolist()}, the file {seen.affine.tolist()}"
  spacing = tuple(float(f"{size:.6g}") for size in seen.spacing)  # as headers carry it
  expected = rfmedsam2_jax.segment(stage.model, array, spacing)
  different = int((found.array != expected).sum())
  return f"{different} of {expected.size} voxels differ from the witness's" if different else ""


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
      for number in range(2):
        def make(folder, rng, stage, name=name, damage=damage):
          path = save_as(stage, folder, name)
          path.write_bytes(damage(path.read_bytes(), rng))
          return predict(stage, path, folder)
        yield f"{name} {way} {number}", make


@kind("bits of headers flipped")
def headers_flipped():
  for name, length, count in (
    ("scan.nii", 352, 16), ("scan.nii.gz", 352, 6), ("raw.nrrd", 420, 8), ("gzip.nrrd", 420, 4),
    ("raw.mha", 330, 8), ("zlib.mha", 330, 4),
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
    for number in range(2):
      def make(folder, rng, stage, damage=damage):
        path = series(folder, stage)
        file = sorted(path.iterdir())[int(rng.integers(12))]
        file.write_bytes(damage(file.read_bytes(), rng))
        return predict(stage, path, folder, names=("series", file.name))
      yield f"{way} {number}", make
  for number in range(8):
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
