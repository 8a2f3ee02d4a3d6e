"""T5X checkpoints in and out, without T5X.

Two layouts: T5X's older one, a msgpack file `checkpoint` with zarr arrays in folders, which all
public T5, Flan-T5, mT5 and ByT5 checkpoints have; and Orbax's `_METADATA` with zarr arrays, mostly
in OCDBT. Three forms of the tree in them: `t5x/examples/t5` keeps 2-D kernels in `layers_i` and one
position bias a stack, as ours; `t5x/examples/scalable_t5` keeps heads apart (3-D kernels) and a
position bias in every layer; with scanned layers, a stack's layers are one array along axis 1.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import serialization, traverse_util

from variator_jax.backbones.t5 import T5Config
from variator_jax.backbones.t5.config import with_name
from variator_jax.errors import CheckpointError
from variator_jax.files import AnyPath, check_folder, is_url, wrap_errors
from variator_jax.store.arrays import Stored, unflatten
from variator_jax.store.backbone import Source, Stream, make_source, stored_config

PLUGIN = "plugin/"  # where a run of our T5X engine keeps its plugin
_LEGACY, _METADATA, _MANIFEST = "checkpoint", "_METADATA", "manifest.ocdbt"
_STEP = re.compile(r"checkpoint_(\d+)")
_PLACEHOLDER = {"driver", "kvstore", "metadata"}  # placeholder of an array kept elsewhere
_CHUNK = 1 << 28  # bytes; a host that restores a shard reads little more
_BIAS, _HEAD = "relpos_bias/rel_embedding", "decoder/logits_dense/kernel"
_LAYER = re.compile(r"(encoder|decoder)/layers_\d+/")
_SCANNED = re.compile(r"(encoder|decoder)/\1/(.+)")
_AXIS = 1  # of the layers, T5Config.param_scan_axis in T5X
_Store = dict[str, Any]  # a key-value store, as tensorstore describes it


class Checkpoint(NamedTuple):
    """A checkpoint's parameters, not read yet: the backbone's, and a plugin's if it has one."""

    folder: str  # `checkpoint_<step>`, or its URL
    origin: str  # the part of it that holds the arrays, for messages
    backbone: dict[str, Stored]
    plugin: dict[str, Stored]


def open_t5x(path: AnyPath) -> Source:
    """The leaves of a checkpoint of T5X, scanned or not; a plugin in it is ignored.

    Args:
      path: as for `open_checkpoint`.

    Raises:
      CheckpointError: if anything is missing, damaged or not a T5 of this network.
    """
    return backbone_source(open_checkpoint(path))


def backbone_source(checkpoint: Checkpoint, config: T5Config | None = None) -> Source:
    """The leaves of a checkpoint's backbone, with or without a plugin beside it.

    `config` is the shape, where settings of the run are known; by default it is deduced.
    """
    leaves = _to_leaves(checkpoint.origin, checkpoint.backbone)
    config = config or _deduce_config(checkpoint.origin, leaves)
    return make_source(checkpoint.origin, stored_config(config, leaves), leaves)


def open_checkpoint(path: AnyPath) -> Checkpoint:
    """Opens every array of a checkpoint in either layout.

    Args:
      path: a folder `checkpoint_<step>`, or a local folder of such, whose latest is taken; local or
        a URL that tensorstore opens, such as gs://bucket/t5_1_1_base/checkpoint_1000000.

    Raises:
      CheckpointError: if it is not a T5X checkpoint, or its descriptions are damaged.
    """
    folder = str(path).rstrip("/")
    if not is_url(path):
        check_folder(folder)
        steps = [int(match[1]) for x in os.listdir(folder) if (match := _STEP.fullmatch(x))]
        if steps:
            folder = os.path.join(folder, f"checkpoint_{max(steps)}")
    for origin, file, opener in (
        (f"{folder}/state", _METADATA, _open_orbax),
        (folder, _METADATA, _open_orbax),
        (folder, _LEGACY, _open_legacy),
    ):
        content = read_key(origin, file)
        if content is not None:
            target = opener(origin, content)
            break
    else:
        raise CheckpointError(f"{folder} is not a T5X checkpoint: no {_METADATA}, no {_LEGACY}.")
    plugin = {name: array for name, array in target.items() if name.startswith(PLUGIN)}
    backbone = {name: array for name, array in target.items() if name not in plugin}
    return Checkpoint(re.sub("/state$", "", folder), origin, backbone, plugin)


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


def _open_array(store: _Store, path: str, origin: str, driver: str = "zarr") -> Stored:
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

    @wrap_errors(f"{origin} cannot be read")
    def read(index: Any = ...) -> np.ndarray:
        return array[index].read().result()

    return Stored(tuple(array.shape), np.dtype(array.dtype.numpy_dtype), read)


def _open_orbax(origin: str, content: bytes) -> dict[str, Stored]:
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
    names = {"/".join(path[1:]): ".".join(path) for path in paths if path[0] == "target"}
    return {
        path: _open_array(store, name, f"{origin}: {name}", driver) for path, name in names.items()
    }


def _open_legacy(folder: str, content: bytes) -> dict[str, Stored]:
    file = f"{folder}/{_LEGACY}"
    if content.startswith(b"model_checkpoint_path"):
        raise CheckpointError(f"{file} is a TensorFlow checkpoint; convert it with T5X first.")

    def is_leaf(_: Any, node: Any) -> bool:
        return not isinstance(node, dict) or node.keys() >= _PLACEHOLDER

    def opened(path: str, leaf: Any) -> Stored:
        if isinstance(leaf, np.ndarray | np.generic):
            array = np.asarray(leaf)
            return Stored(array.shape, array.dtype, lambda index=...: array[index])
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


def _to_leaves(origin: str, target: Mapping[str, Stored]) -> dict[str, Stored]:
    """Our leaves, by path, of a tree in any of the forms.

    Raises:
      CheckpointError: if position biases differ between layers, or the arrays have odd shapes.
    """
    leaves: dict[str, Stored] = {}
    for name, array in target.items():
        leaves.update(_unscanned(origin, name, array))
    for stack in ("encoder", "decoder"):
        own = re.compile(f"{stack}/layers_\\d+/{_BIAS}")
        tables = {path: leaves.pop(path) for path in list(leaves) if own.fullmatch(path)}
        if tables:
            leaves[f"{stack}/{_BIAS}"] = _shared_bias(origin, tables)
    return leaves


def _unscanned(origin: str, name: str, array: Stored) -> Iterator[tuple[str, Stored]]:
    """The leaves in an array, by path: one for each layer where layers are scanned."""
    match = _SCANNED.fullmatch(name)
    if match is None:
        yield name, _leaf(name, array.shape, array, ())
        return
    if len(array.shape) <= _AXIS:
        raise CheckpointError(f"{origin}: {name} has shape {array.shape} and no axis of layers.")
    shape = array.shape[:_AXIS] + array.shape[_AXIS + 1 :]
    for i in range(array.shape[_AXIS]):
        path = f"{match[1]}/layers_{i}/{match[2]}"
        yield path, _leaf(path, shape, array, (slice(None), i))


def _leaf(path: str, shape: tuple[int, ...], array: Stored, index: Any) -> Stored:
    if len(shape) == 3 and path.endswith(("query/kernel", "key/kernel", "value/kernel")):
        shape = (shape[0], shape[1] * shape[2])  # [embed, heads, kv]
    elif len(shape) == 3 and path.endswith("out/kernel"):
        shape = (shape[0] * shape[1], shape[2])  # [heads, kv, embed]

    def read() -> np.ndarray:
        return np.asarray(array.read(index), order="C").reshape(shape)

    return Stored(shape, array.dtype, read)


def _shared_bias(origin: str, leaves: Mapping[str, Stored]) -> Stored:
    first, *others = leaves
    table = leaves[first].read()
    for other in others:
        if not np.array_equal(leaves[other].read(), table):
            problem = f"{other} differs from {first}; a T5 has one for all layers"
            raise CheckpointError(f"{origin}: the position bias {problem}.")
    return Stored(table.shape, table.dtype, lambda: table)


def _deduce_config(origin: str, leaves: Mapping[str, Stored]) -> T5Config:
    """The shape of a backbone by its leaves, whose files hold no settings.

    One feed-forward input is T5 1.0's relu, two are T5 1.1's gated gelu.

    Raises:
      CheckpointError: if a leaf that the shape depends on is missing or odd.
    """
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    gated = "encoder/layers_0/mlp/wi_0/kernel" in shapes
    with wrap_errors(f"{origin} is not a T5"):
        vocab, embed = shapes["token_embedder/embedding"]
        heads, _ = shapes[f"encoder/{_BIAS}"]
        _, joined = shapes["encoder/layers_0/attention/query/kernel"]  # [embed, heads * kv]
        _, mlp = shapes[f"encoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel"]
        if joined % heads:
            raise ValueError(f"{joined} query columns do not divide by {heads} heads")
        layers = {match[0] for path in shapes if (match := _LAYER.match(path))}
        encoder = sum(layer.startswith("encoder") for layer in layers)
        decoder = len(layers) - encoder
        config = T5Config(
            name="t5",
            vocab_size=vocab,
            embed_dim=embed,
            num_heads=heads,
            head_dim=joined // heads,
            mlp_dim=mlp,
            num_encoder_layers=encoder,
            num_decoder_layers=decoder,
            mlp_activations=("gelu", "linear") if gated else ("relu",),
            logits_via_embedding=_HEAD not in shapes if decoder else not gated,
        )
    return with_name(config, origin)


def _check_deducible(source: Source) -> None:
    """Refuses a backbone whose settings `_deduce_config` would not deduce from its leaves."""
    config = source.config
    deduced = _deduce_config(f"backbone {config.name}", source.leaves)
    settings = ["mlp_activations", "layer_norm_epsilon", "mlp_dim"]
    for name in settings + ["logits_via_embedding"] * config.has_decoder:
        ours, theirs = getattr(config, name), getattr(deduced, name)
        if ours != theirs:
            hint = f"a T5X checkpoint keeps no settings, and would be read as {theirs}"
            raise CheckpointError(f"Backbone {config.name!r} has {name} {ours}; {hint}.")


def write(path: AnyPath, stream: Stream) -> pathlib.Path:
    """Writes a checkpoint that T5X restores, with Orbax, from memory as a whole.

    Args:
      path: a folder `checkpoint_<step>`, or the folder in which to make `checkpoint_0`.
      stream: a backbone with a decoder, or an encoder alone.

    Returns:
      The checkpoint's folder.

    Raises:
      CheckpointError: if it exists already; or if the backbone has settings that are not deduced
        from its arrays, which are all that such a checkpoint holds.
    """
    folder = target_folder(path)
    _check_deducible(stream.source)
    step = np.asarray(int(folder.name.removeprefix("checkpoint_")), np.int32)
    state = {"target": unflatten(dict(stream)), "state": {"step": step}}
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), state)
    save = ocp.args.Composite(state=ocp.args.PyTreeSave(state, save_args=chunks))
    with (
        wrap_errors(f"{folder} cannot be written"),
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        checkpointer.save(folder.absolute(), save)
    return folder


def target_folder(path: AnyPath) -> pathlib.Path:
    """The folder `checkpoint_<step>` that writing to `path` makes; T5X asks for such a name."""
    folder = pathlib.Path(path)
    return folder if _STEP.fullmatch(folder.name) else folder / "checkpoint_0"
