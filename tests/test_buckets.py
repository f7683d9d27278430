"""Copies of what lies in buckets: staged once, sent whole, refused in one line; and leases.

The same is asked of three servers on loopback that others wrote the clients of: two emulators of
PyPI, and gcs_server, which knows conditions on generations.
"""

import importlib.util
import json
import threading
import time
from pathlib import Path

import gcs_server
import numpy as np
import pytest

from rfmedsam2_jax.base import buckets, leases, storage
from rfmedsam2_jax.base.addresses import ENVIRONMENT, copy_of
from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.cli import main
from rfmedsam2_jax.data.files import replacing, replacing_whole
from rfmedsam2_jax.data.preprocessing import open_array
from rfmedsam2_jax.training.checkpoints import latest_checkpoint
from rfmedsam2_jax.training.lock import check_folder, open_run

NEEDED = {"gs": ("gcsfs",), "emulated gs": ("gcsfs", "gcp_storage_emulator"),
          "s3": ("s3fs", "moto", "flask_cors")}


@pytest.fixture(scope="module", params=list(NEEDED))
def address(request, tmp_path_factory):
  """An empty bucket."""
  if missing := [x for x in NEEDED[request.param] if importlib.util.find_spec(x) is None]:
    pytest.skip(f"{missing[0]} is not installed")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv(ENVIRONMENT, str(tmp_path_factory.mktemp("copies")))
    storage._opened.cache_clear()
    yield from {"gs": _gcs, "emulated gs": _emulated_gcs, "s3": _s3}[request.param](patch)
  storage._opened.cache_clear()


def _gcs(patch):
  with gcs_server.serving() as server:
    _set(patch, gcs_server.environment(server.address))
    yield "gs://lab"


def _emulated_gcs(patch):
  from gcp_storage_emulator.server import create_server
  server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="lab")
  server.start()
  host, port = server._api._httpd.server_address
  _set(patch, gcs_server.environment(f"http://{host}:{port}"))
  yield "gs://lab"
  server.stop()


def _s3(patch):
  from moto.server import ThreadedMotoServer
  server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
  server.start()
  host, port = server.get_host_and_port()
  _set(patch, {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "none",
               "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"})
  storage.system("s3://lab").mkdir("lab")
  yield "s3://lab"
  server.stop()


def _set(patch, environment):
  import fsspec
  for name, value in environment.items():
    patch.setenv(name, value)
  fsspec.config.set_conf_env(fsspec.config.conf)  # read when fsspec was imported
  fsspec.get_filesystem_class("s3" if "AWS_ENDPOINT_URL" in environment else "gcs"
                              ).clear_instance_cache()


def test_what_is_read_comes_once_and_is_as_the_bucket_has_it(address):
  for name in ("a", "b/c", "b/d e"):
    storage.write(f"{address}/read/{name}", name.encode())
  folder = buckets.staged(f"{address}/read")
  there = {x.relative_to(folder).as_posix(): x.read_text() for x in folder.rglob("*")
           if x.is_file()}
  assert there == {"a": "a", "b/c": "b/c", "b/d e": "b/d e"}
  before = {x: x.stat().st_mtime_ns for x in folder.rglob("*") if x.is_file()}

  storage.write(f"{address}/read/a", b"A")  # of the same size, perhaps in the same second
  storage.remove([f"{address}/read/b/c"])
  (folder / "b/d e").write_text("changed")
  assert buckets.staged(f"{address}/read") == folder
  assert (folder / "a").read_text() == "A" and (folder / "b/d e").read_text() == "b/d e"
  assert not (folder / "b/c").exists()
  unchanged = folder / "a"
  stamp = unchanged.stat().st_mtime_ns
  buckets.staged(f"{address}/read")
  assert unchanged.stat().st_mtime_ns == stamp != before[unchanged]

  assert buckets.staged(f"{address}/read/a").read_text() == "A"
  assert not buckets.staged(f"{address}/nothing").exists()


def test_names_can_come_before_what_they_name(address):
  storage.write(f"{address}/late/small.json", b"{}")
  storage.write(f"{address}/late/large.bin", bytes(2 << 20))
  storage.write(f"{address}/late/left/out", b"")
  folder = buckets.outlined(f"{address}/late", "read", without="left/")
  assert (folder / "small.json").read_text() == "{}" and not (folder / "left").exists()
  assert (folder / "large.bin").stat().st_size == 0
  assert buckets.fetched(folder / "large.bin").stat().st_size == 2 << 20
  buckets.outlined(f"{address}/late", "read")
  assert (folder / "large.bin").stat().st_size == 2 << 20  # it stays
  storage.write(f"{address}/late/small.json", b"[1]")
  assert buckets.fetched(folder / "small.json").read_text() == "[1]"


def test_what_is_written_is_there_whole_or_not_at_all(address):
  with pytest.raises(ZeroDivisionError), replacing(f"{address}/out/file") as temporary:
    temporary.write_text("half")
    raise ZeroDivisionError
  assert storage.objects(f"{address}/out") == {}
  with replacing(f"{address}/out/file") as temporary:
    temporary.write_text("whole")
  assert storage.read(f"{address}/out/file") == b"whole"
  for text in ("one", "two"):
    with replacing_whole(f"{address}/folder") as made:
      made.mkdir()
      (made / text).write_text(text)
  assert set(storage.objects(f"{address}/folder")) == {"two"}  # of a folder nothing old remains

  # What is only added to is sent when that is asked for, and not again.
  log = copy_of(f"{address}/out/log", "written")
  log.write_text("1")
  buckets.push(log.parent)
  version = storage.objects(f"{address}/out")["log"].version
  buckets.push(log.parent)
  assert storage.objects(f"{address}/out")["log"].version == version
  log.write_text("12")
  buckets.push(log.parent)
  assert storage.read(f"{address}/out/log") == b"12"


def test_a_command_reads_and_writes_buckets(address, phantoms, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for folder in ("labelsTr", "imagesTr"):
    for path in (phantoms / folder).iterdir():
      storage.write(f"{address}/set/{folder}/{path.name}", path.read_bytes())
  storage.write(f"{address}/set/dataset.json", (phantoms / "dataset.json").read_bytes())
  scores = f"{address}/scores.json"
  assert main(["evaluate", f"{address}/set/labelsTr", str(phantoms / "labelsTr"), "--labels",
               f"{address}/set", "--scores", scores]) == 0
  assert capsys.readouterr().out.endswith(f"all scores: {scores}\n")
  assert json.loads(storage.read(scores))["mean"]["dice"] == 1.0
  assert main(["evaluate", f"{address}/none", str(phantoms / "labelsTr")]) == 2
  assert capsys.readouterr().err == (
    f"rfmedsam2: {address}/none: no such file or folder; check the path\n")
  assert list(tmp_path.iterdir()) == []


def test_of_a_data_set_each_host_brings_the_volumes_that_it_reads(address, phantoms):
  from rfmedsam2_jax.data.datasets import read_case, read_dataset
  for path in (x for x in phantoms.rglob("*") if x.is_file()):
    storage.write(f"{address}/sparse/{path.relative_to(phantoms).as_posix()}", path.read_bytes())
  dataset, local = read_dataset(f"{address}/sparse"), read_dataset(phantoms)
  assert [x.identifier for x in dataset.cases] == [x.identifier for x in local.cases]
  volumes = [x for x in buckets.copy_of(f"{address}/sparse", "read").rglob("*.nii.gz")]
  assert volumes and all(x.stat().st_size == 0 for x in volumes)
  for case, same in list(zip(dataset.cases, local.cases, strict=True))[:1]:
    volume, atoms = read_case(case, 1, dataset.labels)
    expected, truth = read_case(same, 1, local.labels)
    assert (volume.array == expected.array).all() and (atoms == truth).all()
  assert sum(x.stat().st_size > 0 for x in volumes) == 2


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(leases, "BEAT", 0.05)
  monkeypatch.setattr(leases, "LIFE", 0.5)


def held(address, said=lambda line: None, lost=lambda line: None):
  return leases.held(address, said, lost)


# The emulator of Google's storage knows no conditions.
KNOW_CONDITIONS = pytest.mark.parametrize("address", ["gs", "s3"], indirect=True)


@KNOW_CONDITIONS
def test_one_holds_a_folder_and_the_next_has_it_when_it_is_given_back(address, quick):
  folder = f"{address}/run1"
  with held(folder):
    with pytest.raises(UserError, match=f"{folder}: is in use by process "), held(folder):
      pass
    time.sleep(2 * leases.LIFE)  # it is renewed
    with pytest.raises(UserError, match="is in use"), held(folder):
      pass
  lines: list[str] = []
  with held(folder, lines.append):
    pass
  assert lines == []  # at once, without a look
  assert len(storage.children(f"{folder}/.lease")) == 1


@KNOW_CONDITIONS
def test_a_holder_that_is_gone_is_taken_over_from_by_one(address, quick, monkeypatch):
  folder = f"{address}/run2"
  gone = b'{"holder": "process 7 on elsewhere", "count": 3, "given_back": false}'
  storage.write(f"{folder}/.lease/00000004", gone)
  lines: list[str] = []
  done: list[str] = []
  create, at_once = storage.create, threading.Barrier(3, timeout=5)

  def all_create(*what):
    at_once.wait()
    return create(*what)

  monkeypatch.setattr(storage, "create", all_create)

  def take():
    try:
      with held(folder, lines.append):
        done.append("held")
        time.sleep(0.5)
    except UserError as error:
      done.append(str(error))

  several = [threading.Thread(target=take) for _ in range(3)]
  for one in several:
    one.start()
  for one in several:
    one.join()
  assert sorted(x[:10] for x in done).count("held") == 1, done
  assert all("is in use" in x for x in done if x != "held")
  assert f"{folder}: taken over from process 7 on elsewhere, not heard of for 0 s" in lines


@KNOW_CONDITIONS
def test_a_holder_that_was_taken_for_gone_is_told(address, quick):
  folder = f"{address}/run3"
  told = threading.Event()
  lines: list[str] = []
  with held(folder, lost=lambda line: (lines.append(line), told.set())):
    storage.write(f"{folder}/.lease/00000099", b'{"holder": "another"}')
    assert told.wait(5)
  assert lines[0].startswith(f"{folder}: was taken over by another")
  assert b"given_back" not in storage.read(f"{folder}/.lease/00000099")  # it is not his


@pytest.mark.parametrize("address", ["gs"], indirect=True)
def test_the_folder_of_a_run_goes_from_host_to_host(address, tmp_path, monkeypatch):
  place = f"{address}/run4"
  with open_run(place, resume=False, overwrite=False) as run:
    run.write("config.yaml", "{}")
    storage.write(f"{place}/generator/checkpoints/2/large", b"Orbax'")
    for name in ("one", "other"):  # a small one, and yet
      with replacing(run / "prompts" / f"{name}.npy") as temporary:
        np.save(temporary, np.arange(3))
    run.log("generator", 2, {"loss": 1.0})
    run.sync()
    run.log("generator", 3, {"loss": 0.5})  # and the host is gone: this was not sent

  monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "another host"))
  with pytest.raises(UserError, match="run4: holds a run; resume it"):
    check_folder(place, resume=False, overwrite=False)
  with open_run(place, resume=True, overwrite=False) as run:
    assert [line["step"] for line in run.logged()] == [2]
    assert open_array(run / "prompts" / "one.npy", "r", "").tolist() == [0, 1, 2]
    assert (run / "prompts" / "other.npy").stat().st_size == 0  # this host has not read it
    run.log("generator", 4, {"loss": 0.4})
    run.sync()
    assert [line["step"] for line in run.logged()] == [2, 4]
    assert not (run / "generator").exists()  # Orbax reads it where it lies
    assert latest_checkpoint(run.checkpoints("generator")) is None  # it was never finished
    storage.write(f"{place}/generator/checkpoints/2/commit_success.txt", b"")
    assert latest_checkpoint(run.checkpoints("generator")) == run.checkpoints("generator") / "2"

  with open_run(place, resume=False, overwrite=True) as run:
    assert storage.objects(place) == {} and run.logged() == []
    run.lost = "gs://lab/run4: was taken over"
    with pytest.raises(UserError, match="was taken over"):
      run.sync()


@KNOW_CONDITIONS
def test_a_bucket_that_cannot_be_reached_is_one_line(address, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(storage, "system", lambda _: _Broken())
  assert main(["evaluate", f"{address}/a", str(tmp_path)]) == 2
  assert capsys.readouterr().err == (
    f"rfmedsam2: {address}/a: cannot be reached (no account); see to the name, the access and the "
    "network, and do it again\n")


class _Broken:
  def __getattr__(self, name):
    raise RuntimeError("no account")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_without_its_extra_a_bucket_is_one_line(scheme, monkeypatch, capsys, tmp_path):
  import fsspec

  def missing(name):
    raise ImportError("not installed")

  monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
  monkeypatch.setattr(fsspec, "filesystem", missing)
  storage._opened.cache_clear()
  assert main(["evaluate", f"{scheme}://lab/a", "b"]) == 2
  extra = {"gs": "gcs", "s3": "s3"}[scheme]
  error = capsys.readouterr().err
  assert error.endswith(f"pip install 'rfmedsam2-jax[{extra}]'\n") and error.count("\n") == 1
  storage._opened.cache_clear()


def test_a_run_is_not_written_to_s3(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert main(["train", "none.yaml", "--out", "s3://lab/run"]) == 2
  error = capsys.readouterr().err
  assert error.startswith("rfmedsam2: s3://lab/run: checkpoints are written by Orbax, to gs://")
  assert not list(Path().iterdir())
