"""Files of torch.save without PyTorch: what PyTorch reads of them, bit for bit, or one line."""

import pickle
import struct
import zipfile

import numpy as np
import pytest

from convert.sources import read_source
from convert.torch_files import StoredTensor, read_torch
from rfmedsam2_jax.base.errors import UserError

torch = pytest.importorskip("torch")

KINDS = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64",
         "bool", "complex64", "complex128")


def bits(x) -> tuple:
  """Shape, size of a number, and all bytes, of a tensor of PyTorch or of ours."""
  if isinstance(x, StoredTensor):
    array = np.ascontiguousarray(x.array())
    return x.shape, array.itemsize, array.tobytes()
  x = x.detach().contiguous()
  return tuple(x.shape), x.element_size(), bytes(x.flatten().view(torch.uint8).numpy())


def assert_same(ours, theirs):
  assert type(ours) is type(theirs) or isinstance(ours, StoredTensor | dict | tuple)
  if isinstance(theirs, torch.Tensor):
    assert bits(ours) == bits(theirs)
  elif isinstance(theirs, dict):
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
      assert_same(ours[key], x)
  elif isinstance(theirs, list | tuple):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
      assert_same(a, b)
  else:
    assert ours == theirs


def test_every_tensor_has_pytorchs_bits(tmp_path):
  torch.manual_seed(0)
  base = torch.randn(6, 8)
  module = torch.nn.Conv2d(3, 4, 3)
  network = torch.nn.Sequential(module, torch.nn.BatchNorm2d(4))
  optimizer = torch.optim.AdamW(network.parameters())
  network(torch.randn(1, 3, 5, 5)).sum().backward()
  optimizer.step()
  tree = {
    **{kind: (100 * torch.randn(3, 5)).to(getattr(torch, kind)) for kind in KINDS},
    "0-dim": torch.tensor(2.5), "empty": torch.zeros(0, 7), "nan": torch.tensor([np.nan, -0.0]),
    "transposed": base.t(), "offset": base[2:, 3:], "step": base[::2, ::3], "same": base,
    "again": base[1], "expanded": torch.ones(1, 3).expand(4, 3), "half": base.bfloat16()[:, 1::2],
    "parameter": module.weight, "state": network.state_dict(), "optimizer": optimizer.state_dict(),
    "rest": {"epoch": 7, "large": 2**70, "rate": 1e-4, "none": None, "words": ["a", ("ä", True)],
             "size": base.shape, 3: "a number as a key"},
  }
  torch.save(tree, tmp_path / "x.pt")
  assert_same(read_torch(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True))
  # Half precision, as the converter takes it.
  half = tree["half"]
  np.testing.assert_array_equal(
    read_torch(tmp_path / "x.pt")["half"].array(np.float32), half.float().numpy())


def rewritten(source, target, change):
  """A copy of a zip file whose entries go through `change(name, content)`; checksums are right."""
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
    for name in old.namelist():
      new.writestr(name, change(name.partition("/")[2], old.read(name)))
  return target


def test_files_of_machines_of_the_other_byte_order_are_read(tmp_path):
  torch.save({"x": torch.arange(5, dtype=torch.int32)}, tmp_path / "x.pt")

  def swap(name, content):
    if name == "byteorder":
      return b"big"
    return np.frombuffer(content, np.int32).byteswap().tobytes() if "data/" in name else content

  x = read_torch(rewritten(tmp_path / "x.pt", tmp_path / "big.pt", swap))["x"]
  np.testing.assert_array_equal(x.array(), np.arange(5))
  assert x.array().dtype == np.int32


def global_(name, more=b""):
  module, _, last = name.rpartition(".")
  return b"\x80\x02c" + f"{module}\n{last}\n".encode() + more + b"."


STORAGE = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK"
REBUILD = b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n"


def tensor(offset=0, shape=(3,), strides=(1,), numbers=4):
  """The pickle of a dict with a tensor in a storage that is said to have `numbers`."""
  def whole(n):
    return b"\x8a\x09" + struct.pack("<q", n) + b"\x00" if n >= 0 else b"J" + struct.pack("<i", n)

  sizes = [b"(" + b"".join(map(whole, values)) + b"t" for values in (shape, strides)]
  return (REBUILD + STORAGE + bytes([numbers]) + b"tQ" + whole(offset) + b"".join(sizes)
          + b"\x89}tRs.")


HOSTILE = {
  "a call of the system": (b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", "posix.system"),
  "eval by another way": (global_("builtins.eval"), "builtins.eval"),
  "a method of ours": (global_("convert.torch_files.read_torch"), "torch_files.read_torch"),
  "a name that is called": (global_("torch.FloatStorage", b")R"), "a call of torch.FloatStorage"),
  "a text that is called": (b"\x80\x02X\x02\x00\x00\x00os)R.", "a call of os"),
  "an object": (global_("collections.OrderedDict", b")\x81"), "the operation NEWOBJ"),
  "attributes of a list": (b"\x80\x02]}b.", "the state of a list"),
  "attributes of a function": (global_("collections.OrderedDict", b"}b"), "the state of a Global"),
  "a registered class": (b"\x80\x02\x82\x01.", "the operation EXT1"),
  "an old text": (b"I1\n.", "the operation INT"),
  "a storage elsewhere": (b"\x80\x02(X\x05\x00\x00\x00filesK\x01X\x01\x00\x00\x000K\x01K\x01tQ.",
                          "behind files"),
  "a storage that is not there": (tensor().replace(b"\x01\x00\x00\x000X", b"\x01\x00\x00\x009X"),
                                  "is damaged"),
  "beyond its storage": (tensor(shape=(5,)), "reaches beyond the 4 numbers"),
  "behind its storage": (tensor(offset=2), "reaches beyond the 4 numbers"),
  "strides beyond": (tensor(strides=(2,)), "reaches beyond the 4 numbers"),
  "before its storage": (tensor(offset=-1), "offset -1"),
  "backwards": (tensor(offset=2, strides=(-1,)), "strides (-1,)"),
  "a negative size": (tensor(shape=(-3,)), "shape (-3,)"),
  "sizes without strides": (tensor(shape=(3, 1)), "shape (3, 1), strides (1,)"),
  "more numbers than there are": (tensor(numbers=5), "has 16 bytes, not 5 x float32"),
  "a memo of nothing": (b"\x80\x02h\x05.", "is damaged"),
  "nothing on the stack": (b"\x80\x02R.", "is damaged"),
  "an unhashable key": (b"\x80\x02}]]s.", "is damaged"),
  "cut off": (tensor()[:-9], "is damaged"),
  "two objects": (b"\x80\x02}}.", "is damaged"),
  "no dict": (b"\x80\x02].", "holds a list"),
  "itself": (b"\x80\x02}q\x01X\x01\x00\x00\x00xh\x01s.", "without an end"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_one_line_that_says_why(kind, tmp_path):
  data, says = HOSTILE[kind]
  with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
    archive.writestr("x/data.pkl", data)
    archive.writestr("x/data/0", np.arange(4, dtype=np.float32).tobytes())
  with pytest.raises(UserError) as caught:
    read_source(tmp_path / "x.pt")
  assert str(caught.value).startswith(f"{tmp_path / 'x.pt'}: ")
  assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_harmless_form_of_the_hostile_ones_is_read(tmp_path):
  with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
    archive.writestr("x/data.pkl", tensor(offset=1))
    archive.writestr("x/data/0", np.arange(4, dtype=np.float32).tobytes())
  np.testing.assert_array_equal(read_torch(tmp_path / "x.pt")["x"].array(), [1, 2, 3])


def test_what_is_no_whole_file_of_torch_save_is_one_line(tmp_path):
  path = tmp_path / "x.pt"
  torch.save({"x": torch.ones(300)}, path)
  whole = path.read_bytes()
  flipped = bytearray(whole)
  flipped[whole.index(np.ones(300, np.float32).tobytes()) + 7] ^= 1
  packed = tmp_path / "packed.pt"
  with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
    for name in old.namelist():
      new.writestr(name, old.read(name))
  for content, says in (
    (whole[:-40], "no whole zip file"), (b"", "no whole zip file"), (flipped, "its checksum"),
    (packed.read_bytes(), "is compressed"), (pickle.dumps({"x": 1}, 2), "another pickle"),
  ):
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
      read_torch(path)
