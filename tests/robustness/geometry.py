"""Headers that claim too much, and places in space that cannot be."""

import gzip
import struct

import nibabel as nib
import numpy as np
from frame import kind
from stage import affine
from volumes import predict, save_as


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
  moved, mirrored, wider = affine(), affine() @ np.diag([-1, 1, 1, 1]), affine()
  moved[2, 3] += 100
  wider[:3, 0] *= 1.5
  tilted = affine()
  tilted[1, 2] = 3
  for name, form in {"moved": moved, "mirrored": mirrored, "wider": wider,
                     "tilted": tilted}.items():
    for qcode, scode in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 4), (3, 3)):
      def both(folder, rng, stage, form=form, codes=(qcode, scode)):
        path = folder / "scan.nii"
        image = nib.Nifti1Image(stage.voxels(), None)
        image.header.set_qform(affine(), 1)
        image.header.set_sform(form, 1)
        image.header["qform_code"], image.header["sform_code"] = codes
        image.header.set_xyzt_units("mm")
        nib.save(nib.Nifti1Image(stage.voxels(), None, image.header), path)
        return predict(stage, path, folder, must_read=form is not tilted)
      yield f"codes {qcode} {scode} sform {name}", both
  for name in ("raw.nrrd", "raw.mha"):
    for value in ("0", "nan", "-6", "1e300", "x"):
      def other(folder, rng, stage, name=name, value=value):
        path = save_as(stage, folder, name)
        content = path.read_bytes()
        key = next(k for k in (b"(-6,0,0)", b"(6,0,0)", b"ElementSpacing = 6 6 9.5")
                   if k in content)
        new = (f"({value},0,0)" if key[:1] == b"(" else f"ElementSpacing = {value} 6 9.5")
        path.write_bytes(content.replace(key, new.encode(), 1))
        return predict(stage, path, folder)
      yield f"{name} spacing {value}", other
