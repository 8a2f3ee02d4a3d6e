"""The arrays of our own folders: written leaf by leaf, checked, read as views into the file.

A backbone can be larger than what is left of the memory, so that nothing in here holds more than
one leaf beside what it was given. The file format is `safetensors_file.py`'s business; which arrays
there should be is known to the callers.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from variator_jax.errors import CheckpointError
from variator_jax.store import safetensors_file
from variator_jax.store.files import check_file, read_error

_CHUNK = 1 << 22  # numbers looked at in one go


class Fingerprint:
    """SHA-256 over names, shapes and values rounded to bfloat16; add leaves in order of names.

    The rounding gives a backbone one fingerprint whether it is held in float32 or in bfloat16.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, leaf: np.ndarray) -> None:
        """Takes one array in."""
        self._digest.update(f"{name} {leaf.shape}\n".encode())
        for chunk in _chunks(leaf):
            rounded = chunk.astype(ml_dtypes.bfloat16, copy=False)
            self._digest.update(rounded.view(np.uint8).data)

    def hexdigest(self) -> str:
        """The fingerprint as 64 hex digits."""
        return self._digest.hexdigest()


class ArraysWriter:
    """Writes a file of arrays that come one by one, in the order of their names.

    Args:
      path: the file.
      arrays: name -> anything with a shape and a dtype, of all that will come.
    """

    def __init__(self, path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
        described = {name: (tuple(x.shape), np.dtype(x.dtype)) for name, x in arrays.items()}
        self._path, self._fingerprint = path, Fingerprint()
        self._writer = safetensors_file.Writer(path, described)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one of the announced arrays.

        Raises:
          CheckpointError: if a number in it is not finite.
        """
        check_finite(self._path, {name: array})
        self._fingerprint.add(name, array)
        self._writer.write(name, array)

    def close(self) -> str:
        """Ends the file and returns the fingerprint of what is in it."""
        self._writer.close()
        return self._fingerprint.hexdigest()


def write_arrays(path: pathlib.Path, leaves: Mapping[str, Any]) -> str:
    """Writes a flat dict of arrays, in numpy or on a device, and returns its fingerprint.

    Raises:
      CheckpointError: if a number in it is not finite.
    """
    writer = ArraysWriter(path, leaves)
    for name in sorted(leaves):
        writer.write(name, np.asarray(leaves[name]))
    return writer.close()


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a file as read-only views of it; nothing is read before it is used.

    Raises:
      CheckpointError: if the file is missing, cut short, or its header does not cover it exactly.
    """
    check_file(path)
    entries = safetensors_file.read_header(path)
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise read_error(path, error) from error

    def view(entry: safetensors_file.Entry) -> np.ndarray:
        size = math.prod(entry.shape)
        if not size:
            return np.zeros(entry.shape, entry.dtype)
        return np.frombuffer(content, entry.dtype, size, entry.offset).reshape(entry.shape)

    return {name: view(entry) for name, entry in entries.items()}


def check_finite(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Refuses arrays that no network can run with.

    Raises:
      CheckpointError: naming the first array with a NaN or an infinite number.
    """
    for name, array in arrays.items():
        if not all(_finite(chunk) for chunk in _chunks(array)):
            raise CheckpointError(f"{path}: {name} holds numbers that are NaN or infinite.")


def file_checksum(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits.

    Raises:
      CheckpointError: if the file cannot be read.
    """
    digest, path = hashlib.sha256(), pathlib.Path(path)
    check_file(path)
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise read_error(path, error) from error
    return digest.hexdigest()


def _finite(chunk: np.ndarray) -> bool:
    if chunk.dtype == ml_dtypes.bfloat16:  # on its bits, ten times as fast as its own isfinite
        return int((chunk.view(np.uint16) & 0x7FFF).max()) < 0x7F80
    return chunk.dtype.kind != "f" or bool(np.isfinite(chunk).all())


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array in flat, contiguous pieces."""
    flat = np.ascontiguousarray(array).reshape(-1)
    for at in range(0, flat.size, _CHUNK):
        yield flat[at : at + _CHUNK]
