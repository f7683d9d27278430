"""`rfmedsam2 convert nnunet`: networks of dynamic-network-architectures, plans, a run from them."""

import hashlib
import json
import pydoc
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest
import yaml
from nnunet_model import ANISOTROPIC, ISOTROPIC, LABELS, RESIDUAL, torch, write_model

from convert.__main__ import main
from rfmedsam2_jax.cli import main as rfmedsam2
from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.data.datasets import read_dataset, read_labels
from rfmedsam2_jax.data.plan import Plan, load_plan
from rfmedsam2_jax.model import generator_network
from rfmedsam2_jax.nn.initialisation import init_generator
from rfmedsam2_jax.nn.unet import UNet, UNetConfig
from rfmedsam2_jax.weights.orbax import load_params, read_about


@pytest.mark.parametrize("architecture, channels, bias", [
  (ISOTROPIC, 1, True), (ANISOTROPIC, 2, True), (ANISOTROPIC, 1, False), (RESIDUAL, 2, True),
  (RESIDUAL, 1, False)])
def test_every_output_is_pytorchs(tmp_path, architecture, channels, bias):
  network = write_model(tmp_path / "model", architecture, channels, bias=bias)
  assert main(["nnunet", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
  x, ours = outputs_of(tmp_path / "out", channels)
  theirs = torch_outputs(network, x)
  assert len(ours) == len(theirs) == len(architecture["strides"]) - 1
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def outputs_of(folder, channels):
  """A patch, and the logits of the generator that a converted folder's config describes."""
  config = load_config(folder / "config.yaml")
  c = config.plan
  plan = Plan("x", 0, c.spacing, c.patch_size, c.channels, c.patch_size, c.strides, c.kernels,
              read_labels({"labels": LABELS}, Path("dataset.json")))
  unet = generator_network(config.generator, plan)
  shapes = jax.eval_shape(lambda key: init_generator(unet, channels, key), jax.random.key(0))
  x = np.random.default_rng(0).standard_normal((1, 8, 16, 24, channels)).astype(np.float32)
  run = jax.jit(lambda p, x: unet.apply({"params": p}, x, deep_supervision=True))
  return x, run(load_params(folder, shapes), x)


def torch_outputs(network, x):
  """PyTorch's, in the order of dataset.json, which names b before a."""
  with torch.inference_mode():
    outputs = network(torch.tensor(x.transpose(0, 4, 1, 2, 3).copy()))
  return [y.numpy().transpose(0, 2, 3, 4, 1)[..., [0, 2, 1]] for y in outputs]


def test_an_ensemble_of_folds_gives_the_mean_of_their_logits(tmp_path):
  model, out = tmp_path / "model", tmp_path / "out"
  networks = [write_model(model, RESIDUAL, 1, fold=fold) for fold in (0, 3)]
  assert main(["nnunet", str(model), str(out), "--fold", "0", "3"]) == 0
  x, ours = outputs_of(out, 1)
  theirs = np.mean([torch_outputs(network, x)[0] for network in networks], axis=0)
  np.testing.assert_allclose(ours[0], theirs, atol=2e-5 * np.abs(theirs).max())
  assert set(read_about(out)["source"]["sha256"]) == {
    f"fold_{fold}/checkpoint_final.pth" for fold in (0, 3)}


@pytest.mark.parametrize("architecture", [ANISOTROPIC, RESIDUAL])
def test_the_way_back_is_bit_exact_and_nnunets_class_loads_it_strictly(tmp_path, architecture):
  network, out = write_model(tmp_path / "model", architecture, 2), tmp_path / "out"
  assert main(["nnunet", str(tmp_path / "model"), str(out)]) == 0
  assert main(["--to-torch", str(out), str(tmp_path / "back.pth")]) == 0
  stored = torch.load(tmp_path / "back.pth", weights_only=True)
  told = stored["architecture"]
  found = lambda x: pydoc.locate(x) if isinstance(x, str) else x  # noqa: E731
  again = found(told["network_class_name"])(
    told["input_channels"], num_classes=told["num_classes"], deep_supervision=True,
    **{key: found(value) for key, value in told["arch_kwargs"].items()})
  again.load_state_dict(stored["network_weights"])
  ours, theirs = again.state_dict(), network.state_dict()
  assert ours.keys() == theirs.keys()
  assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_ensemble_is_neither_trained_on_nor_taken_back(tmp_path, capsys):
  model, out = tmp_path / "model", tmp_path / "out"
  for fold in (0, 1):
    write_model(model, ISOTROPIC, 1, fold=fold)
  assert main(["nnunet", str(model), str(out), "--fold", "0", "1"]) == 0
  capsys.readouterr()
  config = str(out / "config.yaml")
  for command, arguments, says in (
    (rfmedsam2, ["train", config, "--out", str(tmp_path / "run"), "generator.loop.steps=9"],
     "generator.members is 2, but generator.loop.steps is 9"),
    (main, ["--to-torch", str(out), str(tmp_path / "back.pth")], "is an ensemble of 2 networks"),
  ):
    assert command(arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert says in error[-1] and sum(": " in line for line in error) == 1


def test_folds_that_cannot_be_one_ensemble_are_one_line(tmp_path, capsys):
  for fold, spacing in ((0, 1.0), (1, 2.0)):
    write_model(tmp_path / "model", ISOTROPIC, 1, fold=fold, spacing=[3.0, 1.0, spacing])
  file = tmp_path / "model" / "fold_0" / "checkpoint_final.pth"
  for source, folds, says in ((tmp_path / "model", "01", "are not those of"),
                              (tmp_path / "model", "02", "no such file"),
                              (file, "01", "is one network, not folds 0, 1")):
    assert main(["nnunet", str(source), str(tmp_path / "out"), "--fold", *folds]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
  assert not (tmp_path / "out").exists()


def test_a_network_that_is_not_finite_is_refused_by_the_tensors_name(tmp_path, capsys):
  write_model(tmp_path / "model", ISOTROPIC, 1)
  file = tmp_path / "model" / "fold_0" / "checkpoint_final.pth"
  stored = torch.load(file, weights_only=False)
  name = next(key for key in stored["network_weights"] if key.endswith("conv.weight"))
  stored["network_weights"][name].view(-1)[3] = float("nan")
  torch.save(stored, file)
  assert main(["nnunet", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
  error = capsys.readouterr().err
  assert f"tensor {name} has 1 of" in error and error.count("\n") == 1
  assert not (tmp_path / "out").exists()


def test_the_plan_is_nnunets(tmp_path):
  write_model(tmp_path / "model", ANISOTROPIC, 2)
  assert main(["nnunet", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
  config = load_config(tmp_path / "out" / "config.yaml")
  assert config.plan.spacing == (3.0, 1.0, 1.5) and config.plan.patch_size == (16, 32, 32)
  assert config.plan.plane == "axial" and config.inference.mirror_axes == (0, 1, 2)
  assert config.plan.channels is not None
  ct, t2 = config.plan.channels
  assert (ct.kind, ct.lower, ct.upper, ct.mean, ct.std) == ("ct", -50.0, 200.0, 60.0, 25.0)
  assert (t2.name, t2.kind, t2.masked) == ("T2", "zscore", True)


def test_a_network_of_files_that_are_not_ras_sees_them_as_it_knows_them(tmp_path):
  network = write_model(tmp_path / "model", ISOTROPIC, 1)
  like = nib.Nifti1Image(np.zeros((6, 5, 4), np.float32), np.diag([-1.0, 1, -3, 1]))
  nib.save(like, tmp_path / "like.nii.gz")  # x to the left as here, y and z against ours
  assert main(["nnunet", str(tmp_path / "model"), str(tmp_path / "out"), "--like",
               str(tmp_path / "like.nii.gz")]) == 0
  assert load_config(tmp_path / "out" / "config.yaml").generator.mirrored == (0, 1)
  config = UNetConfig((4, 6, 8), ((1, 1, 1), (2, 2, 2), (2, 2, 2)), ((3, 3, 3),) * 3, 2,
                      decoder_convs=1, mirrored=(0, 1))
  unet = UNet(config, 3)
  shapes = jax.eval_shape(lambda key: init_generator(unet, 1, key), jax.random.key(0))
  x = np.random.default_rng(0).standard_normal((1, 8, 16, 24, 1)).astype(np.float32)
  ours = jax.jit(unet.apply)({"params": load_params(tmp_path / "out", shapes)}, x)
  with torch.inference_mode():
    theirs = network(torch.tensor(np.flip(x, (1, 2)).transpose(0, 4, 1, 2, 3).copy()))[0].numpy()
  theirs = np.flip(theirs.transpose(0, 2, 3, 4, 1), (1, 2))[..., [0, 2, 1]]
  np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("changes, says", [
  ({"patch_size": [32, 32]}, "is a 2D network"),
  ({"previous_stage": "3d_lowres"}, "second network of a cascade"),
  ({"normalization_schemes": ["NoNormalization"]}, "channel CT is normalised by NoNormalization"),
  ({"architecture": {"network_class_name": "a.PrimusM", "arch_kwargs": {}}},
   "the network is a PrimusM"),
  ({"architecture": {"network_class_name": "a.ResidualEncoderUNet",
                     "arch_kwargs": RESIDUAL | {"block": "a.BottleneckD"}}},
   "block=BottleneckD; the generator has BasicBlockD"),
  ({"architecture": {"network_class_name": "a.ResidualEncoderUNet", "arch_kwargs": RESIDUAL}},
   "do not belong together"),
  ({"architecture": {"network_class_name": "PlainConvUNet",
                     "arch_kwargs": ISOTROPIC | {"features_per_stage": [4, 6, 9]}}},
   "do not belong together"),
  ({"architecture": {"network_class_name": "PlainConvUNet",
                     "arch_kwargs": ISOTROPIC | {"nonlin_kwargs": {"negative_slope": 0.1}}}},
   "nonlin_kwargs.negative_slope=0.1; the generator has 0.01"),
  ({"architecture": {}}, "missing or wrong entry"),
])
def test_what_cannot_be_represented_is_one_line(tmp_path, capsys, changes, says):
  write_model(tmp_path / "model", ISOTROPIC, 1, **changes)
  assert main(["nnunet", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
  error = capsys.readouterr().err
  assert says in error and error.count("\n") == 1
  assert not (tmp_path / "out").exists()


def test_no_checkpoint_of_nnunet_is_one_line(tmp_path, capsys):
  torch.save({"model": {}}, tmp_path / "x.pth")
  for source, says in ((tmp_path / "x.pth", "no network_weights"), (tmp_path, "no such file")):
    assert main(["nnunet", str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_converted_network_is_the_generator_of_a_run_without_steps(tmp_path, capsys, tiny_config):
  tree = yaml.safe_load(tiny_config.read_text("utf-8"))
  data = read_dataset(tree["data"]["dataset"])
  labels = {"background": 0} | {s.name: s.values[0] for s in data.labels.structures}
  sizes = {"strides": ((1, 1, 1), (2, 2, 2)), "kernel_sizes": ((3, 3, 3), (3, 3, 3))}
  write_model(tmp_path / "model", dict(
    n_stages=2, features_per_stage=[4, 6], n_blocks_per_stage=[1, 1], n_conv_per_stage_decoder=[1],
    **sizes), 1, labels, spacing=[9.5, 5.5, 5.5])  # as the phantoms'; finer voxels take minutes
  assert main(["nnunet", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
  made = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text("utf-8"))
  # The rest of the tiny config, and a refiner without steps; the phantoms' channel has its name.
  made["plan"]["channels"][0]["name"] = data.channels[0]
  tree |= {"plan": made["plan"], "generator": made["generator"]}
  config = tmp_path / "config.yaml"
  tree["refiner"]["loop"] |= {"steps": 0}
  config.write_text(yaml.safe_dump(tree))
  run = tmp_path / "run"
  other = ["generator.blocks=[1,2]"]
  assert rfmedsam2(["train", str(config), "--out", str(run), *other]) == 2
  assert "its generator has blocks=[1,1]" in capsys.readouterr().err
  assert rfmedsam2(["train", str(config), "--out", str(run), "--overwrite"]) == 0
  assert load_plan(run / "plan.json").patch_size == (16, 32, 32)
  unet = UNet(UNetConfig((4, 6), *sizes.values(), blocks=(1, 1)), len(labels))
  shapes = jax.eval_shape(lambda key: init_generator(unet, 1, key), jax.random.key(0))
  folders = (run / "generator" / "params", tmp_path / "out")
  a, b = (load_params(folder, shapes) for folder in folders)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert (run / "refiner" / "params").is_dir()
  start = json.loads((run / "generator_init_from.json").read_text("utf-8"))
  used = next((tmp_path / "model").rglob("checkpoint_final.pth"))
  digest = hashlib.sha256(used.read_bytes()).hexdigest()
  assert start == read_about(tmp_path / "out")
  assert start["source"]["sha256"] == {used.name: digest}


def test_a_generator_without_steps_needs_a_start_of_the_same_kind(
  tmp_path, capsys, tiny_config
):
  write_model(tmp_path / "model", ISOTROPIC, 1)
  assert main(["nnunet", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
  (tmp_path / "empty").mkdir()
  for source, says in (
    ("''", "leaves a generator from scratch untrained"),
    (tmp_path / "out", "its generator has features=[4,6,8]"),
    (tmp_path / "empty", "is no checkpoint of a generator"),
  ):
    assert rfmedsam2(["train", str(tiny_config), "--out", str(tmp_path / "run"), "--overwrite",
                      "generator.loop.steps=0", f"generator.init_from={source}"]) == 2
    # Progress is on standard error too.
    *_, error = said = capsys.readouterr().err.splitlines()
    assert says in error and sum(line.startswith("rfmedsam2: ") for line in said) == 1
