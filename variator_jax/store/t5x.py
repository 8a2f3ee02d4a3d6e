"""T5X checkpoints in and out, without T5X.

Two layouts: T5X's older one, a msgpack file `checkpoint` with zarr arrays in folders, which all
public T5, Flan-T5, mT5 and ByT5 checkpoints have; and Orbax's `_METADATA` with zarr arrays, mostly
in OCDBT. What the trees in them look like is in `t5x_tree.py`.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import serialization, traverse_util

from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import CheckpointError
from variator_jax.files import wrap_errors
from variator_jax.store import t5x_tree
from variator_jax.store.arrays import unflatten
from variator_jax.store.formats import is_url
from variator_jax.store.source import (
    Backbone,
    Source,
    Stream,
    make_source,
    memory_source,
    stored_config,
)
from variator_jax.store.t5x_tree import Sliced

PLUGIN = "plugin/"  # where a run of our T5X engine keeps its plugin
_LEGACY, _METADATA, _MANIFEST = "checkpoint", "_METADATA", "manifest.ocdbt"
_STEP = re.compile(r"checkpoint_(\d+)")
_PLACEHOLDER = {"driver", "kvstore", "metadata"}  # placeholder of an array kept elsewhere
_CHUNK = 1 << 28  # bytes; a host that restores a shard reads little more
_Store = dict[str, Any]  # a key-value store, as tensorstore describes it


class Checkpoint(NamedTuple):
    """A checkpoint's parameters, not read yet: the backbone's, and a plugin's if it has one."""

    folder: str  # `checkpoint_<step>`, or its URL
    origin: str  # the part of it that holds the arrays, for messages
    backbone: dict[str, Sliced]
    plugin: dict[str, Sliced]


def open_t5x(path: str | os.PathLike, config: T5Config | None = None) -> Source:
    """The leaves of a checkpoint of T5X, scanned or not; a plugin in it is ignored.

    Args:
      path: as for `open_checkpoint`.
      config: the shape, for unusual settings such as other activations; by default deduced.

    Raises:
      CheckpointError: if anything is missing, damaged or not a T5 of this network.
    """
    return backbone_source(open_checkpoint(path), config)


def backbone_source(checkpoint: Checkpoint, config: T5Config | None = None) -> Source:
    """The leaves of a checkpoint's backbone, with or without a plugin."""
    leaves = t5x_tree.to_leaves(checkpoint.origin, checkpoint.backbone)
    config = config or t5x_tree.deduce_config(checkpoint.origin, leaves)
    return make_source(checkpoint.origin, stored_config(config, leaves), leaves)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens every array of a checkpoint in either layout.

    Args:
      path: a folder `checkpoint_<step>`, or a local folder of such, whose latest is taken; local or
        a URL that tensorstore opens, such as gs://bucket/t5_1_1_base/checkpoint_1000000.

    Raises:
      CheckpointError: if it is not a T5X checkpoint, or its descriptions are damaged.
    """
    folder = str(path).rstrip("/")
    if not is_url(path):
        if not os.path.isdir(folder):
            raise CheckpointError(f"There is no folder {folder!r}.")
        folder = _latest(folder)
    for inner in ("state", "."):
        origin = f"{folder}/{inner}".removesuffix("/.")
        content = read_key(origin, _METADATA)
        if content is not None:
            target = _open_orbax(origin, content)
            break
    else:
        content = read_key(folder, _LEGACY)
        if content is None:
            raise CheckpointError(
                f"{folder} is not a T5X checkpoint: no {_METADATA}, no {_LEGACY}."
            )
        target = _open_legacy(folder, content)
    if os.path.basename(folder) == "state":
        folder = os.path.dirname(folder)
    plugin = {name: array for name, array in target.items() if name.startswith(PLUGIN)}
    backbone = {name: array for name, array in target.items() if name not in plugin}
    return Checkpoint(folder, origin, backbone, plugin)


def _latest(folder: str) -> str:
    """The latest of a folder's checkpoints, or the folder itself if it holds none."""
    steps = [int(match[1]) for name in os.listdir(folder) if (match := _STEP.fullmatch(name))]
    return os.path.join(folder, f"checkpoint_{max(steps)}") if steps else folder


def _store(path: str) -> _Store:
    """The key-value store of a local folder or of a URL."""
    if not is_url(path):
        return {"driver": "file", "path": f"{os.path.abspath(path)}/"}
    with wrap_errors(f"{path} cannot be opened"):
        return tensorstore.KvStore.Spec(f"{path.rstrip('/')}/").to_json()


def read_key(folder: str, name: str) -> bytes | None:
    """The bytes of a file in a folder, local or behind a URL; None if there is no such file.

    Raises:
      CheckpointError: if the folder cannot be read at all.
    """
    with wrap_errors(f"{folder.rstrip('/')}/{name} cannot be read"):
        result = tensorstore.KvStore.open(_store(folder)).result().read(name).result()
        return None if result.state == "missing" else bytes(result.value)


def _open_array(store: _Store, path: str, origin: str, driver: str = "zarr") -> Sliced:
    """Opens a zarr array; a missing chunk is an error and not a run of zeros."""
    spec = {
        "driver": driver,
        "kvstore": {**store, "path": f"{store.get('path', '')}{path.strip('/')}/"},
        "fill_missing_data_reads": False,
    }
    with wrap_errors(f"{origin} cannot be read"):
        array = tensorstore.open(spec, read=True, open=True).result()
        metadata = array.spec().to_json()["metadata"]
        if metadata.get("order", "C") != "C" or str(metadata.get("dtype", "")).startswith(">"):
            raise ValueError(f"its layout is unusual: {metadata}")

    def read(index: Any) -> np.ndarray:
        with wrap_errors(f"{origin} cannot be read"):
            return array[index].read().result()

    return Sliced(tuple(array.shape), np.dtype(array.dtype.numpy_dtype), read)


def _open_orbax(origin: str, content: bytes) -> dict[str, Sliced]:
    with wrap_errors(f"{origin}/{_METADATA} does not describe an Orbax checkpoint"):
        metadata = json.loads(content)
        paths = [
            [part["key"] for part in entry["key_metadata"]]
            for entry in metadata["tree_metadata"].values()
            if entry["value_metadata"]["value_type"] not in ("None", "Dict", "List")
        ]
        tops = sorted({path[0] for path in paths})
        if "target" not in tops:
            raise ValueError(f"it has no 'target', T5X's parameters; it has {tops}")
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        store = _store(origin)
        if metadata.get("use_ocdbt", True):
            if read_key(origin, _MANIFEST) is None:
                raise CheckpointError(f"{origin}/{_MANIFEST} is missing.")
            store = {"driver": "ocdbt", "base": store, "path": ""}
    return {
        "/".join(path[1:]): _open_array(
            store, ".".join(path), f"{origin}: {'.'.join(path)}", driver
        )
        for path in paths
        if path[0] == "target"
    }


def _open_legacy(folder: str, content: bytes) -> dict[str, Sliced]:
    file = f"{folder}/{_LEGACY}"
    if content.startswith(b"model_checkpoint_path"):
        raise CheckpointError(f"{file} is a TensorFlow checkpoint; convert it with T5X first.")

    def is_leaf(_: Any, node: Any) -> bool:
        return not isinstance(node, dict) or node.keys() >= _PLACEHOLDER

    def opened(path: str, leaf: Any) -> Sliced:
        if isinstance(leaf, np.ndarray | np.generic):
            array = np.asarray(leaf)
            return Sliced(array.shape, array.dtype, array.__getitem__)
        # Before tensorstore 0.1.14 the path was outside. Drivers (file, gfile, gcs) and buckets
        # are those of the machine that wrote it.
        inner = leaf["kvstore"].get("path") or leaf["path"]
        if leaf["driver"] != "zarr" or inner.startswith("/") or ".." in inner.split("/"):
            raise ValueError(f"{path} is outside of the checkpoint, at {inner!r}")
        stored = _open_array(_store(folder), inner, f"{folder}/{inner}")
        described = (tuple(leaf["metadata"]["shape"]), leaf.get("dtype", stored.dtype.name))
        if described != (stored.shape, stored.dtype.name):
            raise ValueError(f"{path} is described as {described}; its array is {stored[:2]}")
        return stored

    with wrap_errors(f"{file} is damaged or not a T5X checkpoint"):
        tree = serialization.msgpack_restore(content)
        target = tree.get("optimizer", tree)["target"]  # very old files lack the upper level
        leaves = traverse_util.flatten_dict(target, is_leaf=is_leaf, sep="/")
        return {path: opened(path, leaf) for path, leaf in leaves.items()}


def save_t5x(path: str | os.PathLike, backbone: Backbone) -> pathlib.Path:
    """Writes a checkpoint that T5X restores, atomically.

    Args:
      path: a folder `checkpoint_<step>`, or the folder in which to make `checkpoint_0`.
      backbone: with a decoder, or an encoder alone.

    Returns:
      The checkpoint's folder.

    Raises:
      CheckpointError: if it exists already; or if the backbone has settings that are not deduced
        from its arrays, which are all that such a checkpoint holds.
    """
    folder = target_folder(path)
    write(folder, Stream(memory_source(folder, backbone)))
    return folder


def write(folder: pathlib.Path, stream: Stream) -> None:
    """Writes `checkpoint_<step>` with Orbax, from memory as a whole; see `save_t5x`."""
    t5x_tree.check_deducible(stream.source)
    match = _STEP.fullmatch(folder.name)
    step = np.asarray(int(match[1]) if match else 0, np.int32)
    state = {"target": unflatten(dict(stream)), "state": {"step": step}}
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), state)
    save = ocp.args.Composite(state=ocp.args.PyTreeSave(state, save_args=chunks))
    with (
        wrap_errors(f"{folder} cannot be written"),
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        checkpointer.save(folder.absolute(), save)


def target_folder(path: str | os.PathLike) -> pathlib.Path:
    """The folder `checkpoint_<step>` that writing to `path` makes; T5X asks for such a name."""
    folder = pathlib.Path(path)
    return folder if _STEP.fullmatch(folder.name) else folder / "checkpoint_0"
