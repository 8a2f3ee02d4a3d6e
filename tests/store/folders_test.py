"""Backbone and plugin folders: reload equals before; each kind of damage is refused by name."""

import dataclasses
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_t5
from golden_vectors import config
from safetensors.numpy import load_file, save_file
from tiny import random_lora, random_params, random_plugin

from variator_jax import LoraConfig, load_lora, load_plugins, save_lora
from variator_jax.commands.describe import describe
from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig
from variator_jax.store import arrays, load_backbone, load_plugin, save_backbone, save_plugin

SHAPE = config("1_1", num_encoder_layers=3, num_decoder_layers=1)
PARAMS = random_params(SHAPE)
PLUGIN = PluginConfig(4, bottleneck=8, layers=(0, 2))
VARIABLES = random_plugin(PLUGIN, SHAPE)
KINDS = {"plugin": load_plugins, "backbone": load_backbone, "lora": load_lora}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A plugin folder, a backbone folder and a LoRA folder that load."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "spiece.model").write_bytes(b"a vocabulary")
    save_backbone(folder / "backbone", SHAPE, PARAMS, folder / "spiece.model")
    backbone = load_backbone(folder / "backbone")
    save_plugin(folder / "plugin", PLUGIN, VARIABLES, backbone, {"task": "x"}, {"x": 81.25})
    lora = random_lora(LoraConfig(2), PARAMS)
    save_lora(folder / "lora", LoraConfig(2), lora, backbone, {"task": "x"})
    return folder


@pytest.fixture
def copies(whole, tmp_path):
    """Copies of the folders, to be damaged."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path


def change_bytes(file, change):
    """Rewrites a file, or removes it where there is no change."""
    data = file.read_bytes()
    file.unlink()
    if change:
        file.write_bytes(change(data))


def edit(file, change):
    """Changes a description and signs it."""
    content = json.loads(file.read_text())
    change(content)
    text = json.dumps({**content, "checksum": "0" * 64})
    before, _, after = text.rpartition("0" * 64)
    file.write_text(before + hashlib.sha256(text.encode()).hexdigest() + after)


class TestReload:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_a_backbone_keeps_its_weights_in_their_dtype(self, tmp_path, dtype):
        params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
        (tmp_path / "a.model").write_bytes(b"a vocabulary")
        save_backbone(tmp_path / "backbone", SHAPE, params, tmp_path / "a.model")
        loaded = load_backbone(tmp_path / "backbone")
        assert loaded.config == SHAPE and loaded.fingerprint == arrays.fingerprint(params)
        small_t5.assert_same(loaded.params, params)
        assert loaded.vocabulary_file.read_bytes() == b"a vocabulary"

    def test_a_large_backbone_is_kept_in_shards(self, tmp_path, monkeypatch):
        monkeypatch.setattr(arrays.write_arrays, "__defaults__", (None, 50_000))
        save_backbone(tmp_path / "backbone", SHAPE, PARAMS)
        files = sorted(x.name for x in (tmp_path / "backbone").glob("*.safetensors"))
        assert len(files) > 2 and files[0] == f"backbone-00001-of-{len(files):05d}.safetensors"
        small_t5.assert_same(load_backbone(tmp_path / "backbone").params, PARAMS)
        (tmp_path / "backbone" / files[1]).unlink()
        with pytest.raises(CheckpointError, match=files[1]):
            load_backbone(tmp_path / "backbone")

    def test_an_encoder_width_of_its_own_is_kept_and_others_leave_no_trace(self, copies):
        content = json.loads((copies / "backbone" / "backbone.json").read_text())
        assert "encoder_mlp_dim" not in content["config"]  # as older releases write and read it
        narrow = dataclasses.replace(SHAPE, encoder_mlp_dim=24)
        save_backbone(copies / "narrow", narrow, random_params(narrow))
        assert load_backbone(copies / "narrow").config == narrow
        assert "mlp 80 (24 in the encoder)" in describe(copies / "narrow")

    @pytest.mark.parametrize("plugin", [
        PLUGIN,
        PluginConfig(2, decompression="repeat"),
        PluginConfig(sites=("ffn 0 x4 rank=3", "kv 0 x2 rank=1", "span 1-2 x4 rank=2")),
    ], ids=["ffn", "repeat", "all kinds"])  # fmt: skip
    def test_a_plugin_is_the_same_after_reloading(self, copies, plugin):
        backbone, variables = load_backbone(copies / "backbone"), random_plugin(plugin, SHAPE)
        save_plugin(copies / "plugin", plugin, variables, backbone)
        loaded = load_plugin(copies / "plugin", backbone)
        assert loaded.config == plugin
        small_t5.assert_same(loaded.variables.params, variables.params)
        small_t5.assert_same(loaded.variables.output_scales, variables.output_scales)

    def test_absent_settings_take_their_defaults(self, copies):
        """So a setting that a later release adds does not make today's folders unreadable."""
        edit(copies / "plugin" / "plugin.json", lambda x: x["config"].pop("pool_padding"))
        assert load_plugin(copies / "plugin").config == PLUGIN
        edit(copies / "backbone" / "backbone.json", lambda x: x["config"].pop("relpos_stddev"))
        assert load_backbone(copies / "backbone").config == SHAPE
        edit(copies / "lora" / "lora.json", lambda x: x["config"].pop("alpha"))
        assert load_lora(copies / "lora").config == LoraConfig(2)

    def test_a_description_survives_other_line_ends(self, copies):
        change_bytes(copies / "plugin" / "plugin.json", lambda x: x.replace(b"\n", b"\r\n"))
        assert load_plugin(copies / "plugin").config == PLUGIN


def test_fingerprints_see_values_names_and_shapes_but_not_the_precision():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    assert arrays.fingerprint(PARAMS) == arrays.fingerprint(half)
    trees = [{"a": np.zeros(4)}, {"b": np.zeros(4)}, {"a": np.zeros((2, 2))}, {"a": np.ones(4)}]
    assert len(set(map(arrays.fingerprint, trees))) == 4


@pytest.mark.parametrize("field", ["fingerprint", "vocabulary_fingerprint"])
def test_a_plugin_of_another_backbone_or_vocabulary_is_refused_with_both_fingerprints(whole, field):
    backbone = load_backbone(whole / "backbone")
    with pytest.raises(CheckpointError, match=rf"{getattr(backbone, field)}.*{'f' * 64}"):
        load_plugin(whole / "plugin", dataclasses.replace(backbone, **{field: "f" * 64}))


def test_what_is_not_finite_or_does_not_fit_is_never_written(whole, tmp_path):
    backbone = load_backbone(whole / "backbone")
    for change, words in (
        (lambda x: x * jnp.nan, "NaN or infinite"),
        (lambda x: x.astype(jnp.int32), "of int32; expected"),
    ):
        variables, params = (jax.tree.map(change, tree) for tree in (VARIABLES, PARAMS))
        with pytest.raises(CheckpointError, match=words):
            save_plugin(tmp_path / "x", PLUGIN, variables, backbone)
        with pytest.raises(CheckpointError, match=words):
            save_backbone(tmp_path / "x", SHAPE, params)
    with pytest.raises(CheckpointError, match="is missing"):
        save_plugin(tmp_path / "x", PluginConfig(4, bottleneck=8), VARIABLES, backbone)
    assert list(tmp_path.iterdir()) == []


SITE = {"kind": "ffn", "ratio": 4, "bottleneck": 8, "layers": [0, 2]}


class TestDamage:
    @pytest.mark.parametrize(("change", "words"), [
        (lambda x: x.update(format_version=99), "Update variator_jax"),
        (lambda x: x.update(backbone=[]), "backbone is a list; expected dict"),
        (lambda x: x.update(more=1), "has no field 'more'"),
        (lambda x: x.pop("quality"), "missing 1 required .*'quality'"),
        (lambda x: x["backbone"].update(embed_dim=10**12), "embed_dim is 1000000000000"),
        (lambda x: x["backbone"].update(num_encoder_layers=10**5), "100000 encoder layers"),
        (lambda x: x["config"].update(sites=[{**SITE, "ratio": 0}]), "ratio is 0"),
        (lambda x: x["config"].update(sites=[{**SITE, "layers": [0, 7]}]), r"layers \[7\]"),
        (lambda x: x["config"].update(sites=[{**SITE, "bottleneck": 16}]), "has shape"),
        (lambda x: x["config"].update(sites=[{**SITE, "layers": [0, 1, 2]}]), "is missing"),
    ])  # fmt: skip
    def test_a_forged_description(self, copies, change, words):
        edit(copies / "plugin" / "plugin.json", change)
        with pytest.raises(CheckpointError, match=words):
            load_plugin(copies / "plugin")

    @pytest.mark.parametrize(("file", "change", "words"), [
        ("plugin.safetensors", lambda x: x[:-100], "plugin.safetensors cannot be read"),
        ("plugin.safetensors", lambda x: x[:-3] + b"abc", "changed or damaged: its checksum"),
        ("plugin.safetensors", None, "plugin.safetensors cannot be read: No such file"),
        ("plugin.json", lambda x: x.replace(b'"x"', b'"y"', 1), "plugin.json was changed"),
        ("plugin.json", lambda x: b"{", "not readable JSON"),
        ("plugin.json", None, "holds no plugin: there is no plugin.json"),
    ])  # fmt: skip
    def test_missing_and_changed_files(self, copies, file, change, words):
        change_bytes(copies / "plugin" / file, change)
        with pytest.raises(CheckpointError, match=words):
            load_plugin(copies / "plugin")

    def test_other_things_than_folders(self, whole):
        for path, words in (
            (whole / "none", "There is no folder"),
            ("a\0b", "There is no folder"),
            ("google/flan-t5-none", "There is no folder .* has to be on disk"),
            (whole / "plugin" / "plugin.json", "is a file; a folder was expected"),
        ):
            with pytest.raises(CheckpointError, match=words):
                load_plugin(path)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("seed", range(9))
    def test_random_damage_is_refused_by_name(self, whole, tmp_path, kind, seed):
        """A file cut short, or one bit of it; in a third of the cases in the arrays' header."""
        rng = np.random.default_rng([seed, len(kind)])
        folder = shutil.copytree(whole / kind, tmp_path / kind)
        file = folder / str(rng.choice(sorted(p.name for p in folder.iterdir())))
        data = bytearray(file.read_bytes())
        if seed % 3 == 0:
            data = data[: rng.integers(0, len(data))]
        else:
            is_header = file.suffix == ".safetensors" and seed % 3 == 1
            end = 8 + int.from_bytes(data[:8], "little") if is_header else len(data)
            data[rng.integers(0, end)] ^= 1 << int(rng.integers(0, 8))
        file.write_bytes(data)
        with pytest.raises(CheckpointError) as error:
            KINDS[kind](folder)
        message = str(error.value)
        assert str(folder) in message and len(message) < 1000

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("change", "words"), [
        (lambda x: np.where(x == x.max(), np.float32(np.nan), x), "NaN or infinite"),
        (lambda x: np.where(x == x.max(), np.float32(-np.inf), x), "NaN or infinite"),
        (lambda x: x[None], "has shape"),
        (lambda x: x.astype(np.float64), "of float64"),
        (None, "is missing"),
    ])  # fmt: skip
    def test_forged_arrays_under_a_checksum_that_fits(self, copies, kind, change, words):
        file = copies / kind / f"{kind}.safetensors"
        leaves = load_file(file)
        name = sorted(leaves)[len(leaves) // 2]
        array = leaves.pop(name)
        save_file(leaves | ({name: change(array)} if change else {}), file)
        checksums = {file.name: arrays.file_checksum(file)}
        edit(copies / kind / f"{kind}.json", lambda x: x["file_checksums"].update(checksums))
        with pytest.raises(CheckpointError, match=words):
            KINDS[kind](copies / kind)
