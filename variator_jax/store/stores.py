"""Keys and zarr arrays wherever tensorstore finds them: a local folder, gs://, s3://, https://."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorstore

from variator_jax.errors import CheckpointError

Spec = dict[str, Any]

# What tensorstore's calls raise, whatever went wrong.
_ERRORS: tuple[type[Exception], ...] = (
    *(ValueError, TypeError, RuntimeError, OSError, LookupError),
    *(NotImplementedError, OverflowError, MemoryError),
)


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array that is read by parts: `read(index)` with numpy's basic indices."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Any], np.ndarray]


def is_url(path: str | os.PathLike) -> bool:
    """Whether a path has a scheme, such as gs:// or file://."""
    return isinstance(path, str) and re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def folder(path: str | os.PathLike) -> Spec:
    """The key-value store of a local folder or of a URL.

    Raises:
      CheckpointError: for a URL that tensorstore does not know.
    """
    if not is_url(path):
        return {"driver": "file", "path": f"{pathlib.Path(path).absolute()}/"}
    with telling(f"{path} cannot be opened"):
        found = tensorstore.KvStore.Spec(f"{str(path).rstrip('/')}/").to_json()
    return found


def below(spec: Spec, path: str) -> Spec:
    """The store of a folder inside another one."""
    return {**spec, "path": f"{spec.get('path', '')}{path.strip('/')}/"}


def read_key(spec: Spec, key: str) -> bytes | None:
    """The bytes of a file in a folder, None if there is no such file.

    Raises:
      CheckpointError: if the folder cannot be read at all.
    """
    with telling(f"{spec.get('path')}{key} cannot be read"):
        found = tensorstore.KvStore.open(spec).result().read(key).result()
        return None if found.state == "missing" else bytes(found.value)


def open_array(spec: Spec, where: str, driver: str = "zarr") -> StoredArray:
    """Opens a zarr array for reading; a missing chunk is an error and not a run of zeros.

    Args:
      spec: the array's folder.
      where: the array, for messages.
      driver: 'zarr' or 'zarr3'.

    Raises:
      CheckpointError: if it is missing, damaged or of an unusual layout.
    """
    wanted = {"driver": driver, "kvstore": spec, "fill_missing_data_reads": False}
    with telling(f"{where} cannot be read"):
        store = tensorstore.open(wanted, read=True, open=True).result()
        metadata = store.spec().to_json()["metadata"]
    # Bytes the other way round, or columns first, are what a flipped letter makes.
    if metadata.get("order", "C") != "C" or str(metadata.get("dtype", "")).startswith(">"):
        raise CheckpointError(f"{where} has an unusual layout: {metadata}.")

    def read(index: Any) -> np.ndarray:
        with telling(f"{where} cannot be read"):
            return store[index].read().result()

    return StoredArray(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), read)


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Turns tensorstore's errors into one of ours that starts with `what`."""
    try:
        yield
    except _ERRORS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = first.partition(" [source locations")[0]
        raise CheckpointError(f"{what}: {reason}") from error
