"""T5X checkpoints with a plugin beside the backbone, written by Orbax itself and the older way."""

import dataclasses
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_t5
import t5x_files
from tiny import random_plugin

from variator_jax import cli
from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig
from variator_jax.store import inspect, load_backbone, load_plugin, load_plugins, save_backbone
from variator_jax.store.hugging_face import save_hf
from variator_jax.store.t5x import is_t5x, load_t5x
from variator_jax.store.t5x_run import load_t5x_plugin, open_t5x_run, read_plugin

WRITERS = {"orbax": t5x_files.write_orbax, "legacy": t5x_files.write_legacy}
CONFIG = PluginConfig(4, bottleneck=3)
SHAPE = small_t5.GATED
SCORES = "plugin/layers_1/compression/kernel"


def plugin_tree(variables):
    """A plugin's arrays where the T5X engine keeps them; flat."""
    tree = {f"plugin/{path}": leaf for path, leaf in small_t5.flat(variables.params).items()}
    for layer, scale in variables.output_scales.items():
        tree[f"plugin/{layer}/output_scale"] = np.asarray(scale)
    return tree


def settings_of(config=CONFIG):
    return {
        "plugin": dataclasses.asdict(config),
        "backbone": {**dataclasses.asdict(SHAPE), "name": "t5_1_1_tiny"},
        "training": {"task": "topic", "steps": 30, "batch_size": 8},
        "initial_checkpoint_path": "gs://bucket/checkpoint_3",
    }


def write_run(
    folder, config=CONFIG, *, write=WRITERS["legacy"], dtype="float32", said=True, **more
):
    """Writes MODEL_DIR/checkpoint_5; `more` are leaves that take the place of others, or None."""
    backbone, variables = small_t5.backbone(SHAPE, dtype), random_plugin(config, SHAPE)
    tree = t5x_files.t5x_tree(SHAPE, backbone.params) | plugin_tree(variables) | more
    write(folder / "checkpoint_5", {path: x for path, x in tree.items() if x is not None})
    if said:
        (folder / "variator_plugin.json").write_text(json.dumps(settings_of(config)))
    return backbone, variables


def refused(path, *words, backbone=None):
    with pytest.raises(CheckpointError) as error:
        load_t5x_plugin(path, backbone)
    for word in words:
        assert word in str(error.value), str(error.value)


def same_plugin(loaded, config, variables):
    assert loaded.config == config
    small_t5.assert_same(loaded.variables.params, variables.params)
    small_t5.assert_same(loaded.variables.output_scales, variables.output_scales)


class TestRead:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("layout", WRITERS)
    def test_the_plugin_and_the_backbone_it_belongs_to(self, layout, dtype, tmp_path):
        backbone, variables = write_run(tmp_path, write=WRITERS[layout], dtype=dtype)
        loaded = load_t5x_plugin(tmp_path / "checkpoint_5")
        same_plugin(loaded, CONFIG, variables)
        owner = loaded.description["backbone"]
        assert owner["fingerprint"] == backbone.fingerprint and owner["name"] == "t5_1_1_tiny"
        training = loaded.description["training"]
        assert training["task"] == "topic" and training["source"] == "T5X run, checkpoint_5"
        assert training["initial_checkpoint_path"] == "gs://bucket/checkpoint_3"

    @pytest.mark.parametrize("layout", WRITERS)
    def test_the_backbone_alone_without_the_plugin(self, layout, tmp_path):
        backbone, _ = write_run(tmp_path, write=WRITERS[layout])
        assert is_t5x(tmp_path)
        for found in (load_t5x(tmp_path), load_backbone(tmp_path / "checkpoint_5")):
            small_t5.assert_same(found.params, backbone.params)
            assert found.fingerprint == backbone.fingerprint

    @pytest.mark.parametrize("form", ["scanned", "unscanned"])
    def test_beside_other_forms_of_the_backbone(self, form, tmp_path):
        backbone, variables = small_t5.backbone(SHAPE), random_plugin(CONFIG, SHAPE)
        tree = t5x_files.t5x_tree(SHAPE, backbone.params, form) | plugin_tree(variables)
        t5x_files.write_legacy(tmp_path / "checkpoint_5", tree)
        loaded = load_t5x_plugin(tmp_path)
        same_plugin(loaded, CONFIG, variables)
        assert loaded.description["backbone"]["fingerprint"] == backbone.fingerprint

    def test_where_a_run_may_lie(self, tmp_path, monkeypatch):
        write_run(tmp_path / "old", PluginConfig(2, bottleneck=3))
        _, variables = write_run(tmp_path / "run", write=t5x_files.write_orbax)
        (tmp_path / "old" / "checkpoint_5").rename(tmp_path / "run" / "checkpoint_4")
        newest = tmp_path / "run" / "checkpoint_5"
        monkeypatch.chdir(newest)
        for path in (tmp_path / "run", newest, newest / "state", f"file://{newest}", "."):
            loaded = load_t5x_plugin(path)  # checkpoint_4 is no plugin of these settings
            same_plugin(loaded, CONFIG, variables)
            assert loaded.description["training"]["steps"] == 30
        (tmp_path / "run" / "variator_plugin.json").rename(newest / "variator_plugin.json")
        assert load_t5x_plugin(newest).description["training"]["steps"] == 30

    @pytest.mark.parametrize(
        "config",
        [
            PluginConfig(2, bottleneck=5),
            PluginConfig(4, bottleneck=3, layers=(0, 2)),
            PluginConfig(3, decompression="repeat"),
        ],
    )
    @pytest.mark.parametrize("said", [True, False])
    def test_settings_from_the_file_or_from_the_shapes(self, said, config, tmp_path):
        _, variables = write_run(tmp_path, config, said=said)
        loaded = load_t5x_plugin(tmp_path)
        same_plugin(loaded, config, variables)
        assert ("settings" in loaded.description["training"]) != said

    @pytest.mark.parametrize("half", [{"compression": "mean"}, {"decompression": "repeat"}])
    def test_ablations_without_parameters(self, half, tmp_path):
        config = PluginConfig(2, **{"compression": "mean", **half})
        _, variables = write_run(tmp_path, config)
        same_plugin(load_t5x_plugin(tmp_path), config, variables)
        (tmp_path / "variator_plugin.json").unlink()
        refused(tmp_path, "does not tell the plugin's ratio", "variator_plugin.json")

    def test_what_only_the_file_can_say(self, tmp_path):
        pooled = dataclasses.replace(CONFIG, pool_padding=True)
        write_run(tmp_path, pooled)
        assert load_t5x_plugin(tmp_path).config == pooled

    def test_no_more_than_one_leaf_of_the_backbone_is_held(self, tmp_path):
        backbone, _ = write_run(tmp_path)
        run, alive = open_t5x_run(tmp_path), weakref.WeakSet()

        class Array(np.ndarray):
            __hash__ = object.__hash__

        def tracked(leaf):
            def read():
                assert not alive
                array = leaf.read().view(Array)
                alive.add(array)
                return array

            return dataclasses.replace(leaf, read=read)

        leaves = tuple(map(tracked, run.source.leaves))
        source = dataclasses.replace(run.source, leaves=leaves)
        seen = []
        loaded = read_plugin(dataclasses.replace(run, source=source), None, seen.append)
        assert loaded.description["backbone"]["fingerprint"] == backbone.fingerprint
        assert len(seen) == len(leaves)

    def test_load_plugins_takes_a_checkpoint(self, tmp_path):
        backbone, variables = write_run(tmp_path)
        loaded = load_plugins(tmp_path / "checkpoint_5", backbone)
        assert list(loaded) == [4]
        same_plugin(loaded[4], CONFIG, variables)


class TestOwner:
    def test_the_users_backbone_in_any_dtype_of_the_same_fingerprint(self, tmp_path):
        write_run(tmp_path)
        vocabulary = tmp_path / "some.model"
        vocabulary.write_bytes(b"any SentencePiece model")
        ours = small_t5.backbone(SHAPE, "bfloat16", vocabulary)
        ours = dataclasses.replace(ours, vocabulary_fingerprint="a" * 64)
        said = load_t5x_plugin(tmp_path, ours).description
        assert said["backbone"]["name"] == ours.config.name
        assert said["backbone"]["fingerprint"] == ours.fingerprint
        assert said["vocabulary_fingerprint"] == "a" * 64

    def test_another_backbone_is_refused_with_both_fingerprints(self, tmp_path):
        backbone, _ = write_run(tmp_path)
        params = jax.tree.map(lambda x: x, backbone.params)
        params["decoder"]["decoder_norm"]["scale"] = np.ones(16, np.float32)
        save_backbone(tmp_path / "other", backbone.config, params)
        other = load_backbone(tmp_path / "other")
        refused(
            tmp_path,
            *(backbone.fingerprint, other.fingerprint, "is another one", "--from t5x"),
            backbone=other,
        )

    def test_the_same_one_cast_to_float16_is_told_apart(self, tmp_path):
        backbone, _ = write_run(tmp_path)
        leaves = jax.tree.map(lambda x: x.astype(np.float16), backbone.params)
        config = dataclasses.replace(backbone.config, param_dtype="float16")
        save_backbone(tmp_path / "f16", config, leaves)
        refused(tmp_path, "cast to float16", "bfloat16", backbone=load_backbone(tmp_path / "f16"))
        leaves["encoder"]["encoder_norm"]["scale"][0] += 1
        save_backbone(tmp_path / "f16", config, leaves)
        refused(tmp_path, "is another one", backbone=load_backbone(tmp_path / "f16"))

    def test_the_same_weights_in_another_network_are_refused(self, tmp_path):
        backbone, _ = write_run(tmp_path)
        config = dataclasses.replace(backbone.config, mlp_activations=("silu", "linear"))
        other = dataclasses.replace(backbone, config=config)
        refused(tmp_path, "mlp_activations ('gelu', 'linear')", "silu", backbone=other)
        (tmp_path / "variator_plugin.json").unlink()  # then nothing tells what it was
        load_t5x_plugin(tmp_path, other)


class TestDamage:
    @pytest.mark.parametrize("said", [True, False])
    @pytest.mark.parametrize("layout", WRITERS)
    def test_leaves(self, layout, said, tmp_path):
        def damaged(name, *words, **leaves):
            changed = {path.replace("__", "/"): leaf for path, leaf in leaves.items()}
            write_run(tmp_path / name, write=WRITERS[layout], said=said, **changed)
            refused(tmp_path / name, str(tmp_path / name / "checkpoint_5"), *words)

        good = plugin_tree(random_plugin(CONFIG, SHAPE))
        nan = np.array(good[SCORES])
        nan[5, 1] = np.nan
        scale = "plugin/layers_2/output_scale"
        bias = "plugin/layers_0/decompression/input_bias"
        damaged("a", "lacks", SCORES, **{SCORES: None})
        damaged("b", "lacks", scale, **{scale: None})
        damaged("c", bias, "shape (4,)", **{bias: np.zeros(4, np.float32)})
        damaged("d", SCORES, "NaN or infinite", **{SCORES: nan})
        damaged("e", scale, "NaN or infinite", **{scale: np.float32(np.inf)})
        damaged("f", SCORES, "dtype bfloat16", **{SCORES: good[SCORES].astype(jnp.bfloat16)})
        damaged(
            "g",
            "no use for plugin/layers_1/rest",
            **{"plugin/layers_1/rest": np.ones(2, np.float32)},
        )
        other = np.ones((32, 2), np.float32)
        damaged("h", SCORES, "(32, 2)" if said else "ratio 2", **{SCORES: other})

    @pytest.mark.parametrize("said", [True, False])
    def test_a_backbone_that_is_damaged_or_does_not_fit(self, said, tmp_path):
        query = "encoder/layers_1/attention/query/kernel"
        write_run(tmp_path / "a", said=said, **{query: None})
        refused(tmp_path / "a", "lacks", query)
        write_run(tmp_path / "b", said=said, **{query: np.full((16, 12), np.nan, np.float32)})
        refused(tmp_path / "b", "NaN", query)
        tree = plugin_tree(random_plugin(CONFIG, SHAPE))
        t5x_files.write_legacy(tmp_path / "c" / "checkpoint_5", tree)
        refused(tmp_path / "c", "a compression plugin and no backbone")
        last = {path.replace("layers_2", "layers_3"): leaf for path, leaf in tree.items()}
        write_run(tmp_path / "d", said=said, **last)
        refused(tmp_path / "d", "layers_3" if said else "layers [3]")

    def test_no_plugin_in_it(self, tmp_path):
        write_run(tmp_path, **dict.fromkeys(plugin_tree(random_plugin(CONFIG, SHAPE))))
        refused(tmp_path, "holds no compression plugin", "checkpoint_5")

    def test_shapes_that_tell_no_settings(self, tmp_path):
        write_run(tmp_path / "a", said=False, **{SCORES: np.ones((16, 1), np.float32)})
        refused(tmp_path / "a", SCORES, "(ratio * 16, ratio)")
        inputs, repeated = (
            f"plugin/layers_0/decompression/{x}_kernel" for x in ("input", "output")
        )
        write_run(tmp_path / "b", said=False, **{inputs: np.ones((16, 5), np.float32)})
        refused(tmp_path / "b", "mixes plugins", inputs, "bottleneck 5", "bottleneck 3")
        write_run(tmp_path / "c", said=False, **{repeated: np.ones(3, np.float32)})
        refused(tmp_path / "c", repeated, "no kernel")

    def test_settings(self, tmp_path):
        write_run(tmp_path)
        file = tmp_path / "variator_plugin.json"

        def said(change, *words):
            content = settings_of()
            change(content)
            file.write_text(json.dumps(content))
            refused(tmp_path, *words)

        said(
            lambda x: x["plugin"].update(ratio=2),
            "variator_plugin.json",
            "shape (4,); expected (2,)",
        )
        said(lambda x: x["plugin"].update(layers=[0, 7]), "variator_plugin.json", "layers [7]")
        said(lambda x: x["plugin"].update(ratio=10**9), "'plugin.ratio' is 1000000000")
        said(lambda x: x["plugin"].pop("sites"), "has no 'plugin.sites'")
        said(lambda x: x["backbone"].update(num_encoder_layers=4), "3 encoder layers", "says 4")
        said(lambda x: x["backbone"].update(vocab_size=10**9), "'backbone.vocab_size'")
        said(lambda x: x.pop("training"), "has no 'training'")
        said(lambda x: x["training"].update(loss=float("nan")), "NaN is no number of JSON")
        for text in ("{", "[]", "[" * 100_000):
            file.write_text(text)
            refused(tmp_path, "variator_plugin.json")


class TestCommand:
    def run(self, capsys, *arguments):
        code = cli.main(["convert", "--from", "t5x-run", *map(str, arguments)])
        return code, *capsys.readouterr()

    @pytest.mark.parametrize("path", ["checkpoint_5", ""])
    def test_a_plugin_folder_that_loads_on_the_backbone(self, path, tmp_path, capsys):
        backbone, variables = write_run(tmp_path / "run", write=t5x_files.write_orbax)
        code, out, err = self.run(capsys, tmp_path / "run" / path, tmp_path / "plugin")
        assert code == 0, err
        assert "compression plugin in" in out and backbone.fingerprint in out
        loaded = load_plugin(tmp_path / "plugin", backbone)
        same_plugin(loaded, CONFIG, variables)
        assert loaded.description["training"]["task"] == "topic"

    @pytest.mark.parametrize("owner", ["ours", "hf", "t5x"])
    def test_with_the_users_backbone_in_any_format(self, owner, tmp_path, capsys):
        backbone, _ = write_run(tmp_path / "run")
        vocabulary = tmp_path / "some.model"
        vocabulary.write_bytes(b"any SentencePiece model")
        save_backbone(tmp_path / "ours", backbone.config, backbone.params, str(vocabulary))
        save_hf(tmp_path / "hf", backbone)
        tree = t5x_files.t5x_tree(SHAPE, backbone.params)
        t5x_files.write_legacy(tmp_path / "t5x" / "checkpoint_3", tree)
        code, _, err = self.run(
            capsys,
            *(tmp_path / "run", tmp_path / "plugin", "--backbone", tmp_path / owner),
            *("--to", "variator"),
        )
        assert code == 0, err
        loaded = load_plugin(tmp_path / "plugin", load_backbone(tmp_path / owner))
        assert (loaded.description["vocabulary_fingerprint"] is None) == (owner != "ours")

    def test_another_backbone_leaves_nothing(self, tmp_path, capsys):
        backbone, _ = write_run(tmp_path / "run")
        params = jax.tree.map(lambda x: -x, backbone.params)
        save_backbone(tmp_path / "other", backbone.config, params)
        code, out, err = self.run(
            capsys, tmp_path / "run", tmp_path / "plugin", "--backbone", tmp_path / "other"
        )
        assert code == 2 and not out and backbone.fingerprint in err.splitlines()[-1]
        assert not (tmp_path / "plugin").exists()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--from", "t5x-run", "--to", "t5x", "run", "out"), "with --to variator"),
            (("--from", "t5x-run", "run", "out", "--dtype", "bf16"), "neither --dtype nor"),
            (("--from", "t5x-run", "run", "out", "--scan"), "neither --dtype nor --scan"),
            (("--from", "t5x-run", "run", "run"), "exists already"),
            (("--from", "t5x-run", "nowhere", "out"), "There is no folder nowhere"),
            (("--from", "t5x_run", "run", "out"), "Did you mean 't5x-run'"),
            (("--from", "t5x", "run", "out"), "--to is missing"),
            (("--from", "official", "run", "out"), "--to is missing"),
        ],
    )
    def test_slips(self, arguments, words, tmp_path, capsys, monkeypatch):
        write_run(tmp_path / "run")
        monkeypatch.chdir(tmp_path)
        assert cli.main(["convert", *arguments]) == 2
        out, err = capsys.readouterr()
        assert words in err and err.count("\n") == 1 and not out
        assert not (tmp_path / "out").exists()


class TestInspect:
    @pytest.mark.parametrize("path", ["checkpoint_5", ""])
    def test_backbone_and_plugin_are_described(self, path, tmp_path):
        backbone, variables = write_run(tmp_path)
        text = inspect.describe(tmp_path / path)
        count = sum(leaf.size for leaf in jax.tree.leaves(variables.params))
        assert "backbone t5_1_1_tiny with plugin ratio 4 in" in text.splitlines()[0]
        for said in (f"{count:,}", "layers_0, layers_1, layers_2", "bottleneck 3", "task topic"):
            assert said in text
        assert backbone.fingerprint not in text
        assert backbone.fingerprint in inspect.describe(tmp_path / path, verify=True)

    def test_a_plugin_that_is_damaged_is_told(self, tmp_path):
        write_run(tmp_path, **{SCORES: np.full((64, 4), np.inf, np.float32)})
        with pytest.raises(CheckpointError, match=SCORES):
            inspect.describe(tmp_path)

    def test_without_a_plugin_nothing_is_said_of_one(self, tmp_path):
        backbone = small_t5.backbone(SHAPE)
        tree = t5x_files.t5x_tree(SHAPE, backbone.params)
        t5x_files.write_orbax(tmp_path / "checkpoint_5", tree)
        assert "plugin ratio" not in inspect.describe(tmp_path)
