"""T5X's older checkpoints: a msgpack file `checkpoint` and tensorstore arrays beside it.

Each leaf of the tree is either held in the file or described there and kept in a zarr folder of its
own. All public T5, Flan-T5, mT5 and ByT5 checkpoints of T5X have this layout.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np

from variator_jax.errors import CheckpointError
from variator_jax.store import stores
from variator_jax.store.stores import Spec, StoredArray

FILE = "checkpoint"
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # Flax's msgpack extensions
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = ("float32", "float16", "bfloat16", "float64", "int32", "int64", "uint32")
_DEPTH = 64  # no tree of a T5 is that deep; a damaged one may be


def open_target(spec: Spec, where: str, content: bytes) -> dict[str, StoredArray]:
    """The parameters of a checkpoint, by path, not read yet.

    Args:
      spec: the folder of the checkpoint.
      where: the same, for messages.
      content: the bytes of the file `checkpoint`.

    Raises:
      CheckpointError: if the file or an array's description is damaged.
    """
    file = f"{where}/{FILE}"
    if content.startswith(b"model_checkpoint_path"):
        raise CheckpointError(
            f"{file} belongs to a TensorFlow checkpoint (Mesh TensorFlow's T5); convert that one "
            "with T5X first."
        )
    tree = _unpack(file, content)
    optimizer = tree.get("optimizer", tree)  # very old files lack the version and this level
    target = optimizer.get("target") if isinstance(optimizer, dict) else None
    if not isinstance(target, dict):
        raise CheckpointError(f"{file} holds no parameters: it has no 'target'.")
    found: dict[str, StoredArray] = {}
    _flatten(target, "", found, spec, file, 0)
    return found


def _unpack(file: str, content: bytes) -> dict:
    def extension(code: int, data: bytes) -> Any:
        if code in (_ARRAY, _SCALAR):
            return _array(file, data)
        return None  # a complex number or something newer; no parameter is one

    try:
        tree = msgpack.unpackb(content, ext_hook=extension, raw=False, strict_map_key=False)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException, RecursionError) as error:
        raise CheckpointError(
            f"{file} is cut short or damaged, or no msgpack file: {str(error) or 'it ends early'}."
        ) from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file} holds a {type(tree).__name__} and no tree of parameters.")
    return tree


def _array(file: str, data: bytes) -> np.ndarray:
    """An array inside the file: (shape, dtype's name, bytes), msgpack once more."""
    try:
        shape, name, content = msgpack.unpackb(data, raw=True)
        name = name.decode() if isinstance(name, bytes) else name
        if name not in _DTYPES:
            raise ValueError(f"dtype {name!r}")
        dtype = np.dtype(jnp.bfloat16 if name == "bfloat16" else name)
        if len(content) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(content)} bytes for shape {shape}")
        return np.frombuffer(content, dtype).reshape(shape)
    except (ValueError, TypeError, UnicodeDecodeError, msgpack.UnpackException) as error:
        raise CheckpointError(f"{file} holds a damaged array: {error}.") from error


def _flatten(
    node: Any, path: str, found: dict[str, StoredArray], spec: Spec, file: str, depth: int
) -> None:
    if isinstance(node, np.ndarray):
        found[path] = _held(node)
    elif isinstance(node, dict) and _CHUNKED in node:
        found[path] = _held(_joined(node, path, file))
    elif isinstance(node, dict) and {"driver", "kvstore", "metadata"} <= set(node):
        found[path] = _described(node, path, spec, file)
    elif isinstance(node, dict) and depth < _DEPTH:
        for name, child in node.items():
            inner = f"{path}/{name}" if path else str(name)
            _flatten(child, inner, found, spec, file, depth + 1)
    else:
        raise CheckpointError(f"{file}: {path} is a {type(node).__name__} and no array.")


def _held(array: np.ndarray) -> StoredArray:
    return StoredArray(array.shape, array.dtype, lambda index: np.asarray(array[index]))


def _joined(node: dict, path: str, file: str) -> np.ndarray:
    """An array that exceeded msgpack's limit and was cut into pieces."""
    try:
        shape = [node["shape"][str(i)] for i in range(len(node["shape"]))]
        chunks = [node["chunks"][str(i)] for i in range(len(node["chunks"]))]
        return np.concatenate(chunks).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the pieces of {path} are damaged ({error}).") from error


def _described(node: dict, path: str, spec: Spec, file: str) -> StoredArray:
    """An array in a folder of its own, relative to the checkpoint's, wherever that lies by now."""
    kvstore, metadata = node["kvstore"], node["metadata"]
    if not isinstance(kvstore, dict) or not isinstance(metadata, dict) or node["driver"] != "zarr":
        raise CheckpointError(f"{file}: the description of {path} is damaged.")
    # Before tensorstore 0.1.14 the path stood outside. Drivers (file, gfile, gcs) and buckets are
    # those of the machine that wrote it.
    inner = kvstore.get("path", node.get("path"))
    if not isinstance(inner, str) or not inner.strip("/") or ".." in inner.split("/"):
        raise CheckpointError(f"{file}: {path} has no proper folder: {inner!r}.")
    if inner.startswith("/"):
        raise CheckpointError(f"{file}: {path} lies outside of the checkpoint, at {inner!r}.")
    array = stores.open_array(stores.below(spec, inner), f"{file.removesuffix(FILE)}{inner}")
    if list(array.shape) != metadata.get("shape"):
        raise CheckpointError(
            f"{file} says that {path} has shape {metadata.get('shape')}; its folder says "
            f"{list(array.shape)}."
        )
    if node.get("dtype", array.dtype.name) != array.dtype.name:
        raise CheckpointError(
            f"{file} says that {path} is {node['dtype']}; its folder says {array.dtype.name}."
        )
    return array
