"""The mesh over several slices of TPUs, and over hosts of GPUs, which JAX also calls slices."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.parallel.mesh import AXES, MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
  """What JAX tells of a device, as far as it is asked where a mesh is made."""

  id: int
  slice_index: int
  coords: tuple[int, int, int] = (0, 0, 0)
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"
  core_on_chip: int = 0
  process_index: int = 0


def tpus(*sides):
  """Slices of side x side chips each; ids of another slice begin far behind."""
  return [Device(100_000 * number + side * y + x, number, (x, y, 0))
          for number, side in enumerate(sides)
          for y, x in itertools.product(range(side), repeat=2)]


def gpus(*counts):
  """Hosts with so many each."""
  hosts = [host for host, count in enumerate(counts) for _ in range(count)]
  return [Device(number, host, platform="gpu", device_kind="NVIDIA A100-SXM4-40GB")
          for number, host in enumerate(hosts)]


def mesh_of(monkeypatch, devices, **sizes):
  monkeypatch.setattr(jax, "devices", lambda: devices)
  return make_mesh(MeshConfig(**sizes))


def slices_of(devices):
  return {device.slice_index for device in devices.flat}


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 16}, {"fsdp": 2, "model": 4}, {}])
@pytest.mark.parametrize("devices", [tpus(4, 4), tpus(4, 4, 4), gpus(16, 16)])
def test_only_data_goes_across_slices(monkeypatch, devices, sizes):
  count = len({device.slice_index for device in devices})
  with pytest.raises((ValueError, AssertionError)):  # JAX's own does not take several slices
    jax.make_mesh((len(devices), 1, 1), AXES, devices=devices)
  mesh = mesh_of(monkeypatch, devices, **sizes)
  assert mesh.size == len(set(mesh.devices.flat)) == len(devices)
  assert mesh.shape["data"] == len(devices) // (mesh.shape["fsdp"] * mesh.shape["model"])
  for part in np.split(mesh.devices, count):
    assert len(slices_of(part)) == 1


@pytest.mark.parametrize("devices, sizes, says", [
  (tpus(4, 4), {"fsdp": 32},
   r"data -1 x fsdp 32 x model 1: 32 devices are 2 slices of 16, .*\(32 x 1\).* divisor of 16$"),
  (tpus(4, 4), {"data": 1, "fsdp": 16, "model": 2}, r"2 slices of 16, .*\(16 x 2\)"),
  (tpus(3, 3, 3), {"data": 1, "fsdp": 27}, "27 devices are 3 slices of 9"),
  (tpus(4, 2), {}, "20 devices are 2 slices of 4 or 16, .* slices of one size"),
  (tpus(3), {"data": 1, "fsdp": 5}, "the wiring of 5 of 9 devices has no room"),
])
def test_what_does_not_fit_into_a_slice_is_refused(monkeypatch, devices, sizes, says):
  with pytest.raises(UserError, match=says) as told:
    mesh_of(monkeypatch, devices, **sizes)
  assert "\n" not in str(told.value)


@pytest.mark.parametrize("devices, sizes", [
  (gpus(4, 4), {"fsdp": 8}), (gpus(1, 1, 1, 1), {"data": 1, "fsdp": 4}), (gpus(4, 2), {})])
def test_gpus_of_several_hosts_share_what_one_does_not_hold(monkeypatch, devices, sizes):
  mesh = mesh_of(monkeypatch, devices, **sizes)
  assert [*mesh.devices.flat] == devices
