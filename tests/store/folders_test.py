"""Backbone and plugin folders: reload equals before; each kind of damage has its message."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import config
from tiny import random_params, random_plugin

from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig
from variator_jax.store import (
    arrays_file,
    backbone_folder,
    description,
    folders,
    inspect,
    load_backbone,
    load_plugin,
    save_backbone,
    save_plugin,
)

SHAPE = config("1_1")
PARAMS = random_params(SHAPE)
PLUGIN = PluginConfig(4, bottleneck=8, layers=(0, 2))
VARIABLES = random_plugin(PLUGIN, SHAPE)


@pytest.fixture
def backbone(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"a vocabulary")
    save_backbone(tmp_path / "backbone", SHAPE, PARAMS, str(tmp_path / "spiece.model"))
    return load_backbone(tmp_path / "backbone")


def _equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_backbone_is_the_same_after_reloading(backbone, tmp_path):
    assert backbone.config == SHAPE
    _equal(backbone.params, PARAMS)
    assert backbone.vocabulary_file.read_bytes() == b"a vocabulary"
    assert "backbone golden_1_1" in inspect.describe(tmp_path / "backbone")


def test_an_encoder_width_of_its_own_is_kept_and_others_leave_no_trace(backbone, tmp_path):
    """A folder of an earlier release, which knew no such width, is the same and loads."""
    written = json.loads((tmp_path / "backbone" / "backbone.json").read_text())
    assert "encoder_mlp_dim" not in written["config"]
    narrow = dataclasses.replace(SHAPE, encoder_mlp_dim=24)
    params = random_params(narrow)
    save_backbone(tmp_path / "narrow", narrow, params)
    loaded = load_backbone(tmp_path / "narrow")
    assert loaded.config == narrow
    _equal(loaded.params, params)
    assert "mlp 80 (24 in the encoder)" in inspect.describe(tmp_path / "narrow")
    file = tmp_path / "narrow" / "backbone.json"
    for bad, words in (("24", "is a text"), (10**9, "expected 0 to"), (0, "must be positive")):
        _edit(file, lambda content, bad=bad: content["config"].update(encoder_mlp_dim=bad))
        with pytest.raises(CheckpointError, match=words):
            load_backbone(tmp_path / "narrow")
    _edit(file, lambda content: content["config"].pop("encoder_mlp_dim"))
    with pytest.raises(CheckpointError, match="has shape"):
        load_backbone(tmp_path / "narrow")


@pytest.mark.parametrize("plugin", [PLUGIN, PluginConfig(2, decompression="repeat")])
def test_a_plugin_is_the_same_after_reloading(backbone, tmp_path, plugin):
    variables = random_plugin(plugin, SHAPE)
    save_plugin(
        tmp_path / "plugin", plugin, variables, backbone, {"task": "x"}, quality={"x": 81.25}
    )
    loaded = load_plugin(tmp_path / "plugin", backbone)
    assert loaded.config == plugin
    _equal(loaded.variables, variables)
    text = inspect.describe(tmp_path / "plugin")
    assert (
        backbone.fingerprint in text and f"ratio:       {plugin.ratio}" in text and "81.2" in text
    )


def test_fingerprints_see_values_names_and_shapes_but_not_the_precision():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    assert folders.fingerprint(PARAMS) == folders.fingerprint(half)
    other = jax.tree.map(lambda x: x, PARAMS)
    other["encoder"]["encoder_norm"]["scale"] = PARAMS["encoder"]["encoder_norm"]["scale"] * 1.01
    assert folders.fingerprint(other) != folders.fingerprint(PARAMS)
    assert folders.fingerprint({"a": np.zeros(4)}) != folders.fingerprint({"b": np.zeros(4)})
    assert folders.fingerprint({"a": np.zeros(4)}) != folders.fingerprint({"a": np.zeros((2, 2))})


def test_a_plugin_of_another_backbone_is_refused_with_both_fingerprints(backbone, tmp_path):
    save_plugin(tmp_path / "plugin", PLUGIN, VARIABLES, backbone)
    stranger = dataclasses.replace(backbone, fingerprint="f" * 64)
    with pytest.raises(CheckpointError) as error:
        load_plugin(tmp_path / "plugin", stranger)
    assert "f" * 64 in str(error.value) and backbone.fingerprint in str(error.value)


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_each_kind_of_damage_has_its_own_message(backbone, tmp_path):
    folder = tmp_path / "plugin"

    def fresh():
        save_plugin(folder, PLUGIN, VARIABLES, backbone)

    def fails(words):
        with pytest.raises(CheckpointError, match=words):
            load_plugin(folder)

    fails("holds no plugin: there is no such folder")
    folder.mkdir()
    fails("holds no plugin: there is no plugin.json")
    fresh()
    (folder / "plugin.json").write_text("{")
    fails("not readable JSON")
    fresh()
    _edit(folder / "plugin.json", lambda c: c.update(format_version=99))
    fails("Update variator_jax")
    fresh()
    _edit(folder / "plugin.json", lambda c: c.update(format_version="1"))
    fails("format version '1'")
    fresh()
    _edit(folder / "plugin.json", lambda c: c.update(kind="backbone"))
    fails("does not describe a plugin")
    fresh()
    _edit(folder / "plugin.json", lambda c: c["config"].update(ratio=0))
    fails("'config.ratio' is 0")
    fresh()
    _edit(folder / "plugin.json", lambda c: c["config"].update(ratio="4"))
    fails("'config.ratio' is a text; expected a whole number")
    fresh()
    _edit(folder / "plugin.json", lambda c: c.update(backbone=[]))
    fails("'backbone' is a list; expected an object")
    fresh()
    _edit(folder / "plugin.json", lambda c: c["backbone"].update(embed_dim=10**12))
    fails("'backbone.embed_dim' is 1000000000000")
    fresh()
    _edit(folder / "plugin.json", lambda c: c["config"].pop("sites"))
    fails("has no 'config.sites'")
    fresh()
    _edit(folder / "plugin.json", lambda c: c["config"].update(sites="(("))
    fails("no usable config")
    fresh()
    _edit(folder / "plugin.json", lambda c: c["config"].update(layers=[0, 7]))
    fails(r"names encoder layers \[7\]")
    fresh()
    _edit(folder / "plugin.json", lambda c: c.update(training={"task": "another"}))
    fails("plugin.json was changed or damaged")
    fresh()
    _edit(folder / "plugin.json", lambda c: c["config"].update(bottleneck=16))
    fails("has shape")
    fresh()
    _edit(folder / "plugin.json", lambda c: c["config"].update(layers=[0, 1, 2]))
    fails("lacks")
    fresh()
    _edit(folder / "plugin.json", lambda c: c["config"].update(layers=[0]))
    fails("has no use for")
    fresh()
    data = (folder / "plugin.safetensors").read_bytes()
    (folder / "plugin.safetensors").write_bytes(data[:-100])
    fails("cut short or damaged")
    changed = bytearray(data)
    changed[-3] ^= 1
    (folder / "plugin.safetensors").write_bytes(changed)
    fails("plugin.safetensors was changed or damaged: its checksum")
    (folder / "plugin.safetensors").unlink()
    fails("is missing")


def test_a_changed_backbone_is_noticed(backbone, tmp_path):
    path = tmp_path / "backbone" / "backbone.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed or damaged"):
        load_backbone(tmp_path / "backbone")


def test_links_that_lead_nowhere_and_files_in_the_place_of_folders_are_told(backbone, tmp_path):
    folder, file = tmp_path / "plugin", tmp_path / "plugin" / "plugin.safetensors"
    save_plugin(folder, PLUGIN, VARIABLES, backbone)
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(CheckpointError, match="plugin.safetensors cannot be read: Too many levels"):
        load_plugin(folder)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match="plugin.safetensors is a folder"):
        load_plugin(folder)
    with pytest.raises(CheckpointError, match="plugin.json is a file; a folder was expected"):
        load_plugin(folder / "plugin.json")
    with pytest.raises(CheckpointError, match="is no path"):
        load_plugin("a\0b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(backbone, tmp_path):
    save_plugin(tmp_path / "plugin", PLUGIN, VARIABLES, backbone)
    (tmp_path / "plugin" / "plugin.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        load_plugin(tmp_path / "plugin")


def test_permission_is_told_whoever_asks(backbone, tmp_path, monkeypatch):
    save_plugin(tmp_path / "plugin", PLUGIN, VARIABLES, backbone)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"plugin.json cannot be read: Permission denied"):
        load_plugin(tmp_path / "plugin")


def test_a_plugin_with_the_wrong_vocabulary_is_refused_with_both_fingerprints(backbone, tmp_path):
    save_plugin(tmp_path / "plugin", PLUGIN, VARIABLES, backbone)
    stranger = dataclasses.replace(backbone, vocabulary_fingerprint="e" * 64)
    with pytest.raises(CheckpointError) as error:
        load_plugin(tmp_path / "plugin", stranger)
    assert "e" * 64 in str(error.value) and backbone.vocabulary_fingerprint in str(error.value)


def test_what_is_not_finite_or_does_not_fit_is_never_written(backbone, tmp_path):
    nan = jax.tree.map(lambda x: x * jnp.nan, VARIABLES)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        save_plugin(tmp_path / "plugin", PLUGIN, nan, backbone)
    with pytest.raises(CheckpointError, match="lacks"):
        save_plugin(tmp_path / "plugin", PluginConfig(4, bottleneck=8), VARIABLES, backbone)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), VARIABLES)
    with pytest.raises(CheckpointError, match="has dtype bfloat16; expected float32"):
        save_plugin(tmp_path / "plugin", PLUGIN, half, backbone)
    infinite = {
        **PARAMS,
        "token_embedder": {"embedding": PARAMS["token_embedder"]["embedding"] * np.inf},
    }
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        save_backbone(tmp_path / "other", SHAPE, infinite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backbone", "spiece.model"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_among_many_is_found(tmp_path, dtype, bad):
    array = np.full(5_000_000, -3.3e4, dtype)  # more than is looked at in one go
    arrays_file.check_finite(tmp_path, {"a": array})
    array[4_999_998] = bad
    with pytest.raises(CheckpointError, match="a holds numbers that are NaN or infinite"):
        arrays_file.check_finite(tmp_path, {"a": array})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_backbone_keeps_the_dtype_of_its_weights(tmp_path, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    save_backbone(tmp_path / "backbone", SHAPE, params)
    loaded = load_backbone(tmp_path / "backbone")
    _equal(loaded.params, params)
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {np.dtype(dtype)}
    whole = jax.tree.map(lambda x: x.astype(jnp.int32), PARAMS)
    with pytest.raises(CheckpointError, match="has dtype int32"):
        save_backbone(tmp_path / "other", SHAPE, whole)


def test_a_backbone_is_hashed_once_and_not_copied(backbone, tmp_path, monkeypatch):
    hashed = []
    checksum = arrays_file.file_checksum

    def count(path):
        hashed.append(pathlib.Path(path).name)
        return checksum(path)

    monkeypatch.setattr(description, "file_checksum", count)
    loaded = load_backbone(tmp_path / "backbone")
    assert hashed.count("backbone.safetensors") == 1
    for leaf in jax.tree.leaves(loaded.params):
        assert isinstance(leaf, np.ndarray) and not leaf.flags.owndata and not leaf.flags.writeable
    hashed.clear()
    backbone_folder.load_backbone(tmp_path / "backbone", verify=False)
    assert hashed == []


def test_a_description_survives_other_line_ends_but_no_other_change(backbone, tmp_path):
    save_plugin(tmp_path / "plugin", PLUGIN, VARIABLES, backbone)
    file = tmp_path / "plugin" / "plugin.json"
    data = file.read_bytes()
    file.write_bytes(data.replace(b"\n", b"\r\n"))
    load_plugin(tmp_path / "plugin", backbone)
    file.write_bytes(data.replace(b"  ", b" \t", 1))
    with pytest.raises(CheckpointError, match="changed or damaged"):
        load_plugin(tmp_path / "plugin")


def test_inspect_says_what_a_folder_is_not(tmp_path):
    with pytest.raises(CheckpointError, match="There is no folder"):
        inspect.describe(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is no backbone"):
        inspect.describe(tmp_path)
