"""What is no volume at all, and names that are hard to print."""

import os

import nibabel as nib
from frame import Attempt, kind
from volumes import is_right, predict


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
