"""`rfmedsam2 convert`: the same network comes out, anything else is one clear line."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch_sam2
import yaml
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from torch_sam2 import TINY, torch

from convert.__main__ import main
from convert.recognise import OFFICIAL
from rfmedsam2_jax.nn import PRESETS, AdapterConfig
from rfmedsam2_jax.weights.checkpoint import load_checkpoint, save_checkpoint, with_adapters
from rfmedsam2_jax.weights.names import from_official, official_shapes

CLONE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def official():
  return torch_sam2.official(TINY)


@pytest.fixture(scope="module")
def state(official):
  return {name: x.clone() for name, x in official.state_dict().items()}


@pytest.fixture(scope="module")
def tiny_yaml(tmp_path_factory):
  """The tiny network as a training config names it; no official size is small enough for tests."""
  path = tmp_path_factory.mktemp("config") / "tiny.yaml"
  sam2 = json.loads(json.dumps(dataclasses.asdict(TINY)))
  sam2["adapters"] = {"dwconv": True, "cnn": True, "width": 4}
  path.write_text(yaml.safe_dump({"sam2": sam2}))
  return path


@pytest.fixture(scope="module")
def checkpoint(state, tiny_yaml, tmp_path_factory):
  """A converted checkpoint, without adapters."""
  folder = tmp_path_factory.mktemp("converted")
  torch.save({"model": state}, folder / "official.pt")
  out = folder / "new" / "ckpt"
  assert main([str(folder / "official.pt"), str(out), "--config", str(tiny_yaml)]) == 0
  return out


def run(capsys, *arguments):
  status = main([str(a) for a in arguments])
  captured = capsys.readouterr()
  return status, captured.out, captured.err


def assert_refused(capsys, *arguments, says, out):
  """One line, status 2, and nothing at `out` or beside it."""
  before = sorted(out.parent.iterdir())
  status, _, error = run(capsys, *arguments)
  assert status == 2 and error.startswith("convert: ") and error.count("\n") == 1, error
  assert says in error
  assert sorted(out.parent.iterdir()) == before
  return error


def assert_same(params, state, config=TINY):
  expected = flatten_dict(from_official({k: v.numpy() for k, v in state.items()}, config))
  found = flatten_dict(params)
  assert found.keys() == expected.keys()
  for path, x in expected.items():
    np.testing.assert_array_equal(found[path], x, err_msg=str(path))


def test_a_checkpoint_describes_itself(checkpoint, state):
  config, params, about = load_checkpoint(checkpoint)
  assert config == TINY
  assert_same(params, state)
  assert about["source"]["name"] == "official.pt" and about["fresh"] == about["left_out"] == []
  digest = subprocess.run(
    ["sha256sum", checkpoint.parents[1] / "official.pt"], capture_output=True, text=True, check=True
  ).stdout.split()[0]
  assert about["source"]["sha256"] == {"official.pt": digest}
  assert {"rfmedsam2-jax", "jax", "python"} <= about["versions"].keys()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_its_official_name(
  state, tiny_yaml, tmp_path, capsys, value
):
  name = "memory_attention.layers.0.linear1.weight"
  bad = {key: x.clone() for key, x in state.items()}
  bad[name].view(-1)[[1, 5]] = value
  torch.save({"model": bad}, tmp_path / "official.pt")
  assert_refused(capsys, tmp_path / "official.pt", tmp_path / "ckpt", "--config", tiny_yaml,
                 says=f"tensor {name} has 2 of {bad[name].numel()} values that are NaN",
                 out=tmp_path / "ckpt")


@pytest.mark.parametrize("nest, prefix", [
  ((), ""),
  (("model",), "module."),
  (("state_dict",), "module.model.sam2."),
  (("state", "model"), "sam2._orig_mod."),
])
def test_checkpoints_of_training_are_unwrapped(
  state, tiny_yaml, tmp_path, capsys, nest, prefix
):
  tree = {prefix + name: x for name, x in state.items()}
  for key in reversed(nest):
    tree = {key: tree, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 7}
  torch.save(tree, tmp_path / "training.pt")
  status, _, error = run(capsys, tmp_path / "training.pt", tmp_path / "ckpt", "--config", tiny_yaml)
  assert status == 0, error
  assert_same(load_checkpoint(tmp_path / "ckpt").params, state)


@pytest.mark.parametrize("name", ["sam2.safetensors", "sam2.pt"])
def test_files_are_read_without_pytorch(state, tiny_yaml, tmp_path, name):
  save_file({name: x.numpy() for name, x in state.items()}, tmp_path / "sam2.safetensors")
  torch.save({"model": state}, tmp_path / "sam2.pt")
  code = (
    "import sys; sys.modules['torch'] = None; sys.modules['sam2'] = None\n"
    "from convert.__main__ import main; sys.exit(main(sys.argv[1:]))"
  )
  command = [sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / "ckpt"),
             "--config", str(tiny_yaml)]
  done = subprocess.run(command, cwd=CLONE, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert_same(load_checkpoint(tmp_path / "ckpt").params, state)
  done = subprocess.run([*command, "--overwrite", "--verify"], cwd=CLONE, capture_output=True,
                        text=True)
  assert done.returncode == 2 and "torch is not installed" in done.stderr
  assert done.stderr.count("\n") == 1


def test_bfloat16_becomes_float32(state, tiny_yaml, tmp_path, capsys):
  from safetensors.torch import save_file as save_torch

  half = {name: x.bfloat16() for name, x in state.items()}
  save_torch(half, tmp_path / "half.safetensors")
  torch.save(half, tmp_path / "half.pt")
  for name in ("half.safetensors", "half.pt"):
    out = tmp_path / f"{name}.ckpt"
    assert run(capsys, tmp_path / name, out, "--config", tiny_yaml)[0] == 0
    assert_same(load_checkpoint(out).params, {name: x.float() for name, x in half.items()})


def test_a_medsam2_file_is_of_side_512_and_another_side_has_the_same_parameters(
  state, tiny_yaml, tmp_path, capsys
):
  torch.save({"model": state}, tmp_path / "MedSAM2_latest.pt")
  source = tmp_path / "MedSAM2_latest.pt"
  assert run(capsys, source, tmp_path / "a", "--config", tiny_yaml)[0] == 0
  assert run(capsys, source, tmp_path / "b", "--config", tiny_yaml, "--image-size", 96)[0] == 0
  assert load_checkpoint(tmp_path / "a").config == dataclasses.replace(TINY, image_size=512)
  config, params, _ = load_checkpoint(tmp_path / "b")
  assert config.image_size == 96
  assert_same(params, state)
  for side in ("0", "-32", "100"):
    assert_refused(capsys, source, tmp_path / "c", "--config", tiny_yaml, "--image-size", side,
                   says="multiple of 32", out=tmp_path / "c")


@pytest.mark.slow
def test_verify_compares_every_part_and_refuses_a_network_that_is_another(
  state, tiny_yaml, tmp_path, capsys, monkeypatch
):
  """Two tensors of one part in each other's place: their shapes fit, the network is another."""
  from convert import to_orbax

  def swapped(state, config):
    name = "memory_attention.layers.0.norm{}.weight"
    state = state | {name.format(1): state[name.format(2)], name.format(2): state[name.format(1)]}
    return from_official(state, config)

  monkeypatch.setattr(to_orbax, "from_official", swapped)
  torch.save({"model": state}, tmp_path / "official.pt")
  status, out, error = run(capsys, tmp_path / "official.pt", tmp_path / "ckpt", "--config",
                           tiny_yaml, "--image-size", 64, "--verify")
  assert status == 2 and not (tmp_path / "ckpt").exists()
  *progress, said = error.splitlines()
  assert all(line.startswith("[") for line in progress)
  assert "the memory attention differs" in said and "was not converted" in said
  assert "largest difference to sam2" in out
  for part in ("image encoder", "prompt encoder", "mask decoder", "three masks", "memory encoder",
               "memory attention"):
    (line,) = [line for line in out.splitlines() if line.strip().startswith(part)]
    difference = float(line.split(part)[1].split()[0])
    assert difference > 1e-3 if part == "memory attention" else difference < 5e-6, line


def test_what_does_not_match_is_refused_unless_it_is_named(state, tiny_yaml, tmp_path, capsys):
  changed = dict(state)
  del changed["no_mem_embed"]
  changed["extra.weight"] = torch.zeros(2, 2)
  changed["no_obj_ptr"] = torch.zeros(1, 7)
  torch.save({"model": changed}, tmp_path / "changed.pt")
  arguments = [tmp_path / "changed.pt", tmp_path / "ckpt", "--config", tiny_yaml]
  assert_refused(capsys, *arguments, says="3 tensors do not match", out=tmp_path / "ckpt")
  error = assert_refused(capsys, *arguments, "--allow", "no_mem_embed", "--allow", "extra.*",
                         says="1 tensors do not match", out=tmp_path / "ckpt")
  assert "no_obj_ptr" in error
  status, out, _ = run(capsys, *arguments, "--allow", "no_*", "--allow", "extra.*")
  assert status == 0
  for line in ("no_mem_embed: allowed, freshly initialised", "extra.weight: allowed, left out",
               "no_obj_ptr is (1, 7), should be (1, 64): allowed, freshly initialised"):
    assert line in out
  params, about = load_checkpoint(tmp_path / "ckpt")[1:]
  assert about["fresh"] == ["no_mem_embed", "no_obj_ptr"] and about["left_out"] == ["extra.weight"]
  assert np.asarray(params["no_obj_ptr"]).any()
  rest = {k: v for k, v in state.items() if k not in about["fresh"]}
  fresh = {k: torch.tensor(np.asarray(params[k])).reshape(state[k].shape) for k in about["fresh"]}
  assert_same(params, rest | fresh)


class Evil:
  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return os.system, (f"touch {self._path}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_pickle_that_wants_to_run_code_does_not_run_it(state, tmp_path, capsys, kind):
  proof, source = tmp_path / "it_ran", tmp_path / "evil.pt"
  tree = {"model": state, "epoch": Evil(proof)}
  if kind == "pickle":
    source.write_bytes(pickle.dumps(Evil(proof), protocol=2))
  else:
    torch.save(tree, source, _use_new_zipfile_serialization=kind == "zip")
  says = "system" if kind == "zip" else "could run code"
  assert_refused(capsys, source, tmp_path / "ckpt", says=says, out=tmp_path / "ckpt")
  assert not proof.exists()
  pickle.loads(pickle.dumps(Evil(proof)))  # it would have
  assert proof.exists()


def wrong_source(kind, folder, state):
  """A source with something wrong, and what the line should say."""
  path = folder / "source.pt"
  if kind == "missing":
    return path, "no such file"
  if kind == "empty":
    path.write_bytes(b"")
  elif kind == "text":
    path.write_text("once upon a time")
  elif kind == "newer pickle":
    path.write_bytes(pickle.dumps({"model": 3}, protocol=5))
    return path, "could run code"
  elif kind == "truncated":
    torch.save({"model": state}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  elif kind == "truncated safetensors":
    path = folder / "source.safetensors"
    save_file({name: x.numpy() for name, x in state.items()}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  elif kind == "list":
    torch.save([torch.zeros(3)], path)
    return path, "holds a list"
  elif kind == "resnet":
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(9)}, path)
    return path, "is no checkpoint of SAM 2"
  elif kind == "SAM 1":
    torch.save({"image_encoder.patch_embed.proj.weight": torch.zeros(768, 3, 16, 16)}, path)
    return path, "is no checkpoint of SAM 2"
  elif kind == "another size":
    torch.save({"model": state}, path)
    return path, "width 16 with 5 blocks is none of the official sizes"
  elif kind == "twice":
    torch.save({"model": state, "ema": state}, path)
    return path, "more than once, at 'model.' and 'ema.'"
  elif kind == "folder":
    path.mkdir()
    return path, "has no model.safetensors"
  return path, path.name


@pytest.mark.parametrize("kind", [
  "missing", "empty", "text", "newer pickle", "truncated", "truncated safetensors", "list",
  "resnet", "SAM 1", "another size", "twice", "folder",
])
def test_what_is_no_checkpoint_is_one_line(state, tmp_path, capsys, kind):
  source, says = wrong_source(kind, tmp_path, state)
  assert_refused(capsys, source, tmp_path / "ckpt", says=says, out=tmp_path / "ckpt")


def test_an_existing_output_is_not_lost(state, checkpoint, tiny_yaml, tmp_path, capsys):
  torch.save({"model": state}, tmp_path / "official.pt")
  arguments = [tmp_path / "official.pt", tmp_path / "ckpt", "--config", tiny_yaml]
  assert run(capsys, *arguments)[0] == 0
  (tmp_path / "ckpt" / "mine").touch()
  assert_refused(capsys, *arguments, says="--overwrite", out=tmp_path / "ckpt")
  assert (tmp_path / "ckpt" / "mine").exists()
  assert run(capsys, *arguments, "--overwrite")[0] == 0
  assert not (tmp_path / "ckpt" / "mine").exists()
  other = tmp_path / "other"
  other.mkdir()
  assert_refused(capsys, arguments[0], other, "--config", tiny_yaml, "--overwrite",
                 says="was not made by this command", out=other)
  assert_refused(capsys, arguments[0], tmp_path / "official.pt" / "x", "--config", tiny_yaml,
                 says="cannot be written into", out=other)
  assert_refused(capsys, "--to-torch", checkpoint, tmp_path / "official.pt", says="--overwrite",
                 out=other)


INTERRUPTED = """
import os, signal, sys, time
from rfmedsam2_jax.base import interruption
interruption.install()
from convert import to_orbax
from convert.__main__ import main
save = to_orbax.save_checkpoint
def stopped(folder, *rest):
  save(folder, *rest)
  (folder.parent / f"{folder.name}.orbax-checkpoint-tmp").mkdir()
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(60)
to_orbax.save_checkpoint = stopped
sys.exit(main(sys.argv[1:]))
"""


def test_an_interruption_leaves_what_was_there(state, tiny_yaml, tmp_path, capsys):
  torch.save({"model": state}, tmp_path / "official.pt")
  arguments = [tmp_path / "official.pt", tmp_path / "ckpt", "--config", tiny_yaml, "--overwrite"]
  assert run(capsys, *arguments)[0] == 0
  before = sorted(tmp_path.rglob("*"))
  done = subprocess.run(
    [sys.executable, "-c", INTERRUPTED, *map(str, arguments), "--quiet"], capture_output=True,
    text=True, cwd=CLONE, timeout=60,
  )
  assert (done.returncode, done.stderr) == (130, "convert: interrupted; nothing was written\n")
  assert sorted(tmp_path.rglob("*")) == before
  assert_same(load_checkpoint(tmp_path / "ckpt").params, state)


def test_back_to_pytorch_is_the_same_checkpoint_and_loads_strictly(
  official, checkpoint, state, tmp_path, capsys
):
  assert run(capsys, "--to-torch", checkpoint, tmp_path / "back.pt")[0] == 0
  back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
  assert back.keys() == state.keys()
  for name, x in state.items():
    assert back[name].dtype == x.dtype and torch.equal(back[name], x), name
  torch_sam2.build(TINY).load_state_dict(back, strict=True)
  assert sorted(tmp_path.iterdir()) == [tmp_path / "back.pt"]


@pytest.mark.slow
def test_adapters_go_back_only_while_they_are_the_identity(
  state, tiny_yaml, tmp_path, capsys
):
  torch.save({"model": state}, tmp_path / "official.pt")
  assert run(capsys, tmp_path / "official.pt", tmp_path / "ckpt", "--config", tiny_yaml,
             "--adapters")[0] == 0
  config, params, about = load_checkpoint(tmp_path / "ckpt")
  assert config.adapters == AdapterConfig(width=4)
  status, out, _ = run(capsys, "--to-torch", tmp_path / "ckpt", tmp_path / "back.pt")
  # Five blocks, four levels of the neck, two layers of memory and two of the decoder.
  assert status == 0 and "left out 13 adapters" in out
  back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
  assert all(torch.equal(back[name], x) for name, x in state.items())
  up = params["memory_attention"]["layers_1"]["adapter"]["up"]
  up["bias"] = up["bias"].at[3].set(1e-3)
  save_checkpoint(tmp_path / "trained", config, params, about)
  error = assert_refused(capsys, "--to-torch", tmp_path / "trained", tmp_path / "trained.pt",
                         says="1 of its 13 adapters are not the identity",
                         out=tmp_path / "trained.pt")
  assert "memory_attention/layers_1/adapter" in error


def test_adapters_that_are_there_are_kept(checkpoint):
  config, params, _ = load_checkpoint(checkpoint)
  config = dataclasses.replace(config, adapters=AdapterConfig(cnn=False))
  once = with_adapters(params, config, jax.random.key(3))
  both = with_adapters(once, dataclasses.replace(config, adapters=AdapterConfig()),
                       jax.random.key(4))
  a, b = flatten_dict(once), flatten_dict(both)
  assert all(np.array_equal(a[path], b[path]) for path in a)
  assert {path[:3] for path in b.keys() - a.keys()} == {
    ("image_encoder", "neck", f"convs_{i}") for i in range(4)
  }
  with pytest.raises(ValueError, match="adapter"):
    with_adapters(both, config, jax.random.key(5))


@pytest.mark.parametrize("kind, says", [
  ("missing", "no such checkpoint"),
  ("other folder", "is no checkpoint of this program"),
  ("damaged", "damaged"),
  ("no parameters", "cannot be read"),
])
def test_a_checkpoint_of_ours_that_is_none_is_one_line(checkpoint, tmp_path, capsys, kind, says):
  import shutil

  folder = tmp_path / "ckpt"
  if kind == "other folder":
    folder.mkdir()
  elif kind != "missing":
    shutil.copytree(checkpoint, folder)
    for file in (folder / ("about" if kind == "damaged" else "params")).rglob("*"):
      if file.is_file():
        file.write_bytes(b"")
  assert_refused(capsys, "--to-torch", folder, tmp_path / "back.pt", says=says,
                 out=tmp_path / "back.pt")


def test_no_parameter_depends_on_the_image_side():
  assert official_shapes(TINY) == official_shapes(dataclasses.replace(TINY, image_size=512))


@pytest.mark.slow
def test_sam2_1_tiny_at_full_size_there_and_back(tmp_path, capsys):
  """Recognised, and bit for bit the same file again."""
  model = torch_sam2.official(PRESETS["sam2.1_hiera_tiny"])
  torch.save({"model": model.state_dict()}, tmp_path / "sam2.1_hiera_tiny.pt")
  status, out, error = run(capsys, tmp_path / "sam2.1_hiera_tiny.pt", tmp_path / "ckpt")
  assert status == 0, error
  assert "sam2.1_hiera_tiny, image side 1024" in out
  assert run(capsys, "--to-torch", tmp_path / "ckpt", tmp_path / "back.pt")[0] == 0
  back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
  model.load_state_dict(back, strict=True)
  again = torch.load(tmp_path / "sam2.1_hiera_tiny.pt", weights_only=True)["model"]
  assert all(torch.equal(back[name], x) for name, x in again.items())


@pytest.mark.full
@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_configuration_is_verified_at_full_size(name, tmp_path, capsys):
  torch.save({"model": torch_sam2.official(PRESETS[name]).state_dict()}, tmp_path / "sam2.pt")
  status, out, error = run(capsys, tmp_path / "sam2.pt", tmp_path / "ckpt", "--image-size", 512,
                           "--verify")
  assert status == 0, error
  with capsys.disabled():
    print(f"\n{out}")
