"""What a pickled state dict may hold: tensors, their storages, numpy arrays and ordered dicts.

The numbers of an older torch file come behind the pickle that speaks of them, so that tensors and
storages are only described here until the whole file was read. Layouts of files are
`torch_pickle.py`'s business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from variator_jax.errors import CheckpointError
from variator_jax.store.data_pickle import Buildable, Symbol, is_key

_STORAGES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "DoubleStorage": "<f8",
        "FloatStorage": "<f4",
        "HalfStorage": "<f2",
        "BFloat16Storage": ml_dtypes.bfloat16,
        "LongStorage": "<i8",
        "IntStorage": "<i4",
        "ShortStorage": "<i2",
        "CharStorage": "i1",
        "ByteStorage": "u1",
        "BoolStorage": "?",
    }.items()
}
_MAX_ITEMS = 10_000_000  # of ordered dicts, in one file; each is copied from a list


class Budget:
    """Counts what a file builds by calls, for a call of few bytes can copy a long list."""

    def __init__(self) -> None:
        self._left = _MAX_ITEMS

    def take(self, count: int) -> None:
        """Takes `count` items from the file's share."""
        self._left -= count
        if self._left < 0:
            raise CheckpointError(f"its dictionaries have more than {_MAX_ITEMS} items in all")


def symbols(
    load_from_bytes: Callable[[Any], Any] | None, budget: Budget | None = None
) -> dict[str, Symbol]:
    """The names that a state dict may hold.

    Args:
      load_from_bytes: reads a storage that a plain pickle holds as bytes; None where none belongs.
      budget: what the file may still build, with the files in it; None begins a new one.
    """
    allowed: dict[str, Callable[..., Any] | None] = {
        "collections.OrderedDict": _ordered_dict(budget or Budget()),
        "torch._utils._rebuild_tensor": Tensor,
        "torch._utils._rebuild_tensor_v2": Tensor,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch.Size": lambda sizes: _sizes(sizes),
        "_codecs.encode": _latin1(),
        "numpy.dtype": _Dtype,
        "numpy.ndarray": None,
    }
    for builtins in ("builtins", "__builtin__"):
        allowed[f"{builtins}.bytes"] = _no_bytes
    for module in ("numpy.core", "numpy._core"):
        allowed[f"{module}.multiarray._reconstruct"] = Array
        allowed[f"{module}.numeric._frombuffer"] = _frombuffer
    if load_from_bytes is not None:
        allowed["torch.storage._load_from_bytes"] = load_from_bytes
    found = {name: Symbol(name, call) for name, call in allowed.items()}
    for name, dtype in _STORAGES.items():
        found[f"torch.{name}"] = Symbol(name, value=dtype)
    found["ml_dtypes.bfloat16"] = Symbol("bfloat16", value=ml_dtypes.bfloat16)
    return found


class Persistent:
    """Storages by key, described by their persistent ids."""

    def __init__(self, load: Callable[[str, np.dtype, int], np.ndarray] | None = None) -> None:
        self.storages: dict[str, Storage] = {}
        self._load = load

    def __call__(self, pid: Any) -> Storage:
        """The storage of `('storage', dtype, key, device, count)`, the same one for a key."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise CheckpointError("it refers to something that is no tensor's storage")
        _, kind, key, _, count, *view = pid
        if not isinstance(kind, Symbol) or not isinstance(kind.value, np.dtype):
            raise CheckpointError("a storage of unknown dtype")
        if not isinstance(key, str) or any(part is not None for part in view):
            raise CheckpointError("a storage that is a part of another one")
        (count,) = _sizes((count,))
        if key not in self.storages:
            data = None if self._load is None else self._load(key, kind.value, count)
            self.storages[key] = Storage(kind.value, count, data)
        found = self.storages[key]
        if (found.dtype, found.count) != (kind.value, count):
            raise CheckpointError(f"storage {key[:40]!r} is described in two ways")
        return found


class Storage:
    """A flat run of numbers that tensors look into."""

    def __init__(self, dtype: np.dtype, count: int, data: np.ndarray | None = None) -> None:
        self.dtype, self.count, self.data = dtype, count, data


class Tensor:
    """A strided view of a storage."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> None:
        if not isinstance(storage, Storage):
            raise CheckpointError("a tensor has no storage")
        shape, strides = _shape(shape), _sizes(strides)
        last = _sizes((offset,))[0]
        if len(shape) != len(strides):
            raise CheckpointError(f"a tensor has shape {shape} and strides {strides}")
        if 0 not in shape:
            last += sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            if last >= storage.count or math.prod(shape) > storage.count:
                raise CheckpointError(f"a tensor of shape {shape} exceeds its storage")
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> np.ndarray:
        """The view as a read-only array, without a copy."""
        data, dtype = self.storage.data, self.storage.dtype
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        if data is None or data.size != self.storage.count:
            raise CheckpointError("a tensor's numbers are missing")
        steps = [step * dtype.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(
            data[self.offset :], self.shape, steps, writeable=False
        )


class _Dtype(Buildable):
    """A numpy dtype; its byte order comes in a second step."""

    def __init__(self, name: Any, *rest: Any) -> None:
        if isinstance(name, Symbol):
            name = name.value
        elif not isinstance(name, str) or not re.fullmatch(r"[<>|=]?[fiub][1248]", name):
            found = repr(name[:40]) if isinstance(name, str) else f"a {type(name).__name__}"
            raise CheckpointError(f"arrays of dtype {found}, which are no numbers")
        self.dtype = np.dtype(name)

    def build(self, state: Any) -> None:
        """Takes numpy's version and byte order."""
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise CheckpointError("an array's dtype is broken")
        if any(part is not None for part in state[2:5]):
            raise CheckpointError("arrays with fields, which are no tensors")
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class Array(Buildable):
    """A numpy array; its content comes in a second step."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        """Takes numpy's version, shape, dtype, order and bytes."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise CheckpointError("an array is broken")
        _, shape, dtype, fortran, content = state
        self.value = _from_bytes(content, dtype, shape, "F" if fortran else "C")


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
    array = Array()
    array.value = _from_bytes(content, dtype, shape, order)
    return array


def _from_bytes(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(content, (bytes, bytearray)):
        raise CheckpointError("an array without numbers")
    shape = _shape(shape)
    if len(content) != math.prod(shape) * dtype.dtype.itemsize or order not in ("C", "F"):
        raise CheckpointError(f"an array of shape {shape} with {len(content)} bytes")
    return np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


def _sizes(found: Any) -> tuple[int, ...]:
    if not isinstance(found, (tuple, list)) or len(found) > 32:
        raise CheckpointError("a tensor without a shape")
    for n in found:
        if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 1 << 48:
            raise CheckpointError("a tensor without a proper shape")
    return tuple(found)


def _shape(found: Any) -> tuple[int, ...]:
    shape = _sizes(found)
    # numpy refuses these even where there is not a single number in them.
    if 0 in shape and math.prod(n for n in shape if n) >= 1 << 58:
        raise CheckpointError("a tensor without a proper shape")
    return shape


def _latin1() -> Callable[[Any, Any], bytes]:
    seen: dict[int, tuple[str, bytes]] = {}  # so that a long text named twice is kept once

    def encode(text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise CheckpointError("it calls '_codecs.encode' for something else than bytes")
        if id(text) not in seen:
            seen[id(text)] = (text, text.encode("latin-1"))
        return seen[id(text)][1]

    return encode


def _no_bytes() -> bytes:
    """How old protocols spell an empty `bytes`; it takes no arguments, whatever Python's does."""
    return b""


def _ordered_dict(budget: Budget) -> Callable[..., dict]:
    def ordered_dict(items: Any = ()) -> dict:
        if not isinstance(items, (list, tuple)):
            raise CheckpointError("a dictionary is broken")
        budget.take(len(items))
        for pair in items:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not is_key(pair[0]):
                raise CheckpointError("a dictionary is broken")
        return dict(items)

    return ordered_dict
