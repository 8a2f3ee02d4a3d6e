"""T5X's checkpoints in both layouts and all forms of the tree, written by other means than ours."""

import dataclasses
import functools
from pathlib import Path

import jax.numpy as jnp
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small_t5
import t5x_files
from small_t5 import refused
from t5x_files import save_t5x

from variator_jax.errors import CheckpointError
from variator_jax.store import formats, load_backbone
from variator_jax.store.arrays import unflatten

WRITERS = {
    "legacy": t5x_files.write_legacy,
    "orbax": t5x_files.write_orbax,
    "orbax without ocdbt": functools.partial(t5x_files.write_orbax, ocdbt=False),
}
STORES = {
    "held": t5x_files.held,
    "in pieces": lambda folder, path, array: t5x_files.chunked(array),
    "gfile": functools.partial(t5x_files.beside, driver="gfile"),
    "gcs": functools.partial(t5x_files.beside, driver="gcs"),
    "path outside": functools.partial(t5x_files.beside, outside=True),
    "mixed": lambda *leaf: (t5x_files.held if leaf[2].ndim == 1 else t5x_files.beside)(*leaf),
}
FORMS = ("t5", "unscanned", "scanned")
SAMPLES = Path(__file__).parents[3] / "shared" / "t5x_checkpoints"
QUERY = "encoder/layers_1/attention/query/kernel"
NORM = "encoder/encoder_norm/scale"
ZARR = "target.encoder.layers_0.mlp.wo.kernel"
METADATA, MANIFEST = "state/_METADATA", "state/manifest.ocdbt"


def tree_of(config, form="t5", dtype="float32"):
    backbone = small_t5.backbone(config, dtype)
    return backbone, t5x_files.t5x_tree(config, backbone.params, form)


@pytest.fixture
def tree():
    return tree_of(small_t5.GATED)[1]


def msgpack_array(dtype, data):
    return msgpack.ExtType(1, msgpack.packb(((16,), dtype, data)))


class TestRead:
    @pytest.mark.parametrize(("layout", "form", "family"), [
        *(("legacy", form, x) for form in FORMS for x in small_t5.CONFIGS),
        *((layout, "t5", "1.1") for layout in WRITERS if layout != "legacy"),
    ])  # fmt: skip
    def test_every_form_and_every_layout(self, family, form, layout, tmp_path):
        expected, tree = tree_of(small_t5.CONFIGS[family], form)
        loaded = load_backbone(WRITERS[layout](tmp_path / "checkpoint_5", tree))
        small_t5.assert_same(loaded.params, expected.params)
        assert loaded.fingerprint == expected.fingerprint
        assert loaded.config == dataclasses.replace(expected.config, name=loaded.config.name)

    @pytest.mark.parametrize(("store", "version"), [*((store, 3) for store in STORES), ("held", 0)])
    def test_every_way_in_which_old_files_keep_a_leaf(self, store, version, tmp_path):
        expected, tree = tree_of(small_t5.PLAIN)
        folder = tmp_path / "checkpoint_5"
        t5x_files.write_legacy(folder, tree, STORES[store], version)
        small_t5.assert_same(load_backbone(folder).params, expected.params)

    def test_where_a_checkpoint_may_be(self, tree, tmp_path):
        expected = small_t5.backbone(small_t5.GATED)
        old = t5x_files.write_legacy(tmp_path / "run" / "checkpoint_9", tree)
        new = t5x_files.write_orbax(tmp_path / "run" / "checkpoint_10", tree)
        for path in (f"file://{old}", f"file://{new}/", new / "state", tmp_path / "run"):
            assert load_backbone(path).fingerprint == expected.fingerprint
        assert formats.backbone_folder(f"file://{old}") == f"file://{old}"
        (new / "state" / "manifest.ocdbt").unlink()  # the run's latest is 10, not 9
        refused(tmp_path / "run", "checkpoint_10")

    def test_biases_that_differ_between_layers_are_refused_by_layer(self, tmp_path):
        _, tree = tree_of(small_t5.GATED, "scanned")
        tree["decoder/decoder/relpos_bias/rel_embedding"][:, 1] += 1
        t5x_files.write_legacy(tmp_path / "checkpoint_5", tree)
        refused(tmp_path / "checkpoint_5", "bias decoder/layers_1.* differs from decoder/layers_0")


class TestWrite:
    @pytest.mark.parametrize("family", small_t5.CONFIGS)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_orbax_restores_the_very_tree_of_t5x(self, family, dtype, tmp_path):
        backbone, tree = tree_of(small_t5.CONFIGS[family], dtype=dtype)
        folder = save_t5x(tmp_path / "checkpoint_7", backbone)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(folder / "state")
        small_t5.assert_same(restored["target"], unflatten(tree))
        assert restored["state"]["step"] == 7 and restored["state"]["step"].dtype == np.int32
        for file in ("_CHECKPOINT_METADATA", "commit_success.txt", "state/commit_success.txt"):
            assert (folder / file).is_file()  # by which T5X's Orbax knows a finished checkpoint
        small_t5.assert_same(load_backbone(folder).params, backbone.params)

    @pytest.mark.parametrize(("family", "setting", "value"), [
        ("1.1", "mlp_activations", ("silu", "linear")), ("encoder", "layer_norm_epsilon", 1e-5),
    ])  # fmt: skip
    def test_what_the_tree_cannot_hold_is_refused(self, family, setting, value, tmp_path):
        config = dataclasses.replace(small_t5.CONFIGS[family], **{setting: value})
        with pytest.raises(CheckpointError, match=setting):
            save_t5x(tmp_path / "checkpoint_1", small_t5.backbone(config))
        assert list(tmp_path.iterdir()) == []

    def test_an_encoder_alone_has_no_logits_to_lose(self, tmp_path):
        config = dataclasses.replace(small_t5.ENCODER, logits_via_embedding=True)
        backbone = small_t5.backbone(config)
        assert save_t5x(tmp_path, backbone) == tmp_path / "checkpoint_0"
        with pytest.raises(CheckpointError, match="checkpoint_0 cannot be written.*exists"):
            save_t5x(tmp_path, backbone)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="checkpoints that T5X wrote are not at hand")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_leaf_of_a_checkpoint_of_t5x_equals_its_reference(dtype):
    params = load_backbone(SAMPLES / "legacy" / dtype / "checkpoint_1000000").params
    with np.load(SAMPLES / "legacy" / "reference_f32.npz") as file:
        expected = {x.removeprefix("target/"): file[x] for x in file if "target/" in x}
    # float32 exactly, bfloat16 to its rounding.
    rounded = {path: array.astype(dtype) for path, array in expected.items()}
    small_t5.assert_same(params, unflatten(rounded))


class TestDamage:
    @pytest.mark.parametrize(("changes", "words"), [
        ({QUERY: np.full((16, 12), np.nan, jnp.bfloat16)}, f"{QUERY}.*NaN"),
        ({"encoder/layers_1/more": np.ones(3)}, "unexpected encoder/layers_1/more"),
        ({"token_embedder/embedding": None}, "not a T5.*token_embedder/embedding"),
        ({"encoder/relpos_bias/rel_embedding": np.ones((5, 32))}, "5 heads"),
    ])  # fmt: skip
    def test_leaves(self, tree, tmp_path, changes, words):
        changed = {path: array for path, array in {**tree, **changes}.items() if array is not None}
        folder = tmp_path / "checkpoint_5"
        t5x_files.write_legacy(folder, changed, lambda _, __, array: t5x_files.packed(array))
        refused(folder, words)

    @pytest.mark.parametrize(("change", "words"), [
        ({"kvstore": {"driver": "file", "path": "../etc/"}}, "outside"),
        ({"kvstore": {"driver": "file", "path": "/etc/"}}, "outside"),
        ({"driver": "json"}, "outside"),
        ({"metadata": {"shape": [17]}}, f"{NORM} is described as"),
        ({"dtype": "bfloat16"}, f"{NORM} is described as"),
        (3, "damaged"),
        (msgpack.ExtType(1, b"\x93"), "damaged"),
        (msgpack_array("object", b""), "damaged"),
        (msgpack_array("float32", b"abc"), "damaged"),
    ])  # fmt: skip
    def test_leaves_of_msgpack_files(self, tree, tmp_path, change, words):
        folder = t5x_files.write_legacy(tmp_path / "checkpoint_5", tree)
        content = msgpack.unpackb((folder / "checkpoint").read_bytes(), strict_map_key=False)
        node = content["optimizer"]["target"]["encoder"]["encoder_norm"]
        node["scale"] = node["scale"] | change if isinstance(change, dict) else change
        (folder / "checkpoint").write_bytes(msgpack.packb(content, strict_types=False))
        refused(folder, words)

    @pytest.mark.parametrize(("name", "old", "new", "words"), [
        ("checkpoint", b"", b"", "checkpoint is damaged"),
        ("checkpoint", b"", b'model_checkpoint_path: "m"', "a TensorFlow checkpoint"),
        ("checkpoint", b"optimizer", b"optimiser", "damaged"),
        (f"{ZARR}/0.0", b"", None, f"{ZARR}.*missing"),  # zarr itself would read zeros
        (f"{ZARR}/0.0", b"", b"x", ZARR),
        (f"{ZARR}/.zarray", b"<f4", b">f4", ZARR),
        (f"{ZARR}/.zarray", b'"C"', b'"F"', ZARR),
        (f"{ZARR}/.zarray", b"24", b"20", "is described as"),
        (METADATA, b"", b"[]", "_METADATA does not describe"),
        (METADATA, b'"target"', b'"it"', "no 'target'.*'it'"),
        (METADATA, b'"wo"', b'"wu"', "wu.kernel"),
        (MANIFEST, b"", b"?", "cannot be read"),
        (MANIFEST, b"", None, "manifest.ocdbt is missing"),
    ])  # fmt: skip
    def test_files(self, tree, tmp_path, name, old, new, words):
        """Some bytes of a file are replaced, or all of it; None removes it."""
        layout = "orbax" if name in (METADATA, MANIFEST) else "legacy"
        file = WRITERS[layout](tmp_path / "checkpoint_5", tree) / name
        data = file.read_bytes()
        file.unlink()
        if new is not None:
            file.write_bytes(data.replace(old, new) if old else new)
        refused(tmp_path / "checkpoint_5", words)

    def test_urls(self, tmp_path):
        refused(f"file://{tmp_path}", "not a T5X checkpoint")
        refused("nonsense://bucket/checkpoint_5", "cannot be")

    def test_random_damage_never_ends_in_a_librarys_traceback(self, tree, tmp_path):
        """Bits of every file but the numbers; what loads all the same is what was saved."""
        rng, count = np.random.default_rng(0), 0
        expected = small_t5.backbone(small_t5.GATED).params
        names = ("checkpoint", ".zarray", "_METADATA", "manifest.ocdbt")
        for layout, write in WRITERS.items():
            folder = write(tmp_path / layout / "checkpoint_5", tree)
            files = sorted(x for x in folder.rglob("*") if x.name in names)
            for file in rng.choice(files, 25):
                data = file.read_bytes()
                changed = bytearray(data)
                changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
                file.write_bytes(changed)
                try:
                    small_t5.assert_same(load_backbone(folder).params, expected)
                except CheckpointError:
                    count += 1
                file.write_bytes(data)
        assert count > 10
