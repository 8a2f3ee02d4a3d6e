"""T5X's checkpoints in both layouts and all forms of the tree, written by other means than ours."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small_t5
import t5x_files

from variator_jax.errors import CheckpointError
from variator_jax.store import load_backbone
from variator_jax.store.t5x import load_t5x, save_t5x

FORMS = ("t5", "unscanned", "scanned")


def tree_of(config, form="t5", dtype="float32"):
    backbone = small_t5.backbone(config, dtype)
    return backbone, t5x_files.t5x_tree(config, backbone.params, form)


class TestRead:
    @pytest.mark.parametrize("family", small_t5.CONFIGS)
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("layout", ["legacy", "orbax"])
    def test_every_form_in_both_layouts(self, family, form, layout, tmp_path):
        expected, tree = tree_of(small_t5.CONFIGS[family], form)
        write = t5x_files.write_legacy if layout == "legacy" else t5x_files.write_orbax
        loaded = load_t5x(write(tmp_path / "checkpoint_5", tree))
        small_t5.assert_same(loaded.params, expected.params)
        assert loaded.fingerprint == expected.fingerprint
        assert loaded.config == dataclasses.replace(expected.config, name=loaded.config.name)

    def test_bfloat16_and_casting(self, tmp_path):
        expected, tree = tree_of(small_t5.GATED, dtype="bfloat16")
        loaded = load_t5x(t5x_files.write_legacy(tmp_path / "checkpoint_5", tree))
        small_t5.assert_same(loaded.params, expected.params)
        assert loaded.config.param_dtype == loaded.config.dtype == "bfloat16"
        wide = load_t5x(tmp_path / "checkpoint_5", "float32")
        assert wide.config.param_dtype == "float32" and wide.fingerprint == loaded.fingerprint
        kernel = wide.params["encoder"]["layers_0"]["mlp"]["wo"]["kernel"]
        assert kernel.dtype == np.float32
        assert np.array_equal(
            kernel.astype(jnp.bfloat16),
            expected.params["encoder"]["layers_0"]["mlp"]["wo"]["kernel"],
        )

    @pytest.mark.parametrize(
        "store",
        [
            lambda folder, path, array: t5x_files.packed(array),
            lambda folder, path, array: t5x_files.chunked(array),
            lambda *a: t5x_files.beside(*a, driver="gfile"),
            lambda *a: t5x_files.beside(*a, driver="gcs"),
            lambda *a: t5x_files.beside(*a, outside=True),
            lambda folder, path, array: (
                t5x_files.packed(array)
                if array.ndim == 1
                else t5x_files.beside(folder, path, array)
            ),
        ],
        ids=["held", "in pieces", "gfile", "gcs", "path outside", "mixed"],
    )
    @pytest.mark.parametrize("version", [3, 0])
    def test_every_way_in_which_old_files_keep_a_leaf(self, store, version, tmp_path):
        expected, tree = tree_of(small_t5.PLAIN)
        folder = t5x_files.write_legacy(tmp_path / "checkpoint_5", tree, store, version)
        small_t5.assert_same(load_t5x(folder).params, expected.params)

    def test_orbax_without_ocdbt(self, tmp_path):
        expected, tree = tree_of(small_t5.GATED)
        folder = t5x_files.write_orbax(tmp_path / "checkpoint_5", tree, ocdbt=False)
        assert not list(folder.rglob("manifest.ocdbt"))
        small_t5.assert_same(load_t5x(folder).params, expected.params)

    def test_where_a_checkpoint_may_lie(self, tmp_path):
        expected, tree = tree_of(small_t5.GATED)
        old = t5x_files.write_legacy(tmp_path / "run" / "checkpoint_9", tree)
        new = t5x_files.write_orbax(tmp_path / "run" / "checkpoint_10", tree)
        for path in (
            old / "checkpoint",
            f"file://{old}",
            f"file://{new}/",
            new / "state",
            tmp_path / "run",
        ):
            assert load_t5x(path).fingerprint == expected.fingerprint
        assert load_backbone(f"file://{old}").fingerprint == expected.fingerprint
        assert load_backbone(tmp_path / "run").fingerprint == expected.fingerprint
        (new / "state" / "manifest.ocdbt").unlink()  # the run's latest is 10, not 9
        with pytest.raises(CheckpointError, match="checkpoint_10"):
            load_t5x(tmp_path / "run")

    def test_a_config_of_the_users_own(self, tmp_path):
        expected, tree = tree_of(small_t5.GATED)
        folder = t5x_files.write_legacy(tmp_path / "checkpoint_5", tree)
        silu = dataclasses.replace(expected.config, mlp_activations=("silu", "linear"))
        assert load_t5x(folder, config=silu).config == silu
        wide = dataclasses.replace(expected.config, embed_dim=32)
        with pytest.raises(CheckpointError, match="has shape"):
            load_t5x(folder, config=wide)

    @pytest.mark.parametrize("form", ["unscanned", "scanned"])
    def test_biases_that_differ_between_layers_are_refused_by_layer(self, form, tmp_path):
        _, tree = tree_of(small_t5.GATED, form)
        if form == "scanned":
            tree["decoder/decoder/relpos_bias/rel_embedding"][:, 1] += 1
        else:
            tree["decoder/layers_1/relpos_bias/rel_embedding"] = np.ones((3, 32), np.float32)
        t5x_files.write_legacy(tmp_path / "checkpoint_5", tree)
        with pytest.raises(
            CheckpointError, match="bias of decoder layer 1 .*differs from.*layer 0"
        ):
            load_t5x(tmp_path / "checkpoint_5")


class TestWrite:
    @pytest.mark.parametrize("family", small_t5.CONFIGS)
    @pytest.mark.parametrize("scan", [False, True])
    def test_orbax_restores_the_very_tree_of_t5x(self, family, scan, tmp_path):
        config = small_t5.CONFIGS[family]
        backbone, tree = tree_of(config, "scanned" if scan else "t5")
        folder = save_t5x(tmp_path / "checkpoint_7", backbone, scan=scan)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(folder / "state")
        small_t5.assert_same(restored["target"], dict(_nested(tree)))
        assert restored["state"]["step"] == 7 and restored["state"]["step"].dtype == np.int32

    @pytest.mark.parametrize("family", small_t5.CONFIGS)
    @pytest.mark.parametrize("scan", [False, True])
    @pytest.mark.parametrize("layout", ["legacy", "orbax"])
    def test_round_trips_are_the_same_bits(self, family, scan, layout, tmp_path):
        _, tree = tree_of(small_t5.CONFIGS[family], "scanned" if scan else "t5", "bfloat16")
        write = t5x_files.write_legacy if layout == "legacy" else t5x_files.write_orbax
        loaded = load_t5x(write(tmp_path / "theirs" / "checkpoint_5", tree))
        folder = save_t5x(tmp_path / "ours", loaded, scan=scan, step=5)
        assert folder == tmp_path / "ours" / "checkpoint_5"
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            small_t5.assert_same(checkpointer.restore(folder / "state")["target"], _nested(tree))
        small_t5.assert_same(load_t5x(folder).params, loaded.params)

    @pytest.mark.parametrize(
        ("family", "setting", "value"),
        [
            ("1.1", "mlp_activations", ("silu", "linear")),
            ("encoder", "layer_norm_epsilon", 1e-5),
            ("1.0", "mlp_activations", ("gelu",)),
        ],
    )
    def test_what_the_tree_cannot_hold_is_refused(self, family, setting, value, tmp_path):
        config = dataclasses.replace(small_t5.CONFIGS[family], **{setting: value})
        with pytest.raises(CheckpointError, match=setting):
            save_t5x(tmp_path / "checkpoint_1", small_t5.backbone(config))
        assert list(tmp_path.iterdir()) == []

    def test_an_encoder_alone_has_no_logits_to_lose(self, tmp_path):
        config = dataclasses.replace(small_t5.ENCODER, logits_via_embedding=True)
        save_t5x(tmp_path, small_t5.backbone(config))

    def test_targets_that_are_refused(self, tmp_path):
        backbone, _ = tree_of(small_t5.ENCODER)
        folder = save_t5x(tmp_path, backbone)
        assert folder == tmp_path / "checkpoint_0"
        with pytest.raises(CheckpointError, match="exists already"):
            save_t5x(folder, backbone)
        with pytest.raises(CheckpointError, match="another step"):
            save_t5x(tmp_path / "checkpoint_3", backbone, step=4)
        with pytest.raises(CheckpointError, match="local folders only"):
            save_t5x("gs://bucket/checkpoint_3", backbone)
        assert [x.name for x in tmp_path.iterdir()] == ["checkpoint_0"]


def _nested(tree):
    from flax import traverse_util

    return traverse_util.unflatten_dict(tree, sep="/")
