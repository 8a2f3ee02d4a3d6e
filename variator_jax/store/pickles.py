"""State dicts as torch.save writes them, read without torch and without running anything.

Two layouts: a zip file, and the older sequence of pickles. Python's own unpickler reads them, but
every name in a pickle must be in the list below, and stands for a function of this module. Each
pickle is scanned first: only the instructions that data needs are accepted, and nothing may grow
beyond what the file holds, except that a tensor may repeat its numbers, up to 2^26 of them.
"""

import functools
import io
import math
import mmap
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from variator_jax.files import AnyPath, wrap_errors
from variator_jax.store.arrays import Stored, check_downloaded

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's older layout
_OPCODES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 NONE "
    "NEWTRUE NEWFALSE EMPTY_LIST EMPTY_TUPLE EMPTY_DICT LIST TUPLE DICT TUPLE1 TUPLE2 TUPLE3 GET "
    "BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE PROTO FRAME MARK POP POP_MARK DUP APPEND "
    "APPENDS SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD PERSID BINPERSID STOP".split()
)
_STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2",
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": "<i8", "IntStorage": "<i4",
    "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip
_LARGEST_EXPANDED = 1 << 26  # numbers of a tensor that is larger than its storage
_LARGEST_TUPLE = 1000  # objects in a tuple and the tuples in it; a tensor's has about ten


def open_state_dict(path: AnyPath) -> dict[str, Stored]:
    """The arrays of a pickled state dict by name, bfloat16 as `ml_dtypes.bfloat16`.

    A dict that holds the state dict under 'state_dict' or 'model', with other data, is accepted.

    Raises:
      CheckpointError: naming the file and what is wrong; nothing in the file is ever executed.
    """
    path = pathlib.Path(path)
    what = f"{path} cannot be read as a state dict"
    check_downloaded(path)
    with wrap_errors(what):
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tensors = _named(_read_zip(path) if data[:4] == b"PK\x03\x04" else _read_pickles(data))
    wrapped = wrap_errors(what)
    return {k: Stored(x.shape, x.storage.dtype, wrapped(x.array)) for k, x in tensors.items()}


def _named(content: Any) -> dict[str, "_Tensor"]:
    """Checks that the content is a dict of named tensors."""
    if isinstance(content, dict) and not any(isinstance(x, _Tensor) for x in content.values()):
        content = content.get("state_dict", content.get("model", content))
    if not isinstance(content, dict) or not content:
        raise ValueError(f"it holds a {type(content).__name__} without named tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise ValueError(f"{str(name)[:60]!r} is a {type(value).__name__} and not a tensor")
    return content


def _read_zip(path: pathlib.Path) -> Any:
    """torch.save's layout since 1.6: `<any name>/data.pkl` and `<any name>/data/<key>`."""
    archive, size = zipfile.ZipFile(path), path.stat().st_size
    entries = {entry.filename: entry for entry in archive.infolist()}
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values())
    if packed or sum(entry.file_size for entry in entries.values()) > size:
        raise ValueError("its entries are compressed, which torch never does")
    pickles = [name for name in entries if f"/{name}".endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip file, but not one that torch.save wrote")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in entries and archive.read(f"{prefix}byteorder") != b"little":
        raise ValueError("its byte order is not little-endian")

    def load(storage: _Storage, key: str) -> np.ndarray:
        return np.frombuffer(archive.read(entries[f"{prefix}data/{key}"]), storage.dtype)

    unpickler = _Unpickler(io.BytesIO(archive.read(pickles[0])), size)
    result = unpickler.load()
    for key, storage in unpickler.storages.items():
        if entries[f"{prefix}data/{key}"].file_size != storage.count * storage.dtype.itemsize:
            raise ValueError(f"storage {key[:40]!r} has another size than its tensors")
        storage.read = functools.partial(load, storage, key)
    return result


def _read_pickles(data: mmap.mmap) -> Any:
    """torch's older layout: magic number, version, system, the object, keys, and numbers."""
    magic, version, system = (_Unpickler(data, len(data)).load() for _ in range(3))
    if (magic, version) != (_MAGIC, _PROTOCOL) or system.get("little_endian") is not True:
        raise ValueError("it is not a file of torch.save, or of an unknown version or byte order")
    unpickler = _Unpickler(data, len(data))
    result, storages = unpickler.load(), unpickler.storages
    keys = _Unpickler(data, len(data)).load()
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        raise ValueError("its tensors and its list of storages differ")
    at, view = data.tell(), memoryview(data)
    for key in keys:
        storage = storages[key]
        end = at + 8 + storage.count * storage.dtype.itemsize
        if end > len(view) or int.from_bytes(view[at : at + 8], "little") != storage.count:
            raise ValueError(f"storage {key[:40]!r} is cut short or of another size")
        storage.read = functools.partial(np.frombuffer, view[at + 8 : end], storage.dtype)
        at = end
    if at != len(view):
        raise ValueError("bytes are left over behind its tensors")
    return result


class _Unpickler(pickle.Unpickler):
    """Reads one pickle of tensors and containers, and leaves the stream behind it.

    Args:
      stream: the pickle.
      size: bytes of the file, and items that the pickle's calls may copy.
    """

    def __init__(self, stream: Any, size: int) -> None:
        start = stream.tell()
        _scan(stream, size)
        stream.seek(start)
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}
        self._budget = size
        self._names = {
            "collections.OrderedDict": _Name(self._dictionary),
            "torch._utils._rebuild_tensor": _Name(_Tensor),
            "torch._utils._rebuild_tensor_v2": _Name(_Tensor),
            "torch._utils._rebuild_parameter": _Name(lambda tensor, *_: tensor),
            "torch.Size": _Name(_sizes),
        }
        for name, code in _STORAGES.items():
            self._names[f"torch.{name}"] = _Name(dtype=np.dtype(code))

    def find_class(self, module: str, name: str) -> Any:
        """The replacement of a name in a pickle; none is ever imported."""
        full_name = f"{module}.{name}"
        if full_name not in self._names:
            raise ValueError(f"it refers to {full_name[:100]!r}; nothing was run")
        return self._names[full_name]

    def persistent_load(self, pid: Any) -> "_Storage":
        """The storage of `('storage', dtype, key, device, count)`, the same one for a key."""
        if not isinstance(pid, tuple) or pid[0] != "storage" or any(x is not None for x in pid[5:]):
            raise ValueError("it refers to something that is not a whole storage")
        _, kind, key, _, count = pid[:5]
        if not isinstance(kind, _Name) or kind.dtype is None or not isinstance(key, str):
            raise ValueError("a storage has an unknown dtype or key")
        (count,) = _sizes((count,))
        storage = self.storages.setdefault(key, _Storage(kind.dtype, count))
        if (storage.dtype, storage.count) != (kind.dtype, count):
            raise ValueError(f"storage {key[:40]!r} is described in two ways")
        return storage

    def _dictionary(self, items: Any = ()) -> "_Dictionary":
        """An ordered dict; a call of a few bytes can copy a long list, so copies are counted."""
        self._budget -= len(items)
        if self._budget < 0:
            raise ValueError("its calls copy more than the file holds")
        return _Dictionary(items)


def _scan(stream: Any, size: int) -> None:
    """Refuses instructions that data does not need, and objects that would exhaust the reader.

    Those are memo numbers beyond the file's size, for which Python reserves a table; integers that
    are slow to hash; and tuples that hold each other so often that hashing one never ends.
    """
    mark = pickletools.markobject
    stack: list[Any] = []  # of each object: how many objects it is as a tuple; or the mark
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        name, before = opcode.name, opcode.stack_before
        if name not in _OPCODES:
            raise ValueError(f"it uses the pickle instruction {name}; nothing was run")
        if isinstance(argument, int) and argument.bit_length() > 128:
            raise ValueError("it holds an integer of more than 128 bits")
        if "PUT" in name or name == "MEMOIZE":
            key = len(memo) if argument is None else argument
            if key > size:
                raise ValueError("its memo is larger than the file")
            memo[key] = stack[-1]
            continue
        taken = len(before)
        if mark in before:
            since = len(stack) - max(i for i, item in enumerate(stack) if item is mark)
            taken = since + before.index(mark)
        if taken > len(stack):
            raise ValueError("it is a broken pickle")
        items = [stack.pop() for _ in range(taken)]
        weight = memo[argument] if "GET" in name else items[0] if name == "DUP" else 1
        if "TUPLE" in name:
            weight += sum(item for item in items if item is not mark)
        if weight > _LARGEST_TUPLE:
            raise ValueError("it holds a tuple that is too large or too deep")
        stack += [kind if kind is mark else weight for kind in opcode.stack_after]


class _Sealed:
    """An object that a pickle cannot complete by its instruction BUILD."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError(f"it changes a {type(self).__name__}; nothing was set")


class _Name(_Sealed):
    """The replacement of a name in a pickle: a call or a dtype."""

    def __init__(self, call: Any = None, dtype: np.dtype | None = None) -> None:
        self._call, self.dtype = call, dtype

    def __call__(self, *arguments: Any) -> Any:
        if self._call is None:
            raise ValueError("it calls something that is not a tensor or a container")
        return self._call(*arguments)


class _Dictionary(dict):
    """An ordered dict, whose attributes (torch's versions) are ignored."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage(_Sealed):
    """A flat run of numbers that tensors are views of; `read` is set when the pickle was read."""

    def __init__(self, dtype: np.dtype, count: int) -> None:
        self.dtype, self.count = dtype, count
        self.read: Callable[[], np.ndarray] = lambda: np.zeros(0)


class _Tensor(_Sealed):
    """A strided view of a storage."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> None:
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor has no storage")
        shape, strides, (offset,) = _sizes(shape), _sizes(strides), _sizes((offset,))
        if len(shape) != len(strides):
            raise ValueError(f"a tensor has shape {shape} and strides {strides}")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        largest = max(storage.count, _LARGEST_EXPANDED)  # a stride of 0 repeats numbers
        if 0 not in shape and (last >= storage.count or math.prod(shape) > largest):
            raise ValueError(f"a tensor of shape {shape} exceeds its storage")
        self.storage, self.shape, self._offset, self._strides = storage, shape, offset, strides

    def array(self) -> np.ndarray:
        """The view as a read-only array."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.storage.dtype)
        numbers = self.storage.read()
        if numbers.size != self.storage.count:
            raise ValueError("a tensor's numbers are missing")
        steps = [step * numbers.itemsize for step in self._strides]
        view = numbers[self._offset :]
        return np.lib.stride_tricks.as_strided(view, self.shape, steps, writeable=False)


def _sizes(numbers: Any) -> tuple[int, ...]:
    """Sizes, strides or an offset: a few numbers below 2^58."""
    proper = isinstance(numbers, tuple | list) and len(numbers) <= 32
    proper = proper and all(type(n) is int and 0 <= n < 1 << 58 for n in numbers)
    if not proper or math.prod(n for n in numbers if n) >= 1 << 58:
        raise ValueError("a tensor has no proper shape")
    return tuple(numbers)
