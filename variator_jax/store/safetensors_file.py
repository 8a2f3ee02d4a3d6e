"""Safetensors files array by array: a checked header, reads at offsets, and a writer in pieces.

The library `safetensors` reads and writes whole files, which for the largest backbones is too much.
The format is eight bytes with the header's length, a JSON header, and the numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from variator_jax.errors import CheckpointError

_MAX_HEADER = 100_000_000  # the library's own limit
_MAX_DIMENSIONS = 8  # no network's arrays have more; numpy ends at 64
_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """An array in a file: where its numbers begin, and what they are."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    def read(self) -> np.ndarray:
        """Reads the array from the file, and nothing beside it.

        Raises:
          CheckpointError: if the file is shorter than its header said.
        """
        count = math.prod(self.shape)
        try:
            found = np.fromfile(self.file, self.dtype, count, offset=self.offset)
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error}.") from error
        if found.size != count:
            raise CheckpointError(f"{self.file} is cut short: {self.name} ends early.")
        return found.reshape(self.shape)


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """The arrays of a file, by name; their numbers stay on disk.

    Raises:
      CheckpointError: if the file is missing, or its header is damaged or does not fit its size.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path} is cut short or damaged: its header does not fit.")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its header is no JSON ({error}).") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is damaged: its header is no dictionary.")
    entries = [
        _entry(path, name, content, 8 + length)
        for name, content in header.items()
        if name != "__metadata__"
    ]
    _check_cover(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def _entry(path: pathlib.Path, name: str, content: Any, start: int) -> Entry:
    def number(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 62

    try:
        dtype, shape, (begin, end) = content["dtype"], content["shape"], content["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: its header has no proper {name!r}.") from error
    if not isinstance(shape, list) or not all(map(number, [*shape, begin, end])):
        raise CheckpointError(f"{path} is damaged: {name!r} has no proper shape or place.")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        found = repr(dtype[:40]) if isinstance(dtype, str) else f"a {type(dtype).__name__}"
        raise CheckpointError(f"{path}: {name!r} has dtype {found}, which is not read.")
    if len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"{path} is damaged: {name!r} has {len(shape)} dimensions; up to {_MAX_DIMENSIONS} "
            "are read."
        )
    if math.prod(n for n in shape if n) >= 1 << 58:  # more than numpy takes, even without numbers
        raise CheckpointError(f"{path} is damaged: {name!r} has no proper shape.")
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise CheckpointError(f"{path} is damaged: {name!r} has another size than its shape.")
    return Entry(path, name, tuple(shape), _DTYPES[dtype], start + begin)


def _check_cover(path: pathlib.Path, entries: Iterable[Entry], start: int, size: int) -> None:
    """Every byte behind the header belongs to one array, as the format demands."""
    at = start
    for entry in sorted(entries, key=lambda entry: (entry.offset, math.prod(entry.shape))):
        if entry.offset != at:
            raise CheckpointError(f"{path} is damaged: {entry.name!r} is not where it should be.")
        at += math.prod(entry.shape) * entry.dtype.itemsize
    if at != size:
        raise CheckpointError(f"{path} is cut short or damaged: {size} bytes instead of {at}.")


class Writer:
    """Writes a file whose arrays come one by one, in any order.

    Args:
      path: the file.
      arrays: name -> (shape, dtype) of all that will come.
      metadata: text by name, for the header; transformers asks for {"format": "pt"}.
    """

    def __init__(
        self,
        path: pathlib.Path,
        arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        at, self._places = 0, {}
        # Wide numbers first: then all are aligned, as the library keeps them.
        for name, (shape, dtype) in sorted(arrays.items(), key=lambda x: (-x[1][1].itemsize, x[0])):
            end = at + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [at, end],
            }
            self._places[name] = (at, end)
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start, self._path = 8 + len(text), path
        self._file: IO[bytes] = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one of the announced arrays."""
        begin, end = self._places.pop(name)
        if array.nbytes != end - begin:
            raise ValueError(f"{name} has {array.nbytes} bytes instead of {end - begin}")
        self._file.seek(self._start + begin)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Ends the file, all of whose arrays must have come."""
        self._file.close()
        if self._places:
            raise ValueError(f"{self._path} lacks {', '.join(self._places)}")
