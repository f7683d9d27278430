"""Files of `torch.save` without PyTorch: a reader of pickles that knows tensors and nothing else.

The format is that of PyTorch since 1.6: a zip file with a pickle, `data.pkl`, and one file of bytes
per storage, `data/KEY`. The pickle's operations are interpreted here, none is run by Python; what
may be called is in two tables. In: a path. Out: the object, with a `StoredTensor` for each tensor,
whose numbers are read when they are asked for.
"""

import dataclasses
import math
import pickletools
import struct
import typing
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rfmedsam2_jax.base.errors import UserError, first_line
from rfmedsam2_jax.data.files import DAMAGED_ZIP

_KINDS = {  # of numbers, by the class of their storage
  "Float": np.float32, "Double": np.float64, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16,
  "Char": np.int8, "Byte": np.uint8, "Short": np.int16, "Int": np.int32, "Long": np.int64,
  "Bool": np.bool_, "ComplexFloat": np.complex64, "ComplexDouble": np.complex128,
}
_MOST_AXES = 32


class Global(NamedTuple):
  """A name of Python in a pickle. It is never looked up, it only stands for itself."""

  module: str
  name: str

  def __str__(self) -> str:
    return f"{self.module}.{self.name}"


Calls = Mapping[str, Callable[..., Any]]


class _Refused(Exception):
  """What a pickle asks for that has nothing to do with tensors."""


class _Storage(NamedTuple):
  """`raw`: uint8, as it lies in the file."""

  raw: np.ndarray
  dtype: np.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
  """A tensor of a file: a view of a storage, offset and strides counted in its numbers."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def dtype(self) -> np.dtype:
    return self.storage.dtype.newbyteorder("=")

  def array(self, dtype: Any = None) -> np.ndarray:
    """The numbers, as `dtype` if that is given; a view of the file where nothing is converted."""
    if 0 in self.shape:
      return np.zeros(self.shape, dtype or self.dtype)
    # Converted is what lies in the file, not what it is repeated to.
    size = self.storage.dtype.itemsize
    span = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
    part = self.storage.raw[self.offset * size : (self.offset + span) * size]
    values = part.view(self.storage.dtype).astype(dtype or self.dtype, copy=False)
    return np.lib.stride_tricks.as_strided(
      values, self.shape, tuple(stride * values.itemsize for stride in self.strides),
      writeable=False)


def read_torch(file: Path, more: Mapping[str, Callable[..., Any]] = {}) -> dict[Any, Any]:
  """The dict in a file that `torch.save` wrote.

  Args:
    more: what else the pickle may call, by its name: functions that only put values together.

  Raises:
    UserError: no such file, another or an older format, bytes that do not have their checksum, more
      than tensors, no dict.
  """
  try:
    if not zipfile.is_zipfile(file):
      with open(file, "rb") as stream:
        if stream.read(1) == b"\x80":  # with which a pickle begins
          raise _Refused("it is another pickle, or of PyTorch before 1.6")
      raise ValueError("it is no whole zip file")
    with zipfile.ZipFile(file) as archive:
      if broken := archive.testzip():
        raise ValueError(f"{broken} does not have its checksum")
      tree = _read_archive(archive, file, more)
  except _Refused as error:
    raise UserError(
      f"{file}: holds more than tensors ({error}), and unpickling that could run code, so it was "
      "not read; check the file or have its author save the state dict alone, with torch.save of "
      "PyTorch 1.6 or later") from None
  except (*DAMAGED_ZIP, KeyError, IndexError, TypeError, AttributeError, OverflowError,
          struct.error, OSError) as error:
    raise UserError(f"{file}: is damaged or no checkpoint of PyTorch ({first_line(error, 160)}); "
                    "download it again") from None
  if not isinstance(tree, dict):
    raise UserError(f"{file}: holds a {type(tree).__name__} and no state dict; check the file")
  return tree


def _read_archive(archive: zipfile.ZipFile, file: Path, more: Calls) -> Any:
  entries = {info.filename: info for info in archive.infolist()}
  pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
  if len(pickles) != 1 or len(entries) != len(archive.infolist()):
    raise ValueError(f"it has {len(pickles)} files called data.pkl, or two of one name")
  if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
    raise ValueError("what is in the zip file is compressed, which torch.save does not do")
  root = pickles[0].removesuffix("data.pkl")
  order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
  if order not in (b"little", b"big"):
    raise ValueError("its byteorder is neither little nor big")
  raw = np.memmap(file, np.uint8, "r")

  def storage(of: Any) -> _Storage:
    what, kind, key, _, count = of
    name = kind.name.removesuffix("Storage") if isinstance(kind, Global) else ""
    if what != "storage" or name not in _KINDS or kind.module != "torch":
      raise _Refused(f"a {kind} behind {what}")
    info = entries[f"{root}data/{key}"]
    dtype = np.dtype(_KINDS[name])
    dtype = dtype.newbyteorder(">") if order == b"big" else dtype
    if type(count) is not int or count * dtype.itemsize != info.file_size:
      raise ValueError(f"{info.filename} has {info.file_size} bytes, not {count} x {dtype}")
    # Behind the entry's own header, of which testzip has seen that it is there.
    lengths = bytes(raw[info.header_offset + 26 : info.header_offset + 30])
    begin = info.header_offset + 30 + sum(struct.unpack("<HH", lengths))
    return _Storage(raw[begin : begin + info.file_size], dtype)

  return _interpret(archive.read(pickles[0]), {**_CALLS, **more}, storage)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
  """What `torch._utils._rebuild_tensor_v2` makes; ValueError if it does not lie in its storage."""
  if not isinstance(storage, _Storage):
    raise ValueError("a tensor without a storage")
  shape, strides = tuple(shape), tuple(strides)
  if len(shape) != len(strides) or len(shape) > _MOST_AXES or not all(
      type(n) is int and 0 <= n < 2**62 for n in (offset, *shape, *strides)):
    raise ValueError(f"a tensor of shape {shape}, strides {strides} and offset {offset}")
  count = len(storage.raw) // storage.dtype.itemsize
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  if math.prod(shape) and last >= count:
    raise ValueError(f"a tensor of shape {shape} reaches beyond the {count} numbers of its storage")
  return StoredTensor(storage, offset, shape, strides)


_CALLS: Calls = {
  "collections.OrderedDict": lambda *pairs: dict(*pairs),
  "torch._utils._rebuild_tensor_v2": _tensor,
  "torch._utils._rebuild_parameter": lambda data, *_: data,
  "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
  "torch.Size": lambda sizes: tuple(sizes),
  "torch.device": lambda *parts: ":".join(map(str, parts)),
}
_DTYPES = ("float", "double", "half", "float16", "float32", "float64", "bfloat16", "uint8", "int8",
           "int16", "int32", "int64", "long", "bool", "complex64", "complex128")
_NAMES = {*(f"torch.{kind}Storage" for kind in _KINDS), *(f"torch.{name}" for name in _DTYPES)}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
_EMPTY: dict[str, Callable[[], Any]] = {
  "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = ("PROTO", "STOP")


def _interpret(data: bytes, calls: Calls, storage: Callable[[Any], _Storage]) -> Any:
  """The object of a pickle of protocol 2, whose operations are those that torch.save writes."""
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[int, Any] = {}

  def since_mark() -> list[Any]:
    begin = marks.pop()
    taken, stack[begin:] = stack[begin:], []
    return taken

  for operation, of_it, _ in pickletools.genops(data):
    name, argument = operation.name, typing.cast(Any, of_it)
    if name in _VALUES:
      stack.append(argument)
    elif name in ("BINPUT", "LONG_BINPUT"):
      memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
      stack.append(memo[argument])
    elif name == "MARK":
      marks.append(len(stack))
    elif name == "TUPLE":
      stack.append(tuple(since_mark()))
    elif name in _TUPLES:
      stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
    elif name in _EMPTY:
      stack.append(_EMPTY[name]())
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
      one = {"APPEND": 1, "SETITEM": 2}.get(name)
      given = since_mark() if one is None else [stack.pop() for _ in range(one)][::-1]
      _filled(stack[-1], given, dict if name.startswith("SET") else list)
    elif name == "GLOBAL":
      stack.append(_known(Global(*argument.split(" ", 1)), calls))
    elif name == "BINPERSID":
      stack.append(storage(stack.pop()))
    elif name == "REDUCE":
      arguments, function = stack.pop(), stack.pop()
      if not isinstance(function, Global) or str(function) not in calls:
        raise _Refused(f"a call of {function}")
      stack.append(calls[str(function)](*arguments))
    elif name == "BUILD":
      stack.pop()
      if type(stack[-1]) is not dict:  # whose attributes, such as _metadata, nobody needs
        raise _Refused(f"the state of a {type(stack[-1]).__name__}")
    elif name not in _IGNORED:
      raise _Refused(f"the operation {name}")
  (result,) = stack
  return result


def _known(found: Global, calls: Calls) -> Global:
  """The same name, if it has to do with tensors or may be called."""
  if str(found) not in calls and str(found) not in _NAMES:
    raise _Refused(str(found))
  return found


def _filled(target: Any, given: list[Any], kind: type) -> None:
  if type(target) is not kind:
    raise ValueError(f"its pickle fills a {type(target).__name__} as a {kind.__name__}")
  if isinstance(target, list):
    target.extend(given)
  elif isinstance(target, dict):
    target.update(zip(given[::2], given[1::2], strict=True))

