"""Backbone and plugin folders: reload equals before; each kind of damage has its message."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import config

from variator_jax.backbone import init_params
from variator_jax.checkpoints import (
    folders,
    inspect,
    load_backbone,
    load_plugin,
    save_backbone,
    save_plugin,
)
from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig, init_plugin

SHAPE = config("1_1")
PARAMS = init_params(SHAPE, jax.random.key(0))
PLUGIN = PluginConfig(4, bottleneck=8, layers=(0, 2))
VARIABLES = init_plugin(PLUGIN, 3, 32, jax.random.key(1), output_scale=7.0)


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


@pytest.mark.parametrize("plugin", [PLUGIN, PluginConfig(2, decompression="repeat")])
def test_a_plugin_is_the_same_after_reloading(backbone, tmp_path, plugin):
    variables = init_plugin(plugin, 3, 32, jax.random.key(1), output_scale=7.0)
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

    fails("holds no plugin")
    fresh()
    (folder / "plugin.json").write_text("{")
    fails("not readable JSON")
    fresh()
    _edit(folder / "plugin.json", lambda c: c.update(format_version=99))
    fails("Update variator_jax")
    fresh()
    _edit(folder / "plugin.json", lambda c: c.update(kind="backbone"))
    fails("does not describe a plugin")
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
    fails("damaged")
    (folder / "plugin.safetensors").unlink()
    fails("is missing")


def test_a_changed_backbone_is_noticed(backbone, tmp_path):
    path = tmp_path / "backbone" / "backbone.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed or damaged"):
        load_backbone(tmp_path / "backbone")


def test_a_crash_while_writing_leaves_what_was_there(backbone, tmp_path, monkeypatch):
    folder = tmp_path / "plugin"
    save_plugin(folder, PLUGIN, VARIABLES, backbone)
    before = sorted(p.name for p in tmp_path.iterdir())

    def crash(*args):
        raise OSError("disk full")

    monkeypatch.setattr(folders, "write_json", crash)
    with pytest.raises(OSError, match="disk full"):
        save_plugin(folder, PLUGIN, VARIABLES, backbone)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    load_plugin(folder, backbone)


def test_inspect_says_what_a_folder_is_not(tmp_path):
    with pytest.raises(CheckpointError, match="There is no folder"):
        inspect.describe(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is no backbone"):
        inspect.describe(tmp_path)
