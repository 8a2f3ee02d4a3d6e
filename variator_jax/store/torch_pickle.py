"""State dicts as torch or pickle write them, read without torch and without running anything.

Three layouts: torch.save's zip file, its older sequence of pickles, and a plain pickle of a dict of
torch tensors or numpy arrays. All go through `data_pickle.py`, with the names of
`pickled_tensors.py` and no others. The arrays are views into the file, which is mapped into memory:
nothing is copied until it is used.
"""

from __future__ import annotations

import io
import mmap
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from variator_jax.errors import CheckpointError
from variator_jax.store import data_pickle
from variator_jax.store.pickled_tensors import Array, Budget, Persistent, Storage, Tensor, symbols

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's older layout
_CHUNK = 1 << 24


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a pickled state dict: name -> array, bfloat16 as `ml_dtypes.bfloat16`.

    A dict that holds the state dict under 'state_dict' or 'model', beside other data, will do.

    Raises:
      CheckpointError: naming the file and what is wrong; nothing in the file is ever executed.
    """
    path = pathlib.Path(path)
    try:
        content = _resolve(_read(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read as a state dict: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path} cannot be read: it is too deep or too large.") from error
    return content


def _read(path: pathlib.Path) -> Any:
    if not path.is_file():
        raise CheckpointError("it is a folder" if path.is_dir() else "there is no such file")
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise CheckpointError("the file is empty")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if content[:4] == b"PK\x03\x04":
        return _read_zip(path, content)
    return _read_pickles(content)


def _read_pickles(content: bytes | mmap.mmap, within: Budget | None = None) -> Any:
    """A plain pickle, or torch's older layout: magic number, versions, object, keys, numbers."""
    stream: Any = io.BytesIO(content) if isinstance(content, bytes) else content
    names = _symbols() if within is None else symbols(None, within)
    first = data_pickle.read(stream, names)
    if first != _MAGIC:
        return first
    if data_pickle.read(stream, names) != _PROTOCOL:
        raise CheckpointError("an unknown version of torch's older layout")
    system = data_pickle.read(stream, names)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("numbers in another byte order than little-endian")
    persistent = Persistent()
    result = data_pickle.read(stream, names, persistent)
    keys = data_pickle.read(stream, names)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError("its list of storages is broken")
    if sorted(keys) != sorted(persistent.storages):
        raise CheckpointError("its tensors and its list of storages differ")
    at, view = stream.tell(), memoryview(content)
    for key in keys:
        storage = persistent.storages[key]
        size = storage.count * storage.dtype.itemsize
        if at + 8 + size > len(view):
            raise CheckpointError("it is cut short")
        if int.from_bytes(view[at : at + 8], "little") != storage.count:
            raise CheckpointError(f"storage {key[:40]!r} has another size than its tensors say")
        if size:
            storage.data = np.frombuffer(view[at + 8 : at + 8 + size], storage.dtype)
        at += 8 + size
    if at != len(view):
        raise CheckpointError("bytes are left over behind its tensors")
    return result


def _symbols() -> dict[str, data_pickle.Symbol]:
    budget = Budget()
    return symbols(_storage_loader(budget), budget)


def _storage_loader(budget: Budget) -> Callable[[Any], Storage]:
    """Reads a storage in a plain pickle: an older torch file within the file."""
    seen: dict[int, tuple[Any, Storage]] = {}  # so that bytes named twice are read once

    def load_from_bytes(content: Any) -> Storage:
        if not isinstance(content, (bytes, bytearray)):
            raise CheckpointError("a storage without bytes")
        if id(content) not in seen:
            found = _read_pickles(bytes(content), budget)
            if not isinstance(found, Storage):
                raise CheckpointError(f"a {type(found).__name__} where a storage belongs")
            seen[id(content)] = (content, found)
        return seen[id(content)][1]

    return load_from_bytes


def _read_zip(path: pathlib.Path, content: mmap.mmap) -> Any:
    """torch.save's layout since 1.6: `<any name>/data.pkl` and `<any name>/data/<key>`."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, OSError) as error:
        raise CheckpointError(f"it is a damaged or shortened zip file ({error})") from error
    except (EOFError, OverflowError, KeyError, IndexError) as error:
        raise CheckpointError("it is a damaged or shortened zip file") from error
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError("it is a zip file, but not one that torch.save wrote")
    prefix = pickles[0].removesuffix("data.pkl")
    order = entries.get(prefix + "byteorder")
    if order is not None and bytes(_member(content, order)) != b"little":
        raise CheckpointError("numbers in another byte order than little-endian")

    def load(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        entry = entries.get(f"{prefix}data/{key}")
        if entry is None:
            raise CheckpointError(f"storage {key[:40]!r} is missing")
        if entry.file_size != count * dtype.itemsize:
            raise CheckpointError(f"storage {key[:40]!r} has another size than its tensors say")
        found = _member(content, entry)
        return np.frombuffer(found, dtype) if count else np.zeros(0, dtype)

    stream = io.BytesIO(bytes(_member(content, entries[pickles[0]])))
    return data_pickle.read(stream, _symbols(), Persistent(load))


def _member(content: mmap.mmap, entry: zipfile.ZipInfo) -> memoryview:
    """The bytes of a zip file's entry, in place, after comparing their checksum."""
    view, start, name = memoryview(content), entry.header_offset, entry.filename[:60]
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise CheckpointError(f"entry {name!r} is compressed or encrypted, which torch never does")
    if not 0 <= start <= len(view) - 30 or view[start : start + 4] != b"PK\x03\x04":
        raise CheckpointError(f"entry {name!r} is not where the zip file says")
    name_length, extra_length = struct.unpack("<HH", view[start + 26 : start + 30])
    begin = start + 30 + name_length + extra_length
    found = view[begin : begin + entry.file_size]
    checksum = 0
    for at in range(0, len(found), _CHUNK):
        checksum = zlib.crc32(found[at : at + _CHUNK], checksum)
    if len(found) != entry.file_size or checksum != entry.CRC:
        raise CheckpointError(f"entry {name!r} is damaged: its checksum differs")
    return found


def _resolve(content: Any) -> dict[str, np.ndarray]:
    """Checks that the content is a dict of named tensors, and turns them into arrays."""
    tensors = (Tensor, Array)
    if isinstance(content, Mapping) and not any(isinstance(v, tensors) for v in content.values()):
        content = content.get("state_dict", content.get("model", content))
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"it holds a {type(content).__name__} and no named tensors")
    arrays: dict[str, np.ndarray] = {}
    for name, value in content.items():
        found = value.array() if isinstance(value, Tensor) else getattr(value, "value", None)
        if not isinstance(name, str) or not isinstance(found, np.ndarray):
            what = repr(name[:60]) if isinstance(name, str) else f"the value of a {_kind(name)}"
            raise CheckpointError(f"{what} is a {_kind(value)} and no tensor")
        arrays[name] = found
    return arrays


def _kind(found: Any) -> str:
    return type(found).__name__
