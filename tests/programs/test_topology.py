"""TPU slices: their names, and, where Google's compiler is installed, programs for them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jax.experimental.pallas import tpu as pltpu

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.parallel.devices import peak_flops
from rfmedsam2_jax.programs.chips import CHIPS, named_slices, slice_of

ROOT = Path(__file__).parents[2]
with_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs Google's TPU compiler: pip install 'rfmedsam2-jax[tpu-compile]'")


@pytest.mark.parametrize("name, chips, devices, shape", [
  ("v5e-16", 16, 16, "4x4"), ("v5litepod-8", 8, 8, "2x4"), ("v6e-1", 1, 1, "1x1"),
  ("v5p-16", 8, 8, "2x2x2"), ("v4-8", 4, 4, "2x2x1"), ("v3-8", 4, 8, "2x2"),
  ("tpu7x-8", 4, 8, "2x2x1"), ("v5e:8x8", 64, 64, "8x8"), ("V5P:2x2x4", 16, 16, "2x2x4"),
])
def test_names_of_slices_are_googles(name, chips, devices, shape):
  found = slice_of(name)
  assert (found.chips, found.devices, found.shape) == (chips, devices, shape)


@pytest.mark.parametrize("name, says", [
  ("v5e-12", "v5e-8, v5e-16"), ("v5p-4", "v5p-8, v5p-16"), ("v6-8", "v6e-8"),
  ("v5e:3x4", "v5e:2x2"), ("v5e", "v5e-1, v5e-4"), ("v5p:2x2", "v5p-8"),
  ("h100", "shard --topologies"),
])
def test_an_unknown_slice_is_refused_with_the_nearest(name, says):
  with pytest.raises(UserError, match=says):
    slice_of(name)


def test_published_figures_are_near_those_that_jax_has():
  """Those of JAX are measured in part; a figure of another chip would be off by more."""
  versions = {str(version): version for version in pltpu.ChipVersion}
  for name, chip in CHIPS.items():
    info = pltpu.get_tpu_info_for_chip(versions[name.removeprefix("tpu")], 1)
    assert info.chip_version.num_physical_tensor_cores_per_chip == chip.cores, name
    of_chip = chip.flops, chip.rate, chip.memory
    theirs = info.bf16_ops_per_second, info.mem_bw_bytes_per_second, info.hbm_capacity_bytes
    assert of_chip == pytest.approx([chip.cores * x for x in theirs], rel=0.15), name
    assert 0.93 < chip.usable * chip.devices / chip.memory < 1.01, name
    assert peak_flops(chip.kind) == chip.flops / chip.devices


def test_slices_are_listed_without_a_config(capsys):
  assert main(["shard", "--topologies"]) == 0
  listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
  assert listed == [found.name for found in named_slices()] and len(set(listed)) == len(listed)


@pytest.mark.parametrize("given, says", [
  ([], "give a config"), (["c.yaml"], "either --devices"), (["c.yaml", "--slices", "2"], "either"),
  (["c.yaml", "--devices", "2", "--topology", "v5e-4"], "either"),
  (["c.yaml", "--devices", "2", "--slices", "2"], "--slices"),
  (["c.yaml", "--topology", "v5e-5"], "v5e-4, v5e-8"),
  (["c.yaml", "--topology", "v5e-4", "--slices", "0"], "from 1 on"),
])
def test_what_shard_is_for_is_asked_before_anything_is_loaded(given, says, capsys):
  assert main(["shard", *given]) == 2
  assert says in capsys.readouterr().err


LISTS = """
import re, sys
from rfmedsam2_jax.base.accelerators import prepare_tpu_compiler
prepare_tpu_compiler()
import jax
jax.config.update("jax_platforms", "cpu")
from rfmedsam2_jax.parallel.mesh import MeshConfig, make_mesh, mesh_platform
from rfmedsam2_jax.programs.chips import CHIPS, GIB, named_slices, slice_of
from rfmedsam2_jax.programs.topology import devices_of

for found in named_slices():
  if found.devices <= 2048:  # of the others the list alone takes long
    devices = devices_of(found)
    assert len(devices) == found.devices, found
    assert {device.device_kind for device in devices} == {found.chip.kind}, found

for name, chip in CHIPS.items():
  if name != "tpu7x":  # takes 20 s
    place = jax.sharding.SingleDeviceSharding(devices_of(slice_of(f"{name}:{chip.shapes[1]}"))[0])
    large = jax.ShapeDtypeStruct((2**18, 2**18), "bfloat16", sharding=place)
    try:
      jax.jit(lambda x: jax.numpy.sin(x @ x.T) @ x).lower(large).compile()
      raise SystemExit("fits")
    except jax.errors.JaxRuntimeError as error:
      (room,) = re.findall(r"available HBM \\(([\\d.]+)G\\)", str(error))
      assert float(room) == round(chip.usable / GIB, 2), (name, room)

for name, sizes in (("v5e-16", (4, 8, 1)), ("v6e-16", (2, 16, 1)), ("v5p-32", (2, 8, 2))):
  mesh = make_mesh(MeshConfig(*sizes), devices_of(slice_of(name), 2))
  assert mesh_platform(mesh).name == "tpu"
  first, second = ({x.slice_index for x in part.flat} for part in
                   (mesh.devices[:sizes[0] // 2], mesh.devices[sizes[0] // 2:]))
  assert first == {0} and second == {1}, name
"""


def alone(*command, **variables):
  """In a process of its own: the compiler comes before JAX's CPU."""
  names = "XLA_FLAGS", "JAX_PLATFORMS", "JAX_DISABLE_MOST_OPTIMIZATIONS"
  environment = {name: value for name, value in os.environ.items() if name not in names}
  done = subprocess.run(
    [sys.executable, *command], capture_output=True, text=True,
    env=environment | {"PYTHONPATH": str(ROOT)} | variables)
  assert done.returncode == 0, done.stderr[-2000:]
  return done


@with_libtpu
@pytest.mark.slow
def test_the_compiler_knows_all_slices_and_gives_programs_the_memory_that_is_said():
  alone("-c", LISTS)


SCANS = """
import sys
from rfmedsam2_jax.base.accelerators import prepare_tpu_compiler
prepare_tpu_compiler()
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from rfmedsam2_jax.programs.chips import slice_of
from rfmedsam2_jax.programs.costs import cost_of
from rfmedsam2_jax.programs.topology import devices_of
place = jax.sharding.SingleDeviceSharding(devices_of(slice_of("v5e-4"))[0])
shapes = [jax.ShapeDtypeStruct(shape, "float32", sharding=place)
          for shape in ((256, 512), (7, 512, 512))]
def flops(unroll):
  def loss(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, w, unroll=unroll)[0].sum()
  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
  cost = cost_of(compiled.as_text())
  assert cost.loops == 0 and cost.bytes > 0
  return cost.flops, compiled.cost_analysis()["flops"]
(scanned, once), (unrolled, all) = flops(1), flops(True)
assert scanned == unrolled == 3 * 7 * 2 * 256 * 512 * 512, (scanned, unrolled)
assert once < scanned / 5 < scanned <= all < 1.01 * scanned  # XLA's own
"""


@with_libtpu
def test_a_scan_for_a_tpu_costs_what_its_steps_do():
  alone("-c", SCANS)


@pytest.fixture
def smallest(tmp_path):
  """A config whose step is compiled for a TPU in seconds."""
  tree = {
    "plan": {"patch_size": [8, 16, 16], "poolings": 1}, "refiner": {"loop": {"steps": 0}},
    "generator": {"features": [4, 8], "convs_per_stage": 1, "batch_size": 4, "loop": {"steps": 1}}}
  path = tmp_path / "smallest.yaml"
  path.write_text(yaml.safe_dump(tree))
  return path


@with_libtpu
@pytest.mark.slow
def test_a_training_step_is_compiled_for_a_tpu_that_is_not_there(smallest):
  # Not as good a program as training gets, in a third of the time.
  done = alone(
    "-m", "rfmedsam2_jax", "shard", str(smallest), "--topology", "v5e:2x2", "--phase", "generator",
    "mesh.fsdp=2", "--json", JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1")
  result = json.loads(done.stdout.splitlines()[-1])["result"]
  (phase,) = result["phases"]
  assert phase["mesh"] == {"data": 2, "fsdp": 2, "model": 1} and phase["where"].startswith("v5e-4")
  assert phase["fits"] and 0 < phase["memory"]["total"] < CHIPS["v5e"].usable
  assert phase["flops"] > 1e7 and phase["bytes"] > 1e6 and not phase["loops_counted_once"]
  assert phase["limit"] == "memory" and not phase["calls_not_counted"]
  assert phase["collectives"]["all-reduce"]["bytes"] > 0
  said = "\n".join(result["lines"])
  assert "compiled for TPU v5 lite" in said and ": fits" in said and "a step takes" in said
  assert not [line for line in done.stderr.splitlines() if line[:1] != "["]


@with_libtpu
def test_a_step_too_large_for_a_chip_is_said_with_what_helps(smallest):
  done = alone(
    "-m", "rfmedsam2_jax", "shard", str(smallest), "--topology", "v5e-1", "--phase", "generator",
    "plan.patch_size=[256,256,256]", "generator.batch_size=64", "--json",
    JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1")
  result = json.loads(done.stdout.splitlines()[-1])["result"]
  assert result["phases"][0]["fits"] is False
  assert "HBM" in result["phases"][0]["refusal"].upper()
  assert "generator.remat=block (is none)" in result["lines"][-1]
