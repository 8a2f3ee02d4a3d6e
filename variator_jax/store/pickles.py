"""State dicts as torch or pickle write them, read without torch and without running anything.

Three layouts: torch.save's zip file, its older sequence of pickles, and a plain pickle of a dict of
torch tensors or numpy arrays. Python's own unpickler reads them, but every name in a pickle must be
in the list below, and stands for a function of this module. Each pickle is scanned first: only the
instructions that data needs are accepted, and nothing may grow beyond what the file holds.
"""

from __future__ import annotations

import functools
import io
import math
import mmap
import os
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from variator_jax.files import wrap_errors
from variator_jax.store.arrays import Stored

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's older layout
_OPCODES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 NONE NEWTRUE "
    "NEWFALSE EMPTY_LIST EMPTY_TUPLE EMPTY_DICT LIST TUPLE DICT TUPLE1 TUPLE2 TUPLE3 GET BINGET "
    "LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE PROTO FRAME MARK POP POP_MARK DUP APPEND APPENDS "
    "SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD PERSID BINPERSID STOP".split()
)
_STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2",
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": "<i8", "IntStorage": "<i4",
    "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip
_NUMBERS = tuple(f"{kind}{size}" for kind in "fiu" for size in (1, 2, 4, 8)) + ("b1",)
_LARGEST_TUPLE = 1000  # objects in a tuple and the tuples in it; a tensor's has about ten


def open_state_dict(path: str | os.PathLike) -> dict[str, Stored]:
    """The arrays of a pickled state dict by name, bfloat16 as `ml_dtypes.bfloat16`.

    A dict that holds the state dict under 'state_dict' or 'model', with other data, is accepted.

    Raises:
      CheckpointError: naming the file and what is wrong; nothing in the file is ever executed.
    """
    path = pathlib.Path(path)
    what = f"{path} cannot be read as a state dict"

    def stored(array: _Tensor | _Array) -> Stored:
        def read() -> np.ndarray:
            with wrap_errors(what):
                return array.array()

        return Stored(array.shape, array.dtype, read)

    with wrap_errors(what):
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        is_zip = data[:4] == b"PK\x03\x04"
        arrays = _named(_read_zip(path) if is_zip else _read_pickles(data))
        return {name: stored(array) for name, array in arrays.items()}


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a pickled state dict as a whole; see `open_state_dict`."""
    return {name: stored.read() for name, stored in open_state_dict(path).items()}


def _named(content: Any) -> dict[str, _Tensor | _Array]:
    """Checks that the content is a dict of named tensors."""
    kinds = (_Tensor, _Array)
    if isinstance(content, dict) and not any(isinstance(x, kinds) for x in content.values()):
        content = content.get("state_dict", content.get("model", content))
    if not isinstance(content, dict) or not content:
        raise ValueError(f"it holds a {type(content).__name__} without named tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, kinds):
            kind = type(value).__name__
            raise ValueError(f"{str(name)[:60]!r} is a {kind} and not a tensor")
    return content


def _read_zip(path: pathlib.Path) -> Any:
    """torch.save's layout since 1.6: `<any name>/data.pkl` and `<any name>/data/<key>`."""
    archive, size = zipfile.ZipFile(path), path.stat().st_size
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ValueError("its entries are compressed, which torch never does")
    if sum(entry.file_size for entry in archive.infolist()) > size:
        raise ValueError("its entries are larger than the file")
    names = [name for name in archive.namelist() if f"/{name}".endswith("/data.pkl")]
    if len(names) != 1:
        raise ValueError("it is a zip file, but not one that torch.save wrote")
    prefix = names[0].removesuffix("data.pkl")
    if (
        f"{prefix}byteorder" in archive.namelist()
        and archive.read(f"{prefix}byteorder") != b"little"
    ):
        raise ValueError("its byte order is not little-endian")

    def load(key: str, dtype: np.dtype, count: int) -> Callable[[], np.ndarray]:
        entry = archive.getinfo(f"{prefix}data/{key}")
        if entry.file_size != count * dtype.itemsize:
            raise ValueError(f"storage {key[:40]!r} has another size than its tensors")
        return lambda: np.frombuffer(archive.read(entry), dtype)

    return _Unpickler.load_all(io.BytesIO(archive.read(names[0])), size, load)


def _read_pickles(data: Any, nested: bool = False) -> Any:
    """A plain pickle, or torch's older layout: magic number, versions, object, keys, numbers."""
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    storages: dict[str, _Storage] = {}

    def read(**settings: Any) -> Any:
        return _Unpickler.load_all(stream, len(data), nested=nested, **settings)

    first = read()
    if first != _MAGIC:
        return first
    if read() != _PROTOCOL or read().get("little_endian") is not True:
        raise ValueError("it has an unknown version or byte order")
    result = read(storages=storages)
    keys = read()
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        raise ValueError("its tensors and its list of storages differ")
    at, view = stream.tell(), memoryview(data)
    for key in keys:
        storage = storages[key]
        end = at + 8 + storage.count * storage.dtype.itemsize
        if end > len(view) or int.from_bytes(view[at : at + 8], "little") != storage.count:
            raise ValueError(f"storage {key[:40]!r} is cut short or of another size")
        numbers = np.frombuffer(view[at + 8 : end], storage.dtype)
        storage.read = functools.partial(np.asarray, numbers)
        at = end
    if at != len(view):
        raise ValueError("bytes are left over behind its tensors")
    return result


class _Unpickler(pickle.Unpickler):
    """Builds tensors, arrays and containers; every other name is refused.

    Args:
      stream: the pickle.
      size: bytes of the file, which is as much as its calls may copy.
      load: opens the numbers of a storage; without it they are set later.
      storages: takes the storages that the pickle names.
      nested: whether it stands within another pickle, and may not hold a third one.
    """

    def __init__(
        self,
        stream: Any,
        size: int,
        load: Callable[[str, np.dtype, int], Callable[[], np.ndarray]] | None = None,
        storages: dict[str, _Storage] | None = None,
        nested: bool = False,
    ) -> None:
        super().__init__(stream, encoding="latin-1")
        self._budget, self._load = 4 * size, load
        self._storages = {} if storages is None else storages
        calls: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": self._dictionary,
            "torch._utils._rebuild_tensor": _Tensor,
            "torch._utils._rebuild_tensor_v2": _Tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch.Size": lambda sizes: _sizes(sizes),
            "_codecs.encode": self._latin1,
            "numpy.dtype": _dtype,
            "builtins.bytes": lambda: b"",  # how old protocols write empty bytes
            "__builtin__.bytes": lambda: b"",
        }
        for module in ("numpy.core", "numpy._core"):
            calls[f"{module}.multiarray._reconstruct"] = lambda *_: _Array()
            calls[f"{module}.numeric._frombuffer"] = _Array.from_buffer
        if not nested:
            calls["torch.storage._load_from_bytes"] = self._nested
        self._names: dict[str, _Name] = {name: _Name(call) for name, call in calls.items()}
        for name, code in _STORAGES.items():
            self._names[f"torch.{name}"] = _Name(dtype=np.dtype(code))
        self._names["numpy.ndarray"] = _Name()
        self._names["ml_dtypes.bfloat16"] = _Name(dtype=np.dtype(ml_dtypes.bfloat16))

    @classmethod
    def load_all(cls, stream: Any, size: int, *arguments: Any, **settings: Any) -> Any:
        """Scans one pickle, then reads it, and leaves the stream behind it."""
        start = stream.tell()
        _scan(stream, size)
        stream.seek(start)
        return cls(stream, size, *arguments, **settings).load()

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in a pickle; none is ever imported."""
        found = self._names.get(f"{module}.{name}")
        if found is None:
            raise ValueError(f"it refers to {f'{module}.{name}'[:100]!r}; nothing was run")
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage of `('storage', dtype, key, device, count)`, the same one for a key."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise ValueError("it refers to something that is not a tensor's storage")
        _, kind, key, _, count, *view = pid
        if not isinstance(kind, _Name) or kind.dtype is None or not isinstance(key, str):
            raise ValueError("a storage has an unknown dtype or key")
        if any(part is not None for part in view):
            raise ValueError("a storage is a part of another one")
        (count,) = _sizes((count,))
        if key not in self._storages:
            read = None if self._load is None else self._load(key, kind.dtype, count)
            self._storages[key] = _Storage(kind.dtype, count, read)
        found = self._storages[key]
        if (found.dtype, found.count) != (kind.dtype, count):
            raise ValueError(f"storage {key[:40]!r} is described in two ways")
        return found

    def _take(self, count: int) -> None:
        """Counts what calls copy: a call of a few bytes can copy a long list."""
        self._budget -= count
        if self._budget < 0:
            raise ValueError("its calls copy more than the file holds")

    def _dictionary(self, items: Any = ()) -> _Dictionary:
        self._take(len(items))
        return _Dictionary(items)

    def _latin1(self, text: str, encoding: str) -> bytes:
        self._take(len(text))
        if encoding not in ("latin1", "latin-1"):
            raise ValueError("it calls _codecs.encode for something else than bytes")
        return text.encode("latin-1")

    def _nested(self, content: bytes) -> _Storage:
        """A storage in a plain pickle: an older torch file within the file."""
        self._take(len(content))
        found = _read_pickles(content, nested=True)
        if not isinstance(found, _Storage):
            raise ValueError(f"a {type(found).__name__} where a storage belongs")
        return found


def _scan(stream: Any, size: int) -> None:
    """Refuses instructions that data does not need, and objects that would exhaust the reader.

    Those are memo numbers beyond the file's size, for which Python reserves a table; integers that
    are slow to hash; and tuples that hold each other so often that hashing one never ends.
    """
    stack: list[Any] = []  # of each object: how many objects it is as a tuple, or MARK
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name not in _OPCODES:
            raise ValueError(f"it uses the pickle instruction {name}; nothing was run")
        if isinstance(argument, int) and argument.bit_length() > 128:
            raise ValueError("it holds an integer of more than 128 bits")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            key = len(memo) if argument is None else argument
            if key > size:
                raise ValueError("its memo is larger than the file")
            memo[key] = stack[-1]
            continue
        taken = len(opcode.stack_before)
        if pickletools.markobject in opcode.stack_before:
            at = max(i for i, item in enumerate(stack) if item is pickletools.markobject)
            taken = len(stack) - at + opcode.stack_before.index(pickletools.markobject)
        if taken > len(stack):
            raise ValueError("it is a broken pickle")
        items = stack[len(stack) - taken :]
        del stack[len(stack) - taken :]
        weight = 1
        if "TUPLE" in name:
            weight += sum(item for item in items if item is not pickletools.markobject)
        elif "GET" in name:
            weight = memo[argument]
        elif name == "DUP":
            weight = items[0]
        if weight > _LARGEST_TUPLE:
            raise ValueError("it holds a tuple that is too large or too deep")
        for kind in opcode.stack_after:
            stack.append(kind if kind is pickletools.markobject else weight)


class _Name:
    """What stands for a name in a pickle: a call, a dtype, or neither. Nothing can change it."""

    __slots__ = ("_call", "dtype")

    def __init__(self, call: Any = None, dtype: np.dtype | None = None) -> None:
        self._call, self.dtype = call, dtype

    def __call__(self, *arguments: Any) -> Any:
        if self._call is None:
            raise ValueError("it calls something that is not a tensor or a container")
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes an imported name; nothing was set")


class _Dictionary(dict):
    """An ordered dict, whose attributes (torch's versions) are ignored."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage:
    """A flat run of numbers that tensors are views of."""

    __slots__ = ("count", "dtype", "read")

    def __init__(self, dtype: np.dtype, count: int, read: Callable[[], np.ndarray] | None) -> None:
        self.dtype, self.count, self.read = dtype, count, read

    __setstate__ = _Name.__setstate__


class _Tensor:
    """A strided view of a storage, whose numbers may come later."""

    __slots__ = ("_offset", "_storage", "_strides", "dtype", "shape")

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> None:
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor has no storage")
        shape, strides, (offset,) = _sizes(shape), _sizes(strides), _sizes((offset,))
        if len(shape) != len(strides):
            raise ValueError(f"a tensor has shape {shape} and strides {strides}")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if 0 not in shape and max(last, math.prod(shape) - 1) >= storage.count:
            raise ValueError(f"a tensor of shape {shape} exceeds its storage")
        self._storage, self._offset, self._strides = storage, offset, strides
        self.shape, self.dtype = shape, storage.dtype

    __setstate__ = _Name.__setstate__

    def array(self) -> np.ndarray:
        """The view as a read-only array, without a copy."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        numbers = None if self._storage.read is None else self._storage.read()
        if numbers is None or numbers.size != self._storage.count:
            raise ValueError("a tensor's numbers are missing")
        steps = [step * self.dtype.itemsize for step in self._strides]
        view = numbers[self._offset :]
        return np.lib.stride_tricks.as_strided(view, self.shape, steps, writeable=False)


class _Dtype:
    """A numpy dtype; its byte order comes in a second step."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


def _dtype(name: Any, *_: Any) -> _Dtype:
    if isinstance(name, _Name) and name.dtype is not None:
        return _Dtype(name.dtype)
    if not isinstance(name, str) or name.lstrip("<>|=") not in _NUMBERS:
        raise ValueError("it holds arrays that are not of numbers")
    return _Dtype(np.dtype(name))


class _Array:
    """A numpy array; its content comes in a second step."""

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise ValueError("an array has no numbers")
        order = "F" if fortran else "C"
        self._numbers = np.frombuffer(content, dtype.dtype).reshape(_sizes(shape), order=order)

    @classmethod
    def from_buffer(cls, content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        """How newer numpy pickles a contiguous array."""
        array = cls()
        array.__setstate__((1, shape, dtype, order == "F", content))
        return array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self._numbers.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        return self._numbers.dtype

    def array(self) -> np.ndarray:
        """The array, read-only."""
        return self._numbers


def _sizes(numbers: Any) -> tuple[int, ...]:
    """Sizes, strides or an offset: some numbers from 0 to 2^58."""
    if not isinstance(numbers, tuple | list) or len(numbers) > 32:
        raise ValueError("a tensor has no proper shape")
    if not all(type(n) is int and 0 <= n < 1 << 58 for n in numbers):
        raise ValueError("a tensor has no proper shape")
    if math.prod(n for n in numbers if n) >= 1 << 58:
        raise ValueError("a tensor has no proper shape")
    return tuple(numbers)
