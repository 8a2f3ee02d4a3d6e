"""T5X checkpoints that are not what they should be: each has an error of its own."""

import json

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import small_t5
import t5x_files

from variator_jax.errors import CheckpointError
from variator_jax.store.t5x import load_t5x


@pytest.fixture
def tree():
    backbone = small_t5.backbone(small_t5.GATED)
    return t5x_files.t5x_tree(small_t5.GATED, backbone.params)


def refused(folder, words):
    with pytest.raises(CheckpointError, match=words) as error:
        load_t5x(folder)
    assert str(folder) in str(error.value)


QUERY = "encoder/layers_1/attention/query/kernel"


def test_leaves(tree, tmp_path):
    def change(name, **arrays):
        changed = {**tree, **{k.replace("__", "/"): v for k, v in arrays.items()}}
        changed = {path: array for path, array in changed.items() if array is not None}
        write = t5x_files.write_legacy
        return write(tmp_path / name, changed, lambda _, __, array: t5x_files.packed(array))

    refused(change("a", **{QUERY: None}), f"lacks {QUERY}")
    refused(change("b", **{QUERY: np.ones((3, 3), np.float32)}), r"shape \(3, 3\)")
    refused(change("c", **{QUERY: np.ones((16, 12), np.int32)}), "dtype int32")
    refused(change("d", **{QUERY: np.full((16, 12), np.nan, np.float32)}), f"{QUERY}.*NaN")
    nan = np.full((16, 12), np.nan, jnp.bfloat16)
    refused(change("e", **{QUERY: nan}), f"{QUERY}.*NaN")
    refused(change("f", encoder__layers_1__plugin__kernel=np.ones(3)), "plugin/kernel, of no use")
    refused(change("g", token_embedder__embedding=None), "no T5.*token_embedder/embedding")
    refused(change("h", encoder__relpos_bias__rel_embedding=np.ones((5, 32))), "5 heads")
    renamed = {path.replace("layers_1/", "layers_7/"): None for path in tree}
    gap = {k: tree[k.replace("layers_7/", "layers_1/")] for k in renamed if "layers_7/" in k}
    gone = {k: None for k in tree if "layers_1/" in k}
    refused(change("i", **gone, **gap), "lacks encoder/layers_1")


def test_msgpack_files(tree, tmp_path):
    folder = t5x_files.write_legacy(tmp_path / "checkpoint_5", tree)
    file = folder / "checkpoint"
    data = file.read_bytes()
    for cut in (0, 1, 100, len(data) - 1):
        file.write_bytes(data[:cut])
        refused(folder, "checkpoint")
    content = msgpack.unpackb(data, strict_map_key=False)
    leaf = content["optimizer"]["target"]["encoder"]["encoder_norm"]["scale"]

    def changed(words, **entries):
        saved = dict(leaf)
        leaf.update(entries)
        file.write_bytes(msgpack.packb(content))
        refused(folder, words)
        leaf.clear()
        leaf.update(saved)

    outside = {**leaf["kvstore"], "path": "../../etc/"}
    changed("no proper folder", kvstore=outside)
    changed("outside of the checkpoint", kvstore={**leaf["kvstore"], "path": "/etc/"})
    changed("description of encoder/encoder_norm/scale is damaged", kvstore=[1])
    changed("says that encoder/encoder_norm/scale has shape", metadata={"shape": [17]})
    changed("is bfloat16; its folder says float32", dtype="bfloat16")
    changed("description", driver="json")
    target = content["optimizer"]["target"]["encoder"]["encoder_norm"]
    for value, words in (
        (3, "is a int and no array"),
        (msgpack.ExtType(1, b"\x93"), "damaged array"),
        (msgpack.ExtType(1, msgpack.packb(((16,), "object", b""))), "dtype 'object'"),
        (msgpack.ExtType(1, msgpack.packb(((16,), "float32", b"abc"))), "3 bytes for shape"),
        ({"__msgpack_chunked_array__": True, "shape": {"0": 16}}, "pieces of encoder/encoder_norm"),
    ):
        target["scale"] = value
        file.write_bytes(msgpack.packb(content, strict_types=False))
        refused(folder, words)
    file.write_text('model_checkpoint_path: "model.ckpt-1"')
    refused(folder, "Mesh TensorFlow")
    file.write_bytes(msgpack.packb({"version": 3}))
    refused(folder, "no 'target'")


def test_missing_files(tree, tmp_path):
    folder = t5x_files.write_legacy(tmp_path / "checkpoint_5", tree)
    inner = folder / "target.encoder.layers_0.mlp.wo.kernel"
    chunk = next(x for x in inner.iterdir() if x.name != ".zarray")
    data = chunk.read_bytes()
    chunk.unlink()  # zarr itself would read zeros
    refused(folder, "layers_0.mlp.wo.kernel.*missing")
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    chunk.write_bytes(changed)
    refused(folder, "layers_0.mlp.wo.kernel")
    chunk.write_bytes(data)
    described = (inner / ".zarray").read_text()
    for old, new in (('"<f4"', '">f4"'), ('"C"', '"F"'), ("24", "20"), ("{", "[")):
        (inner / ".zarray").write_text(described.replace(old, new, 1))
        refused(folder, "layers_0.mlp.wo.kernel")
    (inner / ".zarray").unlink()
    refused(folder, "layers_0.mlp.wo.kernel")
    with pytest.raises(CheckpointError, match="no folder"):
        load_t5x(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no T5X checkpoint"):
        load_t5x(f"file://{tmp_path}")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        load_t5x("nonsense://bucket/checkpoint_5")


def test_orbax_files(tree, tmp_path):
    folder = t5x_files.write_orbax(tmp_path / "checkpoint_5", tree)
    state = folder / "state"
    text = (state / "_METADATA").read_text()
    for changed, words in (
        (text[:-9], "_METADATA is no description"),
        ("[]", "_METADATA is no description"),
        (json.dumps({"tree_metadata": {"x": {}}}), "_METADATA is no description"),
        (text.replace('"target"', '"params"'), "no 'target'.*'params'"),
        (text.replace('"key": "wo"', '"key": "wu"', 1), "wu.kernel"),
    ):
        (state / "_METADATA").write_text(changed)
        refused(folder, words)
    (state / "_METADATA").write_text(text)
    manifest = state / "manifest.ocdbt"
    data = bytearray(manifest.read_bytes())
    data[len(data) // 2] ^= 1
    manifest.write_bytes(data)
    refused(folder, "cannot be read")
    manifest.unlink()
    refused(folder, "manifest.ocdbt is missing")


def test_random_damage_never_ends_in_a_librarys_traceback(tree, tmp_path):
    """Bytes of every file but the numbers; what loads all the same is what was saved."""
    rng = np.random.default_rng(0)
    folders = [
        t5x_files.write_legacy(tmp_path / "old" / "checkpoint_5", tree),
        t5x_files.write_orbax(tmp_path / "new" / "checkpoint_5", tree),
    ]
    expected, told = small_t5.backbone(small_t5.GATED).params, 0
    for folder in folders:
        files = [x for x in folder.rglob("*") if x.name in ("checkpoint", ".zarray", "_METADATA")]
        files += folder.rglob("manifest.ocdbt")
        for _ in range(25):
            file = files[rng.integers(len(files))]
            data = file.read_bytes()
            changed = bytearray(data)
            changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
            file.write_bytes(changed)
            try:
                small_t5.assert_same(load_t5x(folder).params, expected)
            except CheckpointError:
                told += 1
            file.write_bytes(data)
    assert told > 10
