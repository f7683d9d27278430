"""Checkpoints and what is converted into them, damaged."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
from damage import WAYS
from frame import Attempt, kind, main

MARK = "code-ran"  # a file that appears if a pickle's code is run


def damaged_folder(source: Path, target: Path, rng, damage, chosen=None) -> str:
  """A copy of a folder with one damaged file; gives that file's name."""
  shutil.copytree(source, target)
  files = sorted(p for p in target.rglob("*") if p.is_file() and p.stat().st_size
                 and (chosen is None or chosen(p)))
  file = files[int(rng.integers(len(files)))]
  if damage is None:
    file.unlink()
  else:
    file.write_bytes(damage(file.read_bytes(), rng))
  return file.name


def track(stage, checkpoint: Path, folder: Path, names=(), judge=None) -> Attempt:
  out = folder / "out"
  return Attempt(
    lambda: main(["track", str(stage.scan), "--checkpoint", str(checkpoint), "--out", str(out),
                  "--prompts", str(stage.place / "prompts.json")]),
    tuple(names) or (checkpoint.name,), out, judge)


def same_params(stage, checkpoint: Path) -> str:
  """Why the parameters of a checkpoint are not those that it was made with.

  Its files are compressed with checksums or are JSON: whatever is read must be what was written.
  """
  import jax

  from rfmedsam2_jax.weights.checkpoint import load_checkpoint

  ours, theirs = load_checkpoint(checkpoint), load_checkpoint(stage.checkpoint)
  if ours.config != theirs.config:
    return ""  # its JSON says another network, and the parameters fit
  same = jax.tree.map(lambda a, b: np.array_equal(a, b), ours.params, theirs.params)
  return "" if all(jax.tree.leaves(same)) else "parameters are not those that were saved"


@kind("checkpoints: files damaged or gone")
def checkpoints():
  for way, damage in {**WAYS, "gone": None, "empty": lambda content, rng: b""}.items():
    for number in range(3):
      def make(folder, rng, stage, damage=damage):
        checkpoint = folder / "checkpoint"
        damaged_folder(stage.checkpoint, checkpoint, rng, damage)
        return track(stage, checkpoint, folder, judge=lambda: same_params(stage, checkpoint))
      yield f"{way} {number}", make
  for what in ("params", "about", "all", "file", "missing"):
    def part(folder, rng, stage, what=what):
      checkpoint = folder / "checkpoint"
      if what == "file":
        checkpoint.write_text("no folder")
      elif what != "missing":
        shutil.copytree(stage.checkpoint, checkpoint)
        for child in checkpoint.iterdir():
          if what in (child.name, "all"):
            shutil.rmtree(child) if child.is_dir() else child.unlink()
      return track(stage, checkpoint, folder)
    yield f"{what} alone" if what == "file" else f"without {what}", part


@kind("checkpoints: descriptions that say something else")
def descriptions():
  changes = {
    "unknown key": {"sam3": 1}, "null": None, "list": [], "number": 7, "empty": {},
    "image_size 0": {"image_size": 0}, "image_size -64": {"image_size": -64},
    "image_size 65": {"image_size": 65}, "image_size huge": {"image_size": 2**40},
    "image_size text": {"image_size": "large"}, "embed_dim 9": {"embed_dim": 9},
    "embed_dim 0": {"embed_dim": 0}, "embed_dim huge": {"embed_dim": 10**9},
    "stages empty": {"stages": []}, "stages negative": {"stages": [-1, 1, 1, 1]},
    "stages huge": {"stages": [10**6, 1, 1, 1]}, "d_model 31": {"d_model": 31},
    "heads 0": {"trunk_heads": 0}, "heads 3": {"trunk_heads": 3}, "dtype": {"dtype": "float7"},
    "memory_layers huge": {"memory_layers": 10**5}, "window 0": {"window_spec": [0, 0, 0, 0]},
    "memory channels": {"memory_mask_channels": [4]},
  }
  for name, change in changes.items():
    def make(folder, rng, stage, change=change):
      checkpoint = folder / "checkpoint"
      shutil.copytree(stage.checkpoint, checkpoint)
      (file,) = (p for p in (checkpoint / "about").rglob("*") if p.is_file()
                 and b'"sam2"' in p.read_bytes())
      about = json.loads(file.read_text("utf-8"))
      about["sam2"] = {**about["sam2"], **change} if isinstance(change, dict) and change else change
      file.write_text(json.dumps(about))
      return track(stage, checkpoint, folder)
    yield name, make


class _Runs:
  """A pickle that makes a file when it is read."""

  def __init__(self, mark: str):
    self.mark = mark

  def __reduce__(self):
    return os.mkdir, (self.mark,)


def convert(folder: Path, *arguments, names=(), judge=None) -> Attempt:
  """`python -m convert`, which must not run code that a file brings."""
  from convert.__main__ import main as convert_main

  def call() -> int:
    status = convert_main([*map(str, arguments), "--quiet"])
    assert not (folder / MARK).exists(), "code of the file was run"
    return status
  return Attempt(call, tuple(names), folder / "made", judge)


def official(stage) -> Path:
  return stage.place / "official.pt"


@kind("official .pt files")
def official_files():
  def of(folder, stage, path, judge=None, *extra):
    return convert(folder, path, folder / "made" / "ckpt", "--config", stage.place / "sam2.yaml",
                   *extra, names=(path.name,), judge=judge)

  def prepared(folder):
    (folder / "made").mkdir()
    return folder / "sam2.pt"

  def tensors_are_torchs(stage, path, made):
    """Against PyTorch's own reading of the same bytes."""
    import jax
    import torch

    from rfmedsam2_jax.weights.checkpoint import load_checkpoint
    from rfmedsam2_jax.weights.names import from_official

    with zipfile.ZipFile(path) as archive:
      if broken := archive.testzip():
        return f"{broken} in the file does not have its checksum"
    state = torch.load(path, weights_only=True)["model"]
    found = load_checkpoint(made)
    expected = from_official({k: v.float().numpy() for k, v in state.items()}, found.config)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), found.params, expected)
    return "" if all(jax.tree.leaves(same)) else "other values than PyTorch reads"

  for way, damage in WAYS.items():
    for number in range(2):
      def make(folder, rng, stage, damage=damage):
        path = prepared(folder)
        path.write_bytes(damage(official(stage).read_bytes(), rng))
        return of(folder, stage, path,
                  lambda: tensors_are_torchs(stage, path, folder / "made" / "ckpt"))
      yield f"{way} {number}", make
  for what in ("code", "code in zip", "code in a tensor's place", "list", "text", "empty", "folder",
               "NaN", "integers", "not contiguous", "missing tensor", "huge tensor", "nested"):
    def special(folder, rng, stage, what=what):
      import torch

      path = prepared(folder)
      state = torch.load(official(stage), weights_only=True)["model"]
      name = next(iter(state))
      if what == "code":
        path.write_bytes(pickle.dumps({"model": _Runs(str(folder / MARK))}))
      elif what == "code in zip":
        torch.save({"model": state, "more": _Runs(str(folder / MARK))}, path)
      elif what == "code in a tensor's place":
        torch.save({"model": {**state, name: _Runs(str(folder / MARK))}}, path)
      elif what == "list":
        torch.save(list(state.values()), path)
      elif what in ("text", "empty"):
        path.write_text("text" if what == "text" else "")
      elif what == "folder":
        path.mkdir()
      else:
        changed = {
          "NaN": lambda x: x * np.nan, "integers": lambda x: x.long(),
          "not contiguous": lambda x: x.flip(0), "missing tensor": None,
          "huge tensor": lambda x: torch.zeros(1).expand(*[10**4] * 4),
          "nested": lambda x: {"x": x},
        }[what]
        state = dict(state)
        x = state.pop(name)
        if changed is not None:
          state[name] = changed(x)
        torch.save({"model": state}, path)
      right = what in ("integers", "not contiguous")
      return of(folder, stage, path, (
        lambda: tensors_are_torchs(stage, path, folder / "made" / "ckpt")) if right else None)
    yield what, special
  for what in ("out is a file", "out's folder is missing", "out is another folder"):
    def target(folder, rng, stage, what=what):
      path = prepared(folder)
      shutil.copy(official(stage), path)
      if what == "out is a file":
        (folder / "made" / "ckpt").write_text("mine")
      elif what == "out is another folder":
        (folder / "made" / "ckpt").mkdir()
        (folder / "made" / "ckpt" / "mine").write_text("mine")
      else:
        (folder / "made").rmdir()
      attempt = of(folder, stage, path, None, *(["--overwrite"] if "is" in what else []))
      made = folder / "made" / "ckpt"
      return Attempt(attempt.call, ("made",), attempt.out, (
        lambda: tensors_are_torchs(stage, path, made)) if "missing" in what else None)
    yield what, target


@kind("nnU-Net models")
def nnunet():
  def of(folder, model):
    return convert(folder, "nnunet", model, folder / "made" / "ckpt",
                   names=("model", "checkpoint_final.pth", "plans", "dataset"),
                   judge=lambda: weights_are_torchs(model, folder / "made" / "ckpt"))

  def weights_are_torchs(model, made):
    """Every number of the network is there, by its sum; and the file has its checksums."""
    import jax
    import torch

    from rfmedsam2_jax.weights.orbax import load_params  # noqa: F401 - read below by Orbax itself

    path = model / "fold_0" / "checkpoint_final.pth"
    with zipfile.ZipFile(path) as archive:
      if broken := archive.testzip():
        return f"{broken} in the file does not have its checksum"
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
      params = reader.restore(made, args=ocp.args.Composite(
        params=ocp.args.StandardRestore()))["params"]
    stored = torch.load(path, weights_only=False)["network_weights"]  # made by this campaign
    unique = {name: x for name, x in stored.items()
              if "all_modules" not in name and "decoder.encoder" not in name}
    theirs = sorted(float(x.double().abs().sum()) for x in unique.values())
    ours = sorted(float(np.abs(np.asarray(x, np.float64)).sum()) for x in jax.tree.leaves(params))
    same = len(ours) == len(theirs) and np.allclose(ours, theirs, rtol=1e-9, equal_nan=True)
    return "" if same else "other values than PyTorch reads"

  def copied(folder, stage):
    (folder / "made").mkdir()
    shutil.copytree(stage.place / "nnunet", folder / "model")
    return folder / "model"

  for way, damage in {**WAYS, "empty": lambda content, rng: b""}.items():
    for number in range(2):
      def make(folder, rng, stage, damage=damage):
        model = copied(folder, stage)
        file = model / "fold_0" / "checkpoint_final.pth"
        file.write_bytes(damage(file.read_bytes(), rng))
        return of(folder, model)
      yield f"{way} {number}", make
  for number, (path, value) in enumerate((
    ("plans", None), ("plans", []), ("plans.configurations", None), ("dataset_json", 5),
    ("plans.configurations.3d_fullres", {}), ("plans.transpose_forward", [2, 2, 2]),
    ("plans.transpose_forward", [0]), ("plans.transpose_forward", "abc"),
    ("plans.configurations.3d_fullres.spacing", [0, 0, 0]),
    ("plans.configurations.3d_fullres.spacing", [float("nan")] * 3),
    ("plans.configurations.3d_fullres.patch_size", [-1, 0, 10**9]),
    ("plans.configurations.3d_fullres.patch_size", "large"),
    ("plans.configurations.3d_fullres.normalization_schemes", ["eval(1)"]),
    ("plans.configurations.3d_fullres.architecture.arch_kwargs.strides", [[0, 0, 0]]),
    ("plans.configurations.3d_fullres.architecture.arch_kwargs.kernel_sizes", []),
    ("plans.configurations.3d_fullres.architecture.arch_kwargs.features_per_stage", [10**9] * 3),
    ("plans.configurations.3d_fullres.architecture.arch_kwargs.n_conv_per_stage", [0, 0, 0]),
    ("plans.configurations.3d_fullres.inherits_from", "3d_fullres"),
    ("plans.foreground_intensity_properties_per_channel", {}),
    ("dataset_json.labels", {}), ("dataset_json.labels", {"background": 0, "a": -1}),
    ("dataset_json.labels", {"background": 0, "a": 10**30}),
    ("dataset_json.channel_names", {"x": "CT"}), ("configuration", "2d"), ("configuration", 7),
  )):
    def changed(folder, rng, stage, path=path, value=value):
      import torch

      model = copied(folder, stage)
      file = model / "fold_0" / "checkpoint_final.pth"
      stored = torch.load(file, weights_only=False)
      node = stored["init_args"]
      *parents, last = path.split(".")
      for key in parents:
        node = node[key]
      node[last] = value
      torch.save(stored, file)
      attempt = of(folder, model)
      read = path.endswith("inherits_from")  # of itself: nothing is inherited
      return Attempt(attempt.call, (*attempt.names, "configuration"), attempt.out,
                     attempt.judge if read else None)
    yield f"{path}, {number}", changed
