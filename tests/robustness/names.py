"""What is no volume at all, and names that are hard to print."""

import contextlib
import os

import nibabel as nib
import SimpleITK as sitk
from frame import Attempt, kind
from tests_data import save_series
from volumes import FORMATS, is_right, predict, save_as


@kind("no volumes at all, and odd names")
def paths():
  for ending in (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm", ".txt", ""):
    for what in ("empty", "zeros", "folder", "missing"):
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
               "a\\b", "x" * 240, "*", "a..nii", "a\x1bb", os.fsdecode(b"\xff\xfe")):
    for form in ("file", "folder"):
      def odd(folder, rng, stage, name=name, form=form):
        path = folder / "in" / f"{name}.nii.gz"
        path.parent.mkdir()
        nib.save(nib.load(stage.scan), folder / "scan.nii.gz")
        os.rename(folder / "scan.nii.gz", path)
        # What no terminal shows must not be shown; then the folder is named.
        shown = (name[:40], repr(name)[1:-1][:40], "in/", "in:")
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


@contextlib.contextmanager
def locked(name):
  """Folders of that name cannot be read, as by somebody who is not root."""
  scan = os.scandir

  def refused(path):
    if os.path.basename(path) == name:
      raise PermissionError(13, "Permission denied", str(path))
    return scan(path)

  os.scandir = refused
  try:
    yield
  finally:
    os.scandir = scan


@kind("inputs as people name and mix them")
def inputs():
  def of(folder, stage, original, given=None, within=None):
    """The prediction of what is given, by default the folder; it is that of one file."""
    attempt = predict(stage, given or folder / "in", folder, names=("in",))

    def call():
      with within or contextlib.nullcontext():
        return attempt.call()
    return Attempt(call, ("in",), attempt.out, lambda: is_right(stage, original, folder / "out"),
                   True)

  def scan(folder, stage, name="scan.nii.gz"):
    (folder / "in").mkdir()
    return save_as(stage, folder / "in", name)

  for name in (*FORMATS, "scan.nhdr", "scan.mhd"):
    for spelled in (str.upper, str.title):
      stem, _, ending = name.partition(".")
      other = f"{stem}.{spelled(ending)}"

      def capitals(folder, rng, stage, name=name, other=other):
        path = scan(folder, stage, name)
        path.rename(path.with_name(other))
        return of(folder, stage, save_as(stage, folder, name))
      yield f"{name} as {other}", capitals
  for what in ("link", "link to a name without ending", "linked folder", "channel 0 of several",
               "number without channel 0", "hidden beside", "text beside", "DICOM beside",
               "folder beside", "locked folder beside"):
    def kept(folder, rng, stage, what=what):
      path = scan(folder, stage)
      given, within = None, None
      if what.startswith("link"):
        (folder / "store").mkdir()
        target = folder / "store" / ("77ab02ce" if "without" in what else "77ab02ce.nii.gz")
        if what == "linked folder":
          given = folder / "visits"
          given.symlink_to(folder / "in")
        else:
          path.rename(target)
          path.symlink_to(target)
      elif what == "channel 0 of several":
        given = path = path.rename(path.with_name("p_0000.nii.gz"))
        save_as(stage, folder / "in", "p_0001.nii.gz")
      elif what == "number without channel 0":
        path = path.rename(path.with_name("amos_0007.nii.gz"))
      elif what == "DICOM beside":
        series = save_series(folder / "series", sitk.ReadImage(str(stage.scan)))
        next(series.iterdir()).rename(folder / "in" / "scout.dcm")
      elif what.endswith("folder beside"):
        (folder / "in" / "locked").mkdir()
        within = locked("locked") if what.startswith("locked") else None
      else:
        (folder / "in" / ("._scan.nii.gz" if "hidden" in what else "notes.txt")).write_bytes(b"x")
      return of(folder, stage, path, given, within)
    yield what, kept
  for what, files in (
    ("a second channel", ("p_0000.nii.gz", "p_0001.nii.gz")),
    ("numbered from 0", ("p_0000.nii.gz", "p_0001.nii.gz", "p_0002.nii.gz")),
    ("two endings", ("a.nii.gz", "a.nii")), ("two spellings", ("a.nii.gz", "a.NII.GZ")),
    ("link to nothing", ("a.nii.gz", "gone")), ("locked", ("a.nii.gz",)),
  ):
    def refused(folder, rng, stage, what=what, files=files):
      (folder / "in").mkdir()
      for name in files:
        if name == "gone":
          (folder / "in" / "b.nii.gz").symlink_to(folder / "gone.nii.gz")
        else:
          (folder / "in" / name).write_bytes(stage.scan.read_bytes())
      attempt = predict(stage, folder / "in", folder, judge=False, names=("in",))

      def call():
        with locked("in") if what == "locked" else contextlib.nullcontext():
          return attempt.call()
      return Attempt(call, attempt.names, attempt.out)
    yield f"refused: {what}", refused
