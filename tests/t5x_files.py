"""Writes T5X's checkpoints by other means than the library: msgpack and tensorstore, and Orbax."""

import msgpack
import numpy as np
import orbax.checkpoint as ocp
import small_t5
import tensorstore
from flax import traverse_util

from variator_jax.store import t5x
from variator_jax.store.backbone import Stream, memory_source


def save_t5x(path, backbone):
    return t5x.write(path, Stream(memory_source(path, backbone)))


def t5x_tree(config, params, form="t5"):
    """Our parameters as T5X's `t5`, or `scalable_t5` 'scanned' or 'unscanned', has them; flat."""
    tree = {}
    for path, array in small_t5.flat(params).items():
        stack, *middle, last = path.split("/")
        if path == "decoder/logits_dense/kernel" or form == "t5":
            tree[path] = array
        elif "relpos_bias" in path:
            for i in range(_depth(config, stack)):
                tree[f"{stack}/layers_{i}/relpos_bias/rel_embedding"] = array
        elif middle and middle[-1] in ("query", "key", "value"):
            tree[path] = array.reshape(-1, config.num_heads, config.head_dim)
        elif middle and middle[-1] == "out":
            tree[path] = array.reshape(config.num_heads, config.head_dim, -1)
        else:
            tree[path] = array
    return _stacked(config, tree) if form == "scanned" else tree


def _depth(config, stack):
    return config.num_encoder_layers if stack == "encoder" else config.num_decoder_layers


def _stacked(config, tree):
    found = {path: array for path, array in tree.items() if "/layers_" not in path}
    for path in tree:
        if "/layers_0/" in path:
            stack = path.split("/")[0]
            parts = [path.replace("layers_0", f"layers_{i}") for i in range(_depth(config, stack))]
            name = path.replace("layers_0", stack)
            found[name] = np.stack([tree[part] for part in parts], axis=1)
    return found


def packed(array):
    """An array inside a msgpack file, as Flax writes it."""
    content = (array.shape, array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))


def held(folder, path, array):
    """Every array inside the msgpack file; a scalar as Flax writes numpy's."""
    if array.ndim:
        return packed(array)
    content = msgpack.packb(((), array.dtype.name, array.tobytes()), use_bin_type=True)
    return msgpack.ExtType(3, content)


def chunked(array, size=7):
    """An array that msgpack could not hold in one piece, as Flax writes it."""
    pieces = [array.reshape(-1)[i : i + size] for i in range(0, array.size, size)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(array.shape)},
        "chunks": {str(i): packed(piece) for i, piece in enumerate(pieces)},
    }


def beside(folder, path, array, driver="file", outside=False):
    """An array in a folder of its own; returns what the msgpack file says of it."""
    name = "target." + path.replace("/", ".")
    metadata = {"shape": list(array.shape), "compressor": {"id": "gzip", "level": 1}}
    metadata["chunks"] = [max(1, -(-n // 2)) for n in array.shape]
    spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": metadata}
    spec["kvstore"] = {"driver": "file", "path": f"{folder}/{name}/"}
    fast = tensorstore.Context({"file_io_sync": False})
    tensorstore.open(spec, create=True, context=fast).result().write(array).result()
    kvstore = {"driver": driver, "path": f"{name}/"}
    if driver == "gcs":
        kvstore["bucket"] = "t5x-dummy-bucket"
    if outside:
        return {**spec, "kvstore": {"driver": driver}, "path": kvstore["path"]}
    return {**spec, "kvstore": kvstore}


def write_legacy(folder, tree, store=beside, version=3):
    """A legacy checkpoint of a flat tree; `store(folder, path, array)` gives what stands for it."""
    folder.mkdir(parents=True)
    target = {tuple(path.split("/")): store(folder, path, array) for path, array in tree.items()}
    step = msgpack.ExtType(3, msgpack.packb(((), "int32", np.int32(5).tobytes())))
    state = {"step": step, "param_states": {"decoder": None}}
    content = {"target": traverse_util.unflatten_dict(target), "state": state}
    if version:
        content = {"version": version, "optimizer": content}
    (folder / "checkpoint").write_bytes(msgpack.packb(content, strict_types=True))
    return folder


def write_orbax(folder, tree, ocdbt=True):
    """A checkpoint of today by Orbax itself."""
    state = {"step": np.int32(5), "param_states": {}}
    content = {"target": traverse_util.unflatten_dict(tree, sep="/"), "state": state}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
        checkpointer.save(folder / "state", content)
    return folder
