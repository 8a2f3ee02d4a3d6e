"""T5X checkpoints with a plugin beside the backbone, written by Orbax itself and the older way."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_t5
import t5x_files
from hf_files import save_hf
from tiny import random_plugin

from variator_jax import cli
from variator_jax.commands.describe import describe
from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig
from variator_jax.store import load_backbone, load_plugin, load_plugins, save_backbone
from variator_jax.store.arrays import fingerprint
from variator_jax.store.other_plugins import load_t5x_plugin

WRITERS = {
    "orbax": t5x_files.write_orbax,
    "legacy": t5x_files.write_legacy,
    "held": lambda folder, tree: t5x_files.write_legacy(folder, tree, t5x_files.held),
}
CONFIG = PluginConfig(4, bottleneck=3, layers=(1, 2), pool_padding=True)
SHAPE = small_t5.GATED
BACKBONE = small_t5.backbone(SHAPE)
SCORES = "plugin/encoder/layers_1/mlp/compression/kernel"
SCALE = "plugin/encoder/layers_2/mlp/output_scale"
QUERY = "encoder/layers_1/attention/query/kernel"


def plugin_tree(variables):
    """A plugin's arrays where the T5X engine keeps them; flat."""
    tree = {f"plugin/{path}": leaf for path, leaf in small_t5.flat(variables.params).items()}
    scales = variables.output_scales.items()
    return tree | {f"plugin/{key}/output_scale": np.asarray(scale) for key, scale in scales}


GOOD = plugin_tree(random_plugin(CONFIG, SHAPE))


def settings_of(config=CONFIG):
    return {
        "plugin": config.to_json(),
        "backbone": {**dataclasses.asdict(SHAPE), "name": "t5_1_1_tiny"},
        "training": {"task": "topic", "steps": 30, "batch_size": 8},
        "initial_checkpoint_path": "gs://bucket/checkpoint_3",
    }


def write_run(folder, config=CONFIG, *, write=WRITERS["legacy"], dtype="float32", **more):
    """Writes MODEL_DIR/checkpoint_5; `more` are leaves that take the place of others, or None."""
    backbone, variables = small_t5.backbone(SHAPE, dtype), random_plugin(config, SHAPE)
    tree = t5x_files.t5x_tree(SHAPE, backbone.params) | plugin_tree(variables) | more
    write(folder / "checkpoint_5", {path: x for path, x in tree.items() if x is not None})
    (folder / "variator_plugin.json").write_text(json.dumps(settings_of(config)))
    return backbone, variables


def refused(path, words, backbone=None):
    with pytest.raises(CheckpointError, match=words):
        load_t5x_plugin(path, backbone)


def same_plugin(loaded, config, variables):
    assert loaded.config == config
    small_t5.assert_same(vars(loaded.variables), vars(variables))


class TestRead:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("layout", WRITERS)
    def test_the_plugin_and_the_backbone_it_belongs_to(self, layout, dtype, tmp_path):
        backbone, variables = write_run(tmp_path, write=WRITERS[layout], dtype=dtype)
        loaded = load_t5x_plugin(tmp_path / "checkpoint_5")
        same_plugin(loaded, CONFIG, variables)
        owner, training = loaded.description["backbone"], loaded.description["training"]
        assert owner["fingerprint"] == backbone.fingerprint and owner["name"] == "t5_1_1_tiny"
        assert training["task"] == "topic" and training["source"] == "T5X run, checkpoint_5"
        assert training["initial_checkpoint_path"] == "gs://bucket/checkpoint_3"
        assert list(load_plugins(tmp_path / "checkpoint_5", backbone)) == [4]
        for path in (tmp_path, tmp_path / "checkpoint_5"):  # the backbone without the plugin
            found = load_backbone(path)
            small_t5.assert_same(found.params, backbone.params)
            assert found.fingerprint == backbone.fingerprint

    def test_where_a_run_may_be(self, tmp_path, monkeypatch):
        write_run(tmp_path / "old", PluginConfig(2, bottleneck=3))
        _, variables = write_run(tmp_path / "run", write=t5x_files.write_orbax)
        (tmp_path / "old" / "checkpoint_5").rename(tmp_path / "run" / "checkpoint_4")
        newest = tmp_path / "run" / "checkpoint_5"
        monkeypatch.chdir(newest)
        for path in (tmp_path / "run", newest, newest / "state", f"file://{newest}", "."):
            same_plugin(load_t5x_plugin(path), CONFIG, variables)
        (tmp_path / "run" / "variator_plugin.json").rename(newest / "variator_plugin.json")
        same_plugin(load_t5x_plugin(newest), CONFIG, variables)
        (newest / "variator_plugin.json").unlink()
        refused(newest, f"There is no variator_plugin.json in {newest}")

    def test_every_setting_comes_from_the_runs_file(self, tmp_path):
        config = PluginConfig(3, layers=(0, 2), pool_padding=True, decompression="repeat")
        _, variables = write_run(tmp_path, config)
        same_plugin(load_t5x_plugin(tmp_path), config, variables)


class TestOwner:
    def test_the_users_backbone_in_any_dtype_of_the_same_fingerprint(self, tmp_path):
        write_run(tmp_path)
        ours = small_t5.backbone(SHAPE, "bfloat16")
        ours = dataclasses.replace(ours, vocabulary_fingerprint="a" * 64)
        record = load_t5x_plugin(tmp_path, ours).description
        assert record["backbone"]["name"] == ours.config.name
        assert record["backbone"]["fingerprint"] == ours.fingerprint
        assert record["vocabulary_fingerprint"] == "a" * 64

    def test_another_backbone_is_refused_with_both_fingerprints(self, tmp_path):
        backbone, _ = write_run(tmp_path)
        half = jax.tree.map(lambda x: x.astype(np.float16), backbone.params)
        other = dataclasses.replace(backbone, params=half, fingerprint=fingerprint(half))
        refused(tmp_path, f"{backbone.fingerprint}.*{other.fingerprint}", backbone=other)
        # The same weights in another network.
        config = dataclasses.replace(backbone.config, mlp_activations=("silu", "linear"))
        other = dataclasses.replace(backbone, config=config)
        refused(tmp_path, "mlp_activations .'gelu', 'linear'.*silu", backbone=other)


class TestDamage:
    @pytest.mark.parametrize(("leaves", "words"), [
        ({SCALE: None}, f"is missing {SCALE}"),
        ({"plugin/more": np.ones(2, np.float32)}, "has unexpected plugin/more"),
        ({QUERY: None}, f"is missing {QUERY}"),
        (dict.fromkeys(GOOD), "holds no compression plugin"),
        (dict.fromkeys(small_t5.flat(BACKBONE.params)), "a compression plugin and no backbone"),
    ])  # fmt: skip
    def test_leaves(self, leaves, words, tmp_path):
        write_run(tmp_path, **leaves)
        refused(tmp_path, f"checkpoint_5.*{words}")

    @pytest.mark.parametrize(("change", "words"), [
        (lambda x: x["plugin"]["sites"][0].update(ratio=2), r"expected \(32, 2\)"),
        (lambda x: x["plugin"].update(sites=[{"kind": "new"}]), "No site is of kind 'new'"),
        (lambda x: x["backbone"].update(num_encoder_layers=4), "is missing encoder/layers_3"),
    ])  # fmt: skip
    def test_settings(self, change, words, tmp_path):
        write_run(tmp_path)
        content = settings_of()
        change(content)
        (tmp_path / "variator_plugin.json").write_text(json.dumps(content))
        refused(tmp_path, words)


@pytest.mark.parametrize("owner", [None, "ours", "hf"])
def test_convert_makes_a_plugin_folder_for_the_backbone_in_any_format(owner, tmp_path, capsys):
    backbone, variables = write_run(tmp_path / "run", write=t5x_files.write_orbax)
    (tmp_path / "a.model").write_bytes(b"any SentencePiece model")
    save_backbone(tmp_path / "ours", backbone.config, backbone.params, tmp_path / "a.model")
    save_hf(tmp_path / "hf", backbone)
    command = ["convert", "--from", "t5x-run", str(tmp_path / "run"), str(tmp_path / "plugin")]
    if owner:
        command += ["--backbone", str(tmp_path / owner), "--to", "variator"]
    assert cli.main(command) == 0
    assert backbone.fingerprint in capsys.readouterr().out
    loaded = load_plugin(tmp_path / "plugin", backbone)
    same_plugin(loaded, CONFIG, variables)
    assert loaded.description["training"]["task"] == "topic"
    assert (loaded.description["vocabulary_fingerprint"] is None) == (owner != "ours")


def test_inspect_describes_backbone_and_plugin(tmp_path):
    backbone, variables = write_run(tmp_path / "run")
    text = describe(tmp_path / "run")
    count = sum(leaf.size for leaf in jax.tree.leaves(variables.params))
    for fact in (f"{count:,}", "encoder/layers_2/mlp", "bottleneck=3", "task topic", "ratio:"):
        assert fact in text
    assert "t5_1_1_tiny" in text.splitlines()[0] and backbone.fingerprint not in text
    assert backbone.fingerprint in describe(tmp_path / "run", verify=True)
    write_run(tmp_path / "bad", **{SCORES: GOOD[SCORES] * np.nan})
    with pytest.raises(CheckpointError, match=f"{SCORES} holds numbers that are NaN"):
        describe(tmp_path / "bad")
