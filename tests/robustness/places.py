"""Full disks and places that cannot be written, for every command that writes."""

import contextlib
import resource
from pathlib import Path

from frame import Attempt, kind, main


@contextlib.contextmanager
def files_up_to(size: int | None):
  """No file may grow beyond `size` bytes: writing more fails, as it does on a full disk."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  if size is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def writers(stage, out: Path) -> dict:
  """Every command that leaves files, by name: a call that writes below `out`."""
  from convert.__main__ import main as convert_main

  def convert(arguments: list[str]) -> int:
    return convert_main([*arguments, "--quiet"])

  predict = ["predict", str(stage.run), str(stage.scan), "--out", str(out)]
  track = ["track", str(stage.scan), "--checkpoint", str(stage.checkpoint), "--out", str(out),
           "--prompts", str(stage.place / "prompts.json")]
  return {
    "predict": lambda: main(predict), "predict nrrd": lambda: main([*predict, "--format", "nrrd"]),
    "predict all": lambda: main([*predict, "--save-stages", "--probabilities"]),
    "track": lambda: main(track), "track nrrd": lambda: main([*track, "--format", "nrrd"]),
    "evaluate": lambda: main(["evaluate", str(stage.labels), str(stage.labels), "--scores",
                              str(out / "scores.json")]),
    "train": lambda: main(["train", str(stage.config), "--out", str(out)]),
    "convert": lambda: convert([str(stage.place / "official.pt"), str(out / "ckpt"), "--config",
                                str(stage.place / "sam2.yaml")]),
    "convert nnunet": lambda: convert(["nnunet", str(stage.place / "nnunet"), str(out / "ckpt")]),
    "convert to torch": lambda: convert(["--to-torch", str(stage.checkpoint), str(out / "x.pt")]),
  }


NAMES = ("predict", "predict nrrd", "predict all", "track", "track nrrd", "evaluate", "train",
         "convert", "convert nnunet", "convert to torch")


@kind("full disks and places that cannot be written")
def places():
  for name in NAMES:
    # Threads of Orbax's writer go on after it has failed, into the cases behind.
    for size in (0, 100, 300) if name not in ("convert", "convert nnunet") else ():
      def full(folder, rng, stage, name=name, size=size):
        out = folder / "out"
        if name.startswith("convert"):
          out.mkdir()
        call = writers(stage, out)[name]

        def limited() -> int:
          with files_up_to(size):
            return call()
        # A run keeps what it has: training goes on with --resume.
        return Attempt(limited, ("out", "a result could not be written"),
                       None if name == "train" else out, lambda: "")
      yield f"{name}: files up to {size} bytes", full
    for what in ("a file", "below a file", "below /proc", "too long", "an address"):
      def unwritable(folder, rng, stage, name=name, what=what):
        out = {"a file": folder / "out", "below a file": folder / "out" / "more",
               "below /proc": Path("/proc/out"), "too long": folder / ("out" * 100),
               "an address": Path("az://bucket/out")}[what]
        (folder / "out").write_text("mine")
        call = writers(stage, out)[name]

        def from_there() -> int:
          with contextlib.chdir(folder):  # where an address would become a folder
            return call()
        return Attempt(from_there, ("out",), folder)
      yield f"{name}: out is {what}", unwritable
