"""Programs that are given away: they compute what the package computes, without it."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import program_worker
import pytest
from drawn_run import write_drawn_run
from flax.traverse_util import flatten_dict
from safetensors.numpy import save
from small_sam2 import SMALL, drawn, images, relative

from rfmedsam2_jax import tracking
from rfmedsam2_jax.archive import program_files, run_programs
from rfmedsam2_jax.archive import program_functions as functions
from rfmedsam2_jax.archive.program_files import PLATFORMS
from rfmedsam2_jax.base import kept
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.data.files import sha256_of
from rfmedsam2_jax.model import load
from rfmedsam2_jax.nn import SAM2
from rfmedsam2_jax.programs.lowering import lowered
from rfmedsam2_jax.weights.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow  # what is exported is traced for three platforms
ROOT = Path(__file__).parents[1]
DEPTH, SLICES = 5, (2, 4)


def prompts(z, first=0):
  """A box and a point on a slice, of two objects."""
  point = np.array([[25, 24]], np.float32), np.ones(1, np.int32)
  return [tracking.SlicePrompt(first, z, box=(10, 12, 40, 37)),
          tracking.SlicePrompt(1 - first, z, *point)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, phantoms):
  folder = write_drawn_run(tmp_path_factory.mktemp("runs") / "drawn", phantoms)
  save_checkpoint(folder / "tracker" / "params", SMALL, drawn(), {})
  return folder


@pytest.fixture(scope="module")
def unpacked(run, tmp_path_factory):
  """The folder of an archive with programs, unpacked as anybody would."""
  folder = tmp_path_factory.mktemp("programs")
  archive = folder / "model.zip"
  assert main(["export", str(run), str(archive), "--licence", "CC0-1.0", "--programs"]) == 0
  with zipfile.ZipFile(archive) as opened:
    opened.extractall(folder / "model")
  return folder / "model"


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv(kept.ENVIRONMENT, str(tmp_path / "home"))
  return tmp_path / "home"


@pytest.fixture(scope="module")
def manifest(unpacked):
  return json.loads((unpacked / "programs" / "programs.json").read_text())


def tokens(prompt):
  """A prompt as programs.json says."""
  box = () if prompt.box is None else np.reshape(prompt.box, (2, 2))
  where = np.concatenate([np.reshape(box, (-1, 2)), prompt.points])
  labels = [*((2, 3) if len(box) else ()), *prompt.labels, -1]
  return (np.pad(where, ((0, 8 - len(where)), (0, 0))).astype(np.float32),
          np.array(labels + [-2] * (8 - len(labels)), np.int32))


def test_a_process_without_the_package_computes_what_the_package_does(run, unpacked, tmp_path):
  slices = images(DEPTH)
  model = load(run)
  patches = np.random.default_rng(0).normal(size=(2, *model.plan.patch_size, 1))
  given = {"images": slices, "slices": SLICES, "patches": patches.astype(np.float32)}
  given["points"], given["labels"] = map(np.stack, zip(*map(tokens, prompts(0)), strict=True))
  np.savez(tmp_path / "in.npz", **given)
  worker = [sys.executable, program_worker.__file__, unpacked / "programs", tmp_path / "in.npz",
            tmp_path / "out.npz"]
  done = subprocess.run(worker, cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  theirs = np.load(tmp_path / "out.npz")

  sam2, params = SAM2(SMALL), drawn()
  follower = tracking.VolumeTracker(
    sam2, params, tracking.TrackingConfig(cache="float32"), lambda z: slices[z], DEPTH)
  cells = follower.track(prompts(SLICES[0])).cells
  assert (cells.presence > 0).any()
  for name in ("logits", "presence"):
    assert relative(theirs[name], getattr(cells, name)) < 2e-5, name
  twice = follower.track([*prompts(SLICES[0]), *prompts(SLICES[1], first=1)]).cells
  followed = [z for z in range(SLICES[0] + 1, DEPTH) if z != SLICES[1]]
  assert relative(theirs["two_slices"], twice.logits[:, followed]) < 2e-5
  ours = jax.jit(tracking.encode_images, static_argnums=0)(sam2, params, slices[:1])
  assert relative(theirs["embedding"], ours.embedding) < 2e-6
  logits = jax.jit(model.unet.apply)({"params": model.generator}, given["patches"])
  # One patch after the other there, both at once here: convolutions may take another form.
  assert relative(theirs["voxel_logits"], logits) < 1e-5


def test_the_manifest_is_the_order_of_the_flattened_arguments(unpacked, manifest):
  for about in manifest["programs"].values():
    weights = run_programs.read_tensors((unpacked / about["weights"]).read_bytes())
    for platform, path in about["files"].items():
      content = (unpacked / path).read_bytes()
      program = jax.export.deserialize(bytearray(content))
      assert program.platforms == (platform,)
      assert program.calling_convention_version == manifest["calling_convention_version"]
      said = [(weights[path].shape, "float32") for path in about["parameters"]]
      said += [(x["shape"], x["dtype"]) for x in about["inputs"]]
      for (shape, dtype), aval in zip(said, program.in_avals, strict=True):
        assert ([str(x) for x in shape], dtype) == ([str(x) for x in aval.shape], str(aval.dtype))
      (params, inputs), _ = jax.tree.unflatten(program.in_tree, range(len(said)))
      assert [*params, *inputs] == [*about["parameters"], *(x["name"] for x in about["inputs"])]
      assert [*params.values(), *inputs.values()] == list(range(len(said)))
      outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
      for said, aval in zip(about["outputs"], outputs.values(), strict=True):
        assert said["dtype"] == str(aval.dtype)
        assert [str(x) for x in said["shape"]] == [str(x) for x in aval.shape]
      assert [x["name"] for x in about["outputs"]] == list(outputs) and about["parameters"]
  # What a program does not look at, it does not ask for.
  asked = manifest["programs"]["encoder"]["parameters"]
  assert all(x.startswith(("image_encoder", "sam_mask_decoder/conv_s")) for x in asked)


def test_programs_name_no_file_of_the_machine(unpacked, run):
  places = [str(place).encode() for place in (ROOT, sys.prefix, run, Path.home())]
  for path in (unpacked / "programs").iterdir():
    content = path.read_bytes()
    named = [word for word in (*places, b"nn/sam2.py") if word in content]
    assert not named, path


def half(name, platform):
  """A part of a network in half precision, for a platform."""
  part = {"encoder": functions.encoder, "sweep": functions.sweep}[name]
  model = SAM2(dataclasses.replace(SMALL, dtype="bfloat16"), PLATFORMS[platform])
  how = () if name == "encoder" else (tracking.TrackingConfig().decoding(False), jnp.bfloat16)
  params = program_files.shapes_of(flatten_dict(drawn(), sep="/"))
  made = part(model, *how)
  program = lowered(made.function, PLATFORMS[platform], params, program_files.symbolic(made.inputs))
  return bytes(program.serialize()), program.mlir_module()


@pytest.mark.parametrize(("name", "plain", "masked"), [
  # One per block; memory attention to itself and to memories, tokens of the decoder's two layers to
  # themselves. Its other heads are four wide here, too narrow for cuDNN.
  ("encoder", 4, 0), ("sweep", 1, 1 + 2)])
def test_attention_is_fused_on_a_gpu_alone_and_the_same_bytes_come_again(name, plain, masked):
  content, text = half(name, "cuda")
  assert text.count("@__cudnn$fmhaSoftmax(") == plain
  assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == masked
  assert half(name, "cuda")[0] == content
  assert "__cudnn" not in half(name, "tpu")[1]


def test_convolutions_of_the_generator_are_three_dimensional_on_accelerators(unpacked, manifest):
  for platform, path in manifest["programs"]["generator"]["files"].items():
    text = jax.export.deserialize(bytearray((unpacked / path).read_bytes())).mlir_module()
    found = any("2" in x for x in re.findall(r"dim_numbers = \[([^\]]+)\]x", text))
    assert found == (platform != "cpu")


def test_the_check_tells_right_from_wrong(unpacked, manifest, tmp_path, capsys):
  programs = shutil.copytree(unpacked, tmp_path / "model") / "programs"
  only = manifest | {"programs": {"generator": manifest["programs"]["generator"]}}
  (programs / "programs.json").write_text(json.dumps(only))
  assert run_programs.main(["--platform", "cpu"], programs) == 0
  assert "generator on cpu: as expected" in capsys.readouterr().out
  with pytest.raises(ValueError, match="not for rocm; for cpu, cuda, tpu"):
    run_programs.load("generator", "rocm", programs)
  with pytest.raises(ValueError, match=r"generator: patches is \[1, 2\]; it takes \['b', 16"):
    run_programs.load("generator", "cpu", programs)({"patches": np.zeros((1, 2))})
  # Weights of which some are a hundredth larger are others, and so are their outputs.
  weights = programs.parent / "generator" / "params.safetensors"
  tensors = {name: x * np.float32(1.01 if "stages_0" in name else 1)
             for name, x in run_programs.read_tensors(weights.read_bytes()).items()}
  weights.write_bytes(save(tensors))
  with pytest.raises(ValueError, match="generator/params.safetensors: does not have the SHA-256"):
    run_programs.main(["--platform", "cpu"], programs)
  only["sha256"]["generator/params.safetensors"] = sha256_of(weights)
  (programs / "programs.json").write_text(json.dumps(only))
  assert run_programs.main(["--platform", "cpu"], programs) == 1
  assert "generator on cpu: WRONG" in capsys.readouterr().out


def test_an_archive_with_programs_is_a_model_like_any_other(unpacked, run, home):
  assert main(["install", str(unpacked.parent / "model.zip")]) == 0
  assert (home / "models" / "drawn" / "programs" / "programs.json").is_file()
  jax.tree.map(np.testing.assert_array_equal, load("drawn").generator, load(run).generator)


def test_programs_need_flatbuffers_and_say_so(run, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "flatbuffers", None)
  assert main(["export", str(run), str(tmp_path / "x.zip"), "--programs"]) == 2
  assert "pip install 'rfmedsam2-jax[programs]'" in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_exported_as_a_tracker(tmp_path, home, capsys):
  out, again = tmp_path / "sam.zip", tmp_path / "again.zip"
  assert main(["export", "builtin", str(out), "--name", "sam"]) == 0
  assert "licence" not in capsys.readouterr().err  # the weights say theirs
  assert main(["install", str(out)]) == 0
  found, known = load_checkpoint("sam"), load_checkpoint("builtin")
  assert found.config == known.config
  jax.tree.map(np.testing.assert_array_equal, found.params, known.params)
  assert main(["export", "sam", str(again)]) == 0
  assert again.read_bytes() == out.read_bytes()
